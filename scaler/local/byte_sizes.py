"""Numbers of bytes as people write them into files: 141GB, 80GiB, 64Gi."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, Field

_UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


def byte_size(value: object) -> float:
    """Raises ValueError, saying what would do."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    found = re.fullmatch(r"([0-9.]+) ?([kMGT]i?|)B?", value.strip()) if isinstance(value, str) else None
    try:
        assert found
        return float(found[1]) * _UNITS[found[2]]
    except (AssertionError, KeyError, ValueError):
        raise ValueError(f"{value!r} is no number of bytes, such as 141GB or 80GiB") from None


Bytes = Annotated[float, BeforeValidator(byte_size), Field(gt=0)]
