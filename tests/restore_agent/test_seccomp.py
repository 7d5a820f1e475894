"""The seccomp profile: as the runtime reads it, with what must be refused, and whole at any moment."""

import json
from pathlib import Path
from typing import Any

import pytest

from restore_agent.kubernetes.seccomp import install, profile
from tests.worlds.refused_calls import ALLOWED, REFUSED, Call
from zerowake_shared.pod_contract import SECCOMP_PROFILE

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


def test_it_is_installed_whole_and_again(tmp_path: Path) -> None:
    folder = tmp_path / "seccomp"
    install(folder)
    install(folder)
    assert [path.name for path in folder.iterdir()] == [SECCOMP_PROFILE]
    assert json.loads((folder / SECCOMP_PROFILE).read_text()) == profile()
