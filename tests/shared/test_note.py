"""Texts that have to fit where Kubernetes keeps them."""

import pytest

from zerowake_shared.kubernetes.note import fitted


@pytest.mark.parametrize("length", [0, 9, 10, 11, 500])
def test_both_ends_stay(length: int) -> None:
    text = "".join(chr(ord("a") + each % 26) for each in range(length))
    found = fitted(text, 10)
    assert found == text if length <= 10 else (len(found) == 10 and found == f"abc … {text[-4:]}")
