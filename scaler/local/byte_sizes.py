"""Numbers of bytes as people write them into files: 141GB, 80GiB, 64Gi."""

from __future__ import annotations

import math
import re
from typing import Annotated

from pydantic import BeforeValidator, Field

_UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


def byte_size(value: object) -> float:
    """Raises ValueError, saying what would do."""
    size = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        size = float(value)
    elif isinstance(value, str) and (found := re.fullmatch(r"(\d+|\d*\.\d+) ?([kMGT]i?|)B?", value.strip(), re.ASCII)):
        size = float(found[1]) * _UNITS[found[2]]
    if not math.isfinite(size):
        raise ValueError(f"{value!r} is no number of bytes, such as 141GB or 80GiB")
    return size


Bytes = Annotated[float, BeforeValidator(byte_size), Field(gt=0)]
