"""A GPU's figures are kept under its kind, whatever else its driver says in its name."""

import pytest

from tests.bench.gpu.results import card


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("Quadro", "quadro"),
    ],
)
def test_a_card_is_named_by_its_kind(name: str, kind: str) -> None:
    assert card(name) == kind
