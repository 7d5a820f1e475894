"""What a forecast knows, kept in one file: a line of JSON that says what it is, and the rows as they are in memory.

It is written anew each time, beside the old one and in its place once it is whole. What cannot be read does no harm but for the loss: the
forecast begins anew, since nothing that it knows is worth keeping a program from its work.
"""

from __future__ import annotations

import contextlib
import json
import logging
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from scaler.forecast.forecast import ROW, State
from scaler.forecast.score import Score
from zerowake_shared import durable

log = logging.getLogger(__name__)

_VERSION = 1  # of what the numbers mean; what columns there are is in the file itself
_COLUMNS = repr(ROW.descr)


def encoded(state: State) -> bytes:
    """A file's content."""
    data = state.rows.tobytes()
    about = {
        "forecast": _VERSION,
        "columns": _COLUMNS,
        "crc32": zlib.crc32(data),
        "models": state.models,
        "score": asdict(state.score),
        "stated_at": state.stated_at,
        "latest": state.latest,
    }
    return json.dumps(about).encode() + b"\n" + data


def decoded(content: bytes) -> State:
    """Raises: ValueError: it is damaged, or another version's."""
    try:
        about, _, data = content.partition(b"\n")
        return _state(json.loads(about), data)
    except (KeyError, TypeError) as error:
        raise ValueError(f"it is none: {error!r}") from None


def save(path: Path, state: State) -> None:
    """A crash leaves the old file or the new one, never a part. Raises: OSError: then the old one is there still."""
    durable.replace(path, encoded(state))


def load(path: Path) -> State | None:
    """What was saved there; None: nothing, or nothing that can be read, which is told in the log.

    A file that cannot be read just now may be whole: it is put aside, since what is saved later takes its place.
    """
    try:
        return decoded(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        aside = path.with_name(f"{path.name}.unread")
        with contextlib.suppress(OSError):
            path.replace(aside)
        log.warning("the forecast's state cannot be read (%s) and is kept in %s: it begins anew, and learns within days", error, aside)
        return None
    except ValueError as error:
        log.warning("the forecast's state in %s cannot be used (%s): it begins anew, and learns again within days", path, error)
        return None


def _state(about: dict[str, Any], data: bytes) -> State:
    """Raises: ValueError, KeyError, TypeError."""
    if about["forecast"] != _VERSION or about["columns"] != _COLUMNS:
        raise ValueError("it is that of another version")
    if zlib.crc32(data) != about["crc32"]:
        raise ValueError("it is damaged")
    rows = np.frombuffer(data, ROW)
    if len(set(about["models"])) != len(rows):
        raise ValueError("it names other models than it has")
    return State(tuple(about["models"]), rows, Score(**about["score"]), about["stated_at"], about["latest"])
