"""What a model may hold."""

import pytest

from scaler.books.limits import ModelLimits


@pytest.mark.parametrize("field", ["max_requests", "max_bytes", "max_wait_seconds", "concurrency"])
def test_limits_must_be_positive(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be greater than 0, not 0"):
        ModelLimits(**{field: 0})
