"""What READMEs and the runbook have: sections, and commands: those of fenced blocks, one each, and those in a line of text or a table.

A block without a language is one of commands, but for the few that PICTURES names by how they begin: drawings, and what a command prints.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHELLS = ("", "sh", "bash", "console", "shell")
NO_SHELLS = ("yaml", "python", "json")
PICTURES = {
    "README.md": ("client ── HTTP", "NAME   PHASE   READY"),
    "scaler/README.md": ("HOST MEMORY",),
    "tests/README.md": ("scaler/   ",),
}
PROGRAMS = ("zerowake", "gpumem", "make", "python", "pytest", "pip", "kubectl", "helm", "docker")


@dataclass(frozen=True)
class Command:
    """page: of this repository. section: the title of second order that it stands below. line: where it begins."""

    page: str
    section: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


@dataclass(frozen=True)
class Block:
    page: str
    section: str
    line: int
    language: str
    content: str


def pages() -> list[str]:
    """All of this checkout; what is hidden, such as an environment, is none of it."""
    folders = [each for each in ROOT.iterdir() if each.is_dir() and not each.name.startswith(".")]
    found = [*ROOT.glob("*.md"), *(page for folder in folders for page in folder.rglob("*.md"))]
    return sorted(str(page.relative_to(ROOT)) for page in found)


def section(page: str, title: str) -> str:
    """What stands below a title of second order. One that is not there fails."""
    found = (ROOT / page).read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    assert found, f"{page} has no section {title}"
    return found


def blocks(page: str) -> Iterator[Block]:
    """The fenced ones. A block that does not end fails."""
    text = (ROOT / page).read_text()
    section, opened = "", None
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            if opened is None:
                opened = number, line.strip().removeprefix("```"), list[str]()
            else:
                yield Block(page, section, opened[0] + 1, opened[1], "\n".join(opened[2]))
                opened = None
        elif opened is not None:
            opened[2].append(line)
        elif line.startswith("## "):
            section = line.removeprefix("## ")
    assert opened is None, f"{page}:{opened and opened[0]}: a block that does not end"


def is_of_commands(block: Block) -> bool:
    assert block.language in (*SHELLS, *NO_SHELLS), f"{block.page}:{block.line}: is {block.language} something to run?"
    return block.language in SHELLS and not block.content.startswith(PICTURES.get(block.page, ("\0",)))


def commands() -> list[Command]:
    """Of all blocks; a line that ends with a backslash goes on, and comments are none of it."""
    found = []
    for block in (block for page in pages() for block in blocks(page) if is_of_commands(block)):
        begun, text = 0, ""
        for number, line in enumerate(block.content.splitlines(), block.line):
            begun = begun if text else number
            text += re.sub(r"(^|\s+)#\s.*$", "", line)
            if text.endswith("\\"):
                text = text[:-1].rstrip() + " "
            elif text:
                found.append(Command(block.page, block.section, begun, re.sub(r"  +", " ", text)))
                text = ""
        assert not text, f"{block.page}:{block.line}: its last line goes on"
    return found


def commands_in_text() -> list[Command]:
    """Code spans outside of blocks that begin with a program's name and say more than that."""
    found = []
    for page in pages():
        text = re.sub(r"^```.*?^```$", lambda block: "\n" * block[0].count("\n"), (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
        for span in re.finditer(r"`([^`]+)`", text):
            words = span[1].split()
            if len(words) > 1 and words[0] in PROGRAMS:
                found.append(Command(page, "", text.count("\n", 0, span.start()) + 1, " ".join(words)))
    return found


def alternatives(text: str) -> list[str]:
    """Every command that one line stands for: with and without what is in brackets, and one for each of what bars part.

    After the first bar the program and its group are the same: `zerowake key make | list` is two commands.
    """
    parts = [part for part in re.split(r"(\[[^\]]*\])", text) if part]
    choices = [["", *part[1:-1].split(" | ")] if part.startswith("[") and " | " not in _outside(part) else [part] for part in parts]
    found = []
    for chosen in product(*choices):
        first, *others = re.sub(r"\s+", " ", "".join(chosen)).strip().split(" | ")
        group = first.split()[:2] if others else []
        found += [first, *(" ".join([*group, other]) for other in others)]
    every = [re.sub(r"(\w+)\|(\w+)", rf"\{which}", each) for each in found for which in ((1, 2) if re.search(r"\w\|\w", each) else (1,))]
    return list(dict.fromkeys(every))


def _outside(part: str) -> str:
    return re.sub(r"\[[^\]]*\]", "", part)
