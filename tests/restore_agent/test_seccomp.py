"""The seccomp profile: as the runtime reads it, with what must be refused, and whole at any moment."""

import json
from pathlib import Path

from restore_agent.kubernetes.seccomp import install, profile
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
