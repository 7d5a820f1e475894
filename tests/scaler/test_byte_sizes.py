"""Numbers of bytes as people write them."""

from __future__ import annotations

import math

import pytest

from scaler.local.byte_sizes import byte_size


@pytest.mark.parametrize(
    ("written", "size"),
    [("141GB", 141e9), ("80GiB", 80 * 2**30), ("64Gi", 64 * 2**30), ("1.5 T", 1.5e12), (" 7 ", 7.0), ("2k", 2000.0), (5, 5.0), (0.5, 0.5)],
)
def test_what_is_one(written: object, size: float) -> None:
    assert byte_size(written) == size


@pytest.mark.parametrize("written", ["much", "", "1.2.3GB", "-5GB", "5 bytes", "10%", "1.", "9" * 400, math.inf, math.nan, None, True, [5]])
def test_what_is_none(written: object) -> None:
    with pytest.raises(ValueError, match="is no number of bytes, such as 141GB or 80GiB"):
        byte_size(written)
