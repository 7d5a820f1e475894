"""A journal: one JSON object a line, appended by one write, so that many processes share a file and a kill leaves whole lines."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def append(path: Path, **what: Any) -> None:
    """Adds a line, with the time as `at`."""
    line = json.dumps({"at": time.time(), **what}) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole line; none where there is no file."""
    if path.exists():
        with path.open() as lines:
            for line in lines:
                if line.endswith("\n"):
                    yield json.loads(line)
