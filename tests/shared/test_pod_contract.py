"""What both sides of the contract for pods conclude from it in the same way."""

from __future__ import annotations

import msgspec
import pytest
from zerowake_proto import nri_pb2

from restore_agent.kubernetes.pod import Pod
from zerowake_shared.pod_contract import GPUMEM, is_lent_to, replica_id


@pytest.mark.parametrize(("said", "lent"), [({GPUMEM: "true"}, True), ({GPUMEM: "false"}, False), ({GPUMEM: ""}, False), ({}, False)])
def test_whether_gpumem_lends_to_a_pod_is_the_same_for_all_who_see_it(said: dict[str, str], lent: bool) -> None:
    """The runtime's plugin sees it in one form, whoever asks the API server in another."""
    of_the_api = msgspec.convert({"metadata": {"name": "one", "namespace": "team", "uid": "1", "annotations": said}}, Pod)
    assert is_lent_to(nri_pb2.PodSandbox(annotations=said).annotations) is is_lent_to(of_the_api.metadata.annotations) is lent


def test_a_container_is_one_replica_with_or_without_its_runtime_s_name() -> None:
    assert replica_id("one", "containerd://0123456789abcdef") == replica_id("one", "0123456789abcdef") == "one.0123456789ab"
    assert replica_id("one", "a" * 64) != replica_id("one", "b" * 64)
