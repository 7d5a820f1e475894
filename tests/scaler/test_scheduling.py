"""Which nodes take a model's pods: the scheduler's own rules, case by case."""

from __future__ import annotations

import pytest

from scaler.plan.scheduling import ZONE, PodDemands, Requirement, Standing, Taint, Term, Toleration, why_no_pod

GPU = Taint("nvidia.com/gpu", "present")
TEAM = Taint("team", "other", "NoExecute")
CORDONED = Standing(taints=(Taint("node.kubernetes.io/unschedulable"),), cordoned=True)


def tolerating(*tolerations: Toleration) -> PodDemands:
    return PodDemands(tolerations)


@pytest.mark.parametrize(
    ("taint", "toleration", "tolerated"),
    [
        (TEAM, Toleration("team", "Exists"), True),
        (TEAM, Toleration("team", "Equal", "other"), True),
        (TEAM, Toleration("team", "", "other"), True),
        (TEAM, Toleration("team", "Equal", "mine"), False),
        (TEAM, Toleration("team"), False),
        (TEAM, Toleration("team", "Exists", effect="NoExecute"), True),
        (TEAM, Toleration("team", "Exists", effect="NoSchedule"), False),
        (TEAM, Toleration(operator="Exists"), True),
        (TEAM, Toleration(operator="Exists", effect="NoSchedule"), False),
        (TEAM, Toleration("other", "Exists"), False),
        (TEAM, Toleration("team", "Gt", "1"), False),
    ],
)
def test_taints_and_tolerations(taint: Taint, toleration: Toleration, tolerated: bool) -> None:
    standing = Standing(taints=(taint,))
    assert why_no_pod("n", standing, tolerating()) == "its pods do not tolerate the taint team=other:NoExecute"
    assert (why_no_pod("n", standing, tolerating(toleration)) == "") is tolerated


def test_each_taint_that_keeps_pods_out_has_to_be_tolerated() -> None:
    both = Standing(taints=(TEAM, GPU))
    one = tolerating(Toleration("team", "Exists"))
    assert why_no_pod("n", both, one) == "its pods do not tolerate the taint nvidia.com/gpu=present:NoSchedule"
    assert why_no_pod("n", both, PodDemands(one.tolerations, resources=frozenset({"nvidia.com/gpu"}))) == "", "they ask for one"
    assert why_no_pod("n", Standing(taints=(Taint("team", effect="PreferNoSchedule"),)), tolerating()) == ""


def test_cordons() -> None:
    assert why_no_pod("n", CORDONED, tolerating()) == why_no_pod("n", CORDONED, None) == "it is cordoned"
    assert why_no_pod("n", CORDONED, tolerating(Toleration("node.kubernetes.io/unschedulable", "Exists"))) == ""
    assert why_no_pod("n", CORDONED, tolerating(Toleration(operator="Exists"))) == ""


def test_where_nothing_is_known_nothing_speaks_against_a_node() -> None:
    assert why_no_pod("n", None, PodDemands(selector={"gpu": "yes"})) == ""
    assert why_no_pod("n", Standing(taints=(TEAM,)), None) == "", "what the pods tolerate is not known"


def test_node_selectors() -> None:
    pods = PodDemands(selector={"gpu": "yes"})
    assert why_no_pod("n", Standing({"gpu": "yes", "more": ""}), pods) == ""
    for labels in ({}, {"gpu": "no"}):
        assert why_no_pod("n", Standing(labels), pods) == "its pods select nodes by the label gpu=yes"


@pytest.mark.parametrize(
    ("requirement", "labels", "holds"),
    [
        (Requirement("gpu", "In", ("a", "b")), {"gpu": "b"}, True),
        (Requirement("gpu", "In", ("a", "b")), {"gpu": "c"}, False),
        (Requirement("gpu", "In", ("a", "b")), {}, False),
        (Requirement("gpu", "NotIn", ("a",)), {"gpu": "c"}, True),
        (Requirement("gpu", "NotIn", ("a",)), {"gpu": "a"}, False),
        (Requirement("gpu", "NotIn", ("a",)), {}, True),
        (Requirement("gpu", "Exists"), {"gpu": ""}, True),
        (Requirement("gpu", "Exists"), {}, False),
        (Requirement("gpu", "DoesNotExist"), {}, True),
        (Requirement("gpu", "DoesNotExist"), {"gpu": ""}, False),
        (Requirement("count", "Gt", ("4",)), {"count": "8"}, True),
        (Requirement("count", "Gt", ("8",)), {"count": "8"}, False),
        (Requirement("count", "Lt", ("8",)), {"count": "4"}, True),
        (Requirement("count", "Lt", ("8",)), {}, False),
        (Requirement("count", "Gt", ("4",)), {"count": "many"}, False),
        (Requirement("count", "Like", ("4",)), {"count": "4"}, False),
    ],
)
def test_required_affinity(requirement: Requirement, labels: dict[str, str], holds: bool) -> None:
    pods = PodDemands(terms=(Term((requirement,)),))
    assert why_no_pod("n", Standing(labels), pods) == ("" if holds else "its pods' required node affinity does not match it")


def test_of_terms_one_is_enough_and_within_a_term_all_count() -> None:
    here, there = Requirement(ZONE, "In", ("here",)), Requirement(ZONE, "In", ("there",))
    named = Requirement("metadata.name", "In", ("n",))
    in_there = Standing({ZONE: "there"})
    assert in_there.zone == "there" and Standing().zone == ""
    assert why_no_pod("n", in_there, PodDemands(terms=(Term((here,)), Term((there,))))) == ""
    assert why_no_pod("n", in_there, PodDemands(terms=(Term((here, there)),)))
    assert why_no_pod("n", in_there, PodDemands(terms=(Term((there,), (named,)),))) == ""
    assert why_no_pod("m", in_there, PodDemands(terms=(Term((there,), (named,)),)))
    assert why_no_pod("n", in_there, PodDemands(terms=(Term(),))), "one that asks for nothing holds nowhere"
    assert why_no_pod("n", in_there, PodDemands(terms=())), "nor do none"
