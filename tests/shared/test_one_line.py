"""A user's mistake is one line and an exit code; a bug is not hidden behind one."""

from __future__ import annotations

import pytest

from zerowake_shared.one_line import errors_in_one_line


class Named(Exception):
    """One that is said to be for users."""


def said(error: Exception, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended, errors_in_one_line("program", Named):
        raise error
    assert ended.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (Named("it is\n  so"), "it is so"),
        (FileNotFoundError(2, "No such file or directory", "/x"), "/x: No such file or directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("gone"), "gone"),
        (
            UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
            "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
        ),
        (TimeoutError(), "TimeoutError"),
        (ExceptionGroup("a", [ExceptionGroup("b", [Named("inside")])]), "inside"),
        (ExceptionGroup("a", [Named("twice"), Named("twice")]), "twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_one_line(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(error, capsys) == f"program: {line}\n"


def test_two_reasons_are_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(ExceptionGroup("a", [Named("one"), Named("other")]), capsys) == "program: one\nprogram: other\n"


@pytest.mark.parametrize("error", [KeyError("x"), ExceptionGroup("a", [Named("n"), TypeError("t")])])
def test_a_bug_stays_one(error: Exception) -> None:
    with pytest.raises(type(error)), errors_in_one_line("program", Named):
        raise error


def test_the_end_of_a_program_is_none_of_it() -> None:
    with pytest.raises(SystemExit, match="3"), errors_in_one_line("program"):
        raise SystemExit(3)
