"""JSON that somebody else has written."""

from __future__ import annotations

import json
from typing import Any


def parsed(text: str | bytes | bytearray) -> Any:
    """Raises ValueError: it is no JSON, or is nested so deeply that nobody can mean it."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
