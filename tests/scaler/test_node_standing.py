"""What is read of the cluster's nodes and of a pod's spec, and that the plan's view of nodes follows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from scaler.books.activation import Activations
from scaler.books.ledger import Ledger
from scaler.fleet.nodes import Nodes
from scaler.fleet.readiness import Readiness
from scaler.gateway.dispatcher import Dispatcher
from scaler.kubernetes.node_standing import ClusterNode, demands_of, told_to
from scaler.kubernetes.resources import NODES, REPORTER
from scaler.plan.scheduling import ZONE, PodDemands, Requirement, Standing, Taint, Term, Toleration
from tests.worlds.fake_agent import Agent
from tests.worlds.kubernetes_api import Api
from tests.worlds.waiting import until
from zerowake_shared.kubernetes.cluster import Cluster


async def test_nodes_stand_as_the_cluster_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api, nodes = Api(), Nodes(Readiness(Dispatcher(Ledger())), Activations())
    changes: list[Standing | None] = []

    def stands() -> Standing | None:
        (found,) = nodes
        return found.standing

    async with api.serve(tmp_path) as kubeconfig, Agent("n1").serve() as address, nodes.follow(address):
        await until(lambda: [node.name for node in nodes] == ["n1"])
        nodes.on_place(lambda _: changes.append(stands()))
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        await api.put("nodes", {"metadata": {"name": "n1", "labels": {ZONE: "here"}}, "spec": {"podCIDR": "10.0.0.0/24"}})
        async with (
            Cluster.connect(reporter=REPORTER, instance="test") as cluster,
            told_to(nodes, cluster.follow(NODES, ClusterNode)),
        ):
            await until(lambda: stands() == Standing({ZONE: "here"}))
            await api.change("nodes", "", "n1", {"status": {"images": []}})
            taint = {"key": "team", "effect": "NoSchedule", "timeAdded": "2026-01-01T00:00:00Z"}
            await api.change("nodes", "", "n1", {"spec": {"unschedulable": True, "taints": [taint]}})
            await until(lambda: stands() == Standing({ZONE: "here"}, (Taint("team"),), cordoned=True))
            await api.remove("nodes", "", "n1")
            await until(lambda: stands() is None)
    assert len(changes) == 3, "what a kubelet reports of itself is no change"


def test_what_a_pod_asks_of_nodes() -> None:
    required = {
        "nodeSelectorTerms": [
            {"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["a"]}]},
            {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n"]}]},
            {},
        ]
    }
    spec = {
        "containers": [
            {"name": "engine", "resources": {"limits": {"nvidia.com/gpu": 1, "memory": "1Gi"}}},
            {"name": "other", "resources": None},
        ],
        "nodeSelector": {"disk": "fast"},
        "tolerations": [{"key": "team", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 3}],
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}, "podAffinity": {}},
    }
    assert demands_of(spec) == PodDemands(
        (Toleration("team", "Exists", effect="NoExecute"),),
        {"disk": "fast"},
        (
            Term((Requirement("gpu", "In", ("a",)),)),
            Term(fields=(Requirement("metadata.name", "In", ("n",)),)),
            Term(),
        ),
        frozenset({"nvidia.com/gpu"}),
    )
    assert demands_of({}) == demands_of({"affinity": None, "nodeSelector": None, "tolerations": None}) == PodDemands()


@pytest.mark.parametrize("spec", [{"tolerations": "all"}, {"affinity": "any"}, {"nodeSelector": {"a": 1}}, {"containers": 3}])
def test_of_a_spec_that_is_none_nothing_is_known(spec: dict[str, object]) -> None:
    assert demands_of(spec) is None
