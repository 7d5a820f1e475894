"""Commands that are told to a shell as a script (`sh -c "exec vllm serve …"`), read as the words that the shell would make of it.

What is added to an engine's command is added to its words, so a script is read as far as it says what they are: plain and quoted words,
variables set before them, and simple commands before the last one, which is the engine's. What a shell would have to look up first
(`$MODEL`, `$(cat …)`, `*.gguf`), and what it does on a condition, beside others or with other outputs, is refused: added options would
have a meaning there that nobody checked. The shell stays, and with it what it reads before (`bash -lc`); of its script all before the
engine's words stays as it is written.
Rejected: `shlex.split`, which takes `$MODEL;` for a word; options added to whatever the script ends with, which may be `fi`, or `| tee`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from restore_agent.errors import AgentError, ErrorKind

_SHELLS = frozenset({"sh", "bash", "dash", "ash", "busybox"})
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_NESTED = frozenset(
    {"!", "{", "}", "[[", "case", "coproc", "for", "function", "if", "select", "time", "until", "while"}
)  # what these begin
_RESERVED = _NESTED | {"do", "done", "elif", "else", "esac", "fi", "in", "then"}
_LOOKED_UP = {"$": "a variable or a command", "`": "a command", "*": "names of files", "?": "names of files", "[": "names of files"}
_STRUCTURE = {"|": "a pipe or `||`", "&": "a command in the background", "<": "another input", ">": "another output"}
_GROUPS = {"(": "a group", ")": "a group", "{": "a group or a list", "}": "a group or a list"}


class UnclearCommand(AgentError):
    """A shell's script whose words are known to that shell alone."""

    kind = ErrorKind.INVALID
    reason = "invalid"


@dataclass(frozen=True)
class ShellCommand:
    """A shell, its script as far as it is kept, and the words of the script's last command."""

    shell: tuple[str, ...]  # with its options
    before: str  # of the script: variables that are set, commands that come first
    words: tuple[str, ...]
    after: tuple[str, ...]  # the shell's own arguments, which a script of plain words does not look at

    @classmethod
    def read(cls, command: Sequence[str]) -> ShellCommand | None:
        """None: it is no shell with a script. Raises UnclearCommand."""
        at = _script_at(command)
        if at is None:
            return None
        script = command[at]
        simple = [each for each in _simple_commands(script) if each]
        if not simple:
            return None
        for each in simple:
            if each[0].text in _RESERVED:
                raise UnclearCommand(f"the script of {command[0]} does something on a condition or again ({each[0].text})")
        last = simple[-1]
        own = next((word for word in last if not _ASSIGNMENT.match(script[word.begin :])), None)
        if own is None:
            return None
        words = tuple(word.text for word in last[last.index(own) :])
        return cls(tuple(command[:at]), script[: own.begin], words, tuple(command[at + 1 :]))

    def saying(self, words: Sequence[str]) -> list[str]:
        """The shell's command with these words in the place of the last command's."""
        return [*self.shell, self.before + shlex.join(words), *self.after]


def script_of(command: Sequence[str]) -> str:
    """What a shell is told by it; empty: it is no shell with a script."""
    at = _script_at(command)
    return "" if at is None else command[at]


@dataclass(frozen=True)
class _Word:
    begin: int
    text: str


def _script_at(command: Sequence[str]) -> int | None:
    """Where the script is: the word after a shell's options, of which one has a `c`."""
    at = next((index for index, word in enumerate(command) if word.rpartition("/")[2] in _SHELLS), len(command))
    says = named = False
    for index, word in enumerate(command[at + 1 :], at + 1):
        if named or (index == at + 1 and word in _SHELLS):  # `-o pipefail`, `busybox sh`
            named = False
        elif not word.startswith(("-", "+")):
            return index if says else None
        elif not word.startswith("--"):
            says, named = says or "c" in word, word.endswith("o")
    return None


def _simple_commands(script: str) -> list[list[_Word]]:
    """The words of each command that follows the one before it, or its success. Raises UnclearCommand."""
    commands: list[list[_Word]] = [[]]
    at = 0
    while at < len(script):
        letter = script[at]
        if script.startswith(("&&", "\\\n"), at):
            if letter == "&":
                commands.append([])
            at += 2
        elif letter in ";\n":
            commands.append([])
            at += 1
        elif letter in " \t":
            at += 1
        elif letter == "#":
            at = (script + "\n").index("\n", at)
        else:
            word, at = _word(script, at)
            commands[-1].append(word)
    return commands


def _word(script: str, begin: int) -> tuple[_Word, int]:
    """One word, and where it ends."""
    at, text = begin, ""
    while at < len(script) and script[at] not in " \t\n;" and not script.startswith("&&", at):
        letter = script[at]
        if letter in "'\"":
            quoted, at = _quoted(script, at)
            text += quoted
            continue
        if letter == "\\" and at + 1 < len(script):
            text += "" if script[at + 1] == "\n" else script[at + 1]
            at += 2
            continue
        if letter == "~" and at == begin:
            raise UnclearCommand("its script has a home folder to be looked up (~)")
        _plain(letter)
        text += letter
        at += 1
    return _Word(begin, text), at


def _quoted(script: str, begin: int) -> tuple[str, int]:
    """What stands between two quotes, and where it ends."""
    quote, text, at = script[begin], "", begin + 1
    while at < len(script) and script[at] != quote:
        letter = script[at]
        if quote == '"' and letter == "\\" and script[at + 1 : at + 2] in ("$", "`", '"', "\\", "\n"):
            at += 1
            letter = script[at].strip("\n")
        elif quote == '"' and letter in "$`":
            _plain(letter)
        text += letter
        at += 1
    if at >= len(script):
        raise UnclearCommand(f"its script has a quote that does not end ({quote})")
    return text, at + 1


def _plain(letter: str) -> None:
    """Raises UnclearCommand: the shell takes it for something else than itself."""
    if what := _LOOKED_UP.get(letter):
        raise UnclearCommand(f"its script has {what} to be looked up ({letter})")
    if what := (_STRUCTURE | _GROUPS).get(letter):
        raise UnclearCommand(f"its script has {what} ({letter})")
