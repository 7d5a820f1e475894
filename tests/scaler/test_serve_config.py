"""The file of `zerowake serve`: what is wrong with it is said by name."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from scaler.local.config import BadConfig
from scaler.programs.serve_config import load


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"namespace": None}, "namespace"),
        ({"agents": {}}, "give either service"),
        ({"agents": {"service": "a", "addresses": ["b:1"]}}, "give either service"),
        ({"peers": {"service": "a"}}, "peers.listen"),
        ({"listen": "8080"}, "'8080' is not HOST:PORT"),
        ({"models": {}}, "models"),
        ({"objective": "median"}, "objective: Input should be 'mean' or 'p99'"),
        ({"memory_quotas": {"team": "much"}}, "memory_quotas.team: .*'much' is no number of bytes, such as 141GB or 80GiB"),
        ({"memory_quotas": {"Team": "1Gi"}}, "memory_quotas.Team"),
        ({"memory_quotas": {"team": -1}}, "memory_quotas.team: .*greater than or equal to 0"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    good = {"namespace": "zerowake", "keda": {"listen": "0.0.0.0:9443"}, "agents": {"service": "zerowake-agent"}}
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(good))
    assert load(path).agents.member_port == 9446 and load(path).memory_quotas == {}
    path.write_text(yaml.safe_dump(good | change))
    with pytest.raises(BadConfig, match=told):
        load(path)


def test_quotas_are_written_as_sizes_are(tmp_path: Path) -> None:
    quotas = {"team-a": "64Gi", "*": "16GB", "none": 0}
    path = tmp_path / "serve.yaml"
    path.write_text(
        yaml.safe_dump({"namespace": "z", "keda": {"listen": "0.0.0.0:9443"}, "agents": {"service": "a"}, "memory_quotas": quotas})
    )
    assert load(path).memory_quotas == {"team-a": 64 * 2**30, "*": 16 * 10**9, "none": 0}
