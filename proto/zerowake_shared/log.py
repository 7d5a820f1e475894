"""Structured logs: one JSON object a line on standard error.

A record carries its data as `extra={"fields": {...}}`; those names stand at the top level beside `time`, `level`, `logger` and `message`.
Whatever belongs to a scale-up carries its `activation`. Messages hold what engines and tenants said, so a line is always built as a value
and then encoded: no text of theirs can end it, or add a field to it. A record that cannot be encoded is shown all the same, as text.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime


class JsonFormatter(logging.Formatter):
    """Turns a record into one line of JSON, whatever is in it."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
        }
        fields = getattr(record, "fields", None)
        if isinstance(fields, dict):
            line.update((str(name), value) for name, value in fields.items() if name not in line)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            return json.dumps(line, default=str, allow_nan=False)
        except (TypeError, ValueError):  # infinity, which JSON has no word for; a key that is no text; a value that holds itself
            return json.dumps({name: value if isinstance(value, str) else repr(value) for name, value in line.items()})


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError):  # arguments that do not fit: a mistake of ours, whose line says more than the mistake
        return f"{record.msg} {record.args!r}"


def configure(level: int = logging.INFO) -> None:
    """Sends every log of this process to standard error as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
