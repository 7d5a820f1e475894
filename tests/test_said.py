"""What READMEs quote, the product says: reasons of events and conditions, and messages; and every event that it writes is told of there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.worlds.readme_commands import section

ROOT = Path(__file__).parent.parent
PRODUCT = ("scaler", "restore_agent", "gpumem", "proto/zerowake_shared")
DEPLOY = (ROOT / "deploy/README.md").read_text()
OTHERS = {"ScaledObject", "ModelSnapshot", "KEDAScaleTargetActivated", "Scheduled", "Started"}  # Kubernetes' and KEDA's own
MADE = {f"Source{each}" for each in ("Refused", "Silent")}  # of the condition's reason, in snapshot_writer.py
OPEN = "…"  # in a message: what differs from one time to the next


@cache
def texts() -> frozenset[str]:
    """All that the product's code has between quotes, docstrings aside; what an f-string fills in is OPEN."""
    found = set()
    for path in (path for room in PRODUCT for path in (ROOT / room).rglob("*.py")):
        tree = ast.parse(path.read_text())
        within = {id(part) for each in ast.walk(tree) if isinstance(each, ast.JoinedStr) for part in each.values}
        docstrings = {id(each.value) for each in ast.walk(tree) if isinstance(each, ast.Expr)}
        for each in ast.walk(tree):
            if isinstance(each, ast.JoinedStr):
                found.add("".join(str(part.value) if isinstance(part, ast.Constant) else OPEN for part in each.values))
            elif isinstance(each, ast.Constant) and isinstance(each.value, str) and id(each) not in within | docstrings:
                found.add(each.value)
    return frozenset(found)


def reasons(title: str) -> list[str]:
    """The words in capitals of that section that stand as code, but for what is Kubernetes' or KEDA's own."""
    return sorted(set(re.findall(r"`([A-Z][a-z]+(?:[A-Z][A-Za-z]+)*)`", section("deploy/README.md", title))) - OTHERS)


@pytest.mark.parametrize("title", ["The events of a start, in order", "Where the reason stands"])
def test_every_reason_is_one_that_the_product_gives(title: str) -> None:
    named = reasons(title)
    assert len(named) > 8
    assert [each for each in named if each not in texts() and each not in MADE] == []


def written() -> Iterator[str]:
    """Reasons of events that stand in the code as they are."""
    for path in (path for room in PRODUCT for path in (ROOT / room).rglob("*.py")):
        yield from re.findall(r'\.event\([^\n]*"(?:Normal|Warning)", "(\w+)"', path.read_text())


def test_every_event_is_told_of() -> None:
    found = set(written())
    assert len(found) > 12
    assert sorted(each for each in found if f"`{each}`" not in DEPLOY) == []


def messages() -> list[tuple[str, str]]:
    """Of the table of scaler/README.md: page and message, a line each."""
    return re.findall(r"^\| `(.+?)` \|", section("scaler/README.md", "What goes wrong, and what it says"), re.MULTILINE)


def test_there_are_messages() -> None:
    assert len(messages()) > 10


@pytest.mark.parametrize("message", messages())
def test_every_message_is_one_that_the_product_gives(message: str) -> None:
    parts = [re.escape(part.strip()) for part in message.split(OPEN) if part.strip()]
    wanted = re.compile(r".*?".join(parts), re.DOTALL)
    assert any(wanted.search(text) for text in texts()), message
