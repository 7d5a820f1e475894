"""Every line of a log is one JSON object, whatever was logged."""

import io
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from zerowake_shared.log import JsonFormatter

FORGED = 'ready"}\n{"time": "2026-01-01", "level": "error", "logger": "zerowake.agent", "message": "forged"}\r\n"activation": "ab12'


def logged(write: Callable[[logging.Logger], None]) -> dict[str, Any]:
    """The one line that `write` logs."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.Logger("zerowake.test")
    logger.addHandler(handler)
    write(logger)
    (line,) = stream.getvalue().splitlines()
    found: dict[str, Any] = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    return found


def test_a_line_carries_its_fields() -> None:
    fields = {"activation": "ab12", "seconds": 0.25, "phases": {"held": 1}}
    line = logged(lambda logger: logger.info("served %s", "chat", extra={"fields": fields}))
    assert {name: line[name] for name in fields} == fields
    assert (line["message"], line["level"], line["logger"]) == ("served chat", "info", "zerowake.test")
    assert list(line)[:4] == ["time", "level", "logger", "message"]


@pytest.mark.parametrize("text", ['say "no"', "back\\slash", "two\nlines\r\n", "\x00\x1b[31m", "\u2028\u2029\x85", "\udc80", FORGED])
def test_what_is_said_stays_in_its_message(text: str) -> None:
    line = logged(lambda logger: logger.warning("the engine said: %s", text))
    assert line["message"] == f"the engine said: {text}"
    assert set(line) == {"time", "level", "logger", "message"} and line["level"] == "warning"


def test_fields_do_not_replace_what_every_line_has() -> None:
    fields = {"message": "another", "level": "debug", "logger": "x", "time": 0, "note": FORGED}
    line = logged(lambda logger: logger.error("lost", extra={"fields": fields}))
    assert (line["message"], line["level"], line["logger"], line["note"]) == ("lost", "error", "zerowake.test", FORGED)
    assert line["time"] != 0


def test_an_exception_is_part_of_its_line() -> None:
    def fail(logger: logging.Logger) -> None:
        try:
            raise RuntimeError(FORGED)
        except RuntimeError:
            logger.exception("lost %s", "it", extra={"fields": {"activation": "ab12", "exception": "must not replace it"}})

    line = logged(fail)
    assert (line["message"], line["level"], line["activation"]) == ("lost it", "error", "ab12")
    assert f"RuntimeError: {FORGED}" in line["exception"] and "Traceback" in line["exception"]


@pytest.mark.parametrize(
    "value", [float("inf"), float("nan"), {"deep": [float("-inf")]}, {(1, 2): "a key that is no text"}, {1, 2}, object()]
)
def test_what_json_has_no_word_for_is_shown_as_text(value: object) -> None:
    line = logged(lambda logger: logger.info("seen", extra={"fields": {"value": value}}))
    assert line["message"] == "seen" and line["value"] in (repr(value), str(value))


def test_a_value_that_holds_itself() -> None:
    value: list[object] = []
    value.append(value)
    assert logged(lambda logger: logger.info("seen", extra={"fields": {"value": value}}))["value"] == "[[...]]"


def test_arguments_that_do_not_fit_are_shown() -> None:
    assert logged(lambda logger: logger.info("%d of %d", *["one"]))["message"] == "%d of %d ('one',)"
