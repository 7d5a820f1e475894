"""The seccomp policy: as the runtime reads it, with what must be refused."""

from typing import Any

import pytest

from restore_agent.kubernetes.seccomp import policy, profile
from tests.worlds.refused_calls import ALLOWED, REFUSED, Call

ENOSYS, EPERM = 38, 1


def refusals() -> dict[str, list[dict[str, object]]]:
    found: dict[str, list[dict[str, object]]] = {}
    for rule in profile()["syscalls"]:
        for name in rule["names"]:
            found.setdefault(name, []).append(rule)
    return found


def test_what_a_dump_cannot_carry_does_not_exist_and_what_reaches_the_kernel_is_not_permitted() -> None:
    found = refusals()
    for name in ("io_uring_setup", "io_uring_enter", "io_uring_register"):
        assert [rule["errnoRet"] for rule in found[name]] == [ENOSYS]
    for name in ("mount", "setns", "unshare", "bpf", "init_module", "kexec_load", "keyctl", "userfaultfd"):
        assert [(rule["errnoRet"], "args" in rule) for rule in found[name]] == [(EPERM, False)], name
    assert profile()["defaultAction"] == "SCMP_ACT_ALLOW"
    assert not found.keys() & {"read", "mmap", "futex", "execve", "ptrace"}


def answer(call: Call) -> int:
    """What a kernel under the profile answers: the errno of the first rule that holds, 0 where none does."""
    operators = {"SCMP_CMP_EQ": int.__eq__, "SCMP_CMP_GT": int.__gt__}
    for rule in refusals().get(call.name, []):
        conditions: list[dict[str, Any]] = rule.get("args", [])  # type: ignore[assignment]
        if all(operators[each["op"]](call.arguments[each["index"]], each["value"]) for each in conditions):
            return int(str(rule["errnoRet"]))
    return 0


@pytest.mark.parametrize("call", REFUSED, ids=str)
def test_what_is_refused_in_a_sandbox_is_refused_in_a_pod(call: Call) -> None:
    """With the same answer; what only the profile's other half refuses is not permitted."""
    assert answer(call) in (REFUSED[call], EPERM)
    if call.name in ("socket", "timerfd_create", "arch_prctl"):
        assert answer(call) == REFUSED[call]


@pytest.mark.parametrize("call", ALLOWED, ids=str)
def test_what_can_be_carried_is_allowed(call: Call) -> None:
    assert answer(call) == 0


def test_clone_is_refused_for_each_new_namespace_and_for_nothing_else() -> None:
    (no_flags,) = [rule for rule in refusals()["clone3"]]
    assert no_flags["errnoRet"] == ENOSYS, "its flags are out of a filter's sight, so libraries are told to use clone"
    bits = 0
    for rule in refusals()["clone"]:
        (argument,) = rule["args"]  # type: ignore[misc]
        assert argument["op"] == "SCMP_CMP_MASKED_EQ" and argument["value"] == argument["valueTwo"]
        bits |= argument["value"]
    # CLONE_NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWNS of linux/sched.h
    assert bits == 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000 | 0x00020000


def test_the_runtime_is_told_the_same() -> None:
    """What a plugin says comes to the OCI's specification of the container word for word."""
    told = policy()
    assert told.default_action == profile()["defaultAction"]
    for said, rule in zip(told.syscalls, profile()["syscalls"], strict=True):
        assert (list(said.names), said.action, said.errno_ret.value) == (rule["names"], rule["action"], rule["errnoRet"])
        found = [{"index": each.index, "value": each.value, "valueTwo": each.value_two, "op": each.op} for each in said.args]
        assert found == [{"valueTwo": 0, **each} for each in rule.get("args", [])]
