"""What is found of the machine: on this one as it is, and with its parts broken one by one."""

from __future__ import annotations

import ctypes
import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from restore_agent.places.processes import status
from restore_agent.programs import machine_checks
from zerowake_shared.checkup import Finding, Outcome, Subject

SUBJECT = Subject(Path("/nowhere"), Path("/nowhere/gpumem.sock"))


def found(check: Callable[[Subject], Sequence[Finding]]) -> list[tuple[Outcome, str]]:
    return [(finding.outcome, finding.found) for finding in check(SUBJECT)]


def in_a_child(check: Callable[[Subject], Sequence[Finding]], before: Callable[[], None]) -> list[str]:
    """What it finds in a process of its own, which has done something to itself before."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            before()
            said = [word for each in check(SUBJECT) for word in (each.outcome.value, each.found, each.remedy)]
            os.write(writer, json.dumps(said).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with os.fdopen(reader) as said:
        return list(json.load(said))


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give it up")


@needs_root
def test_a_user_who_is_not_root_is_told_what_that_costs() -> None:
    outcome, text, remedy = in_a_child(machine_checks.rights, lambda: os.setuid(65534))
    assert (outcome, remedy) == ("fails", "run zerowake as root (sudo)")
    assert "runs as user nobody: engines are started cold" in text


@needs_root
def test_a_root_without_a_capability_is_told_which() -> None:
    def without_admin() -> None:
        """Of capset(2): two words for each of the three sets."""
        libc = ctypes.CDLL(None)
        header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert libc.capget(header, data) == 0
        data[0] &= ~(1 << 21)
        assert libc.capset(header, data) == 0

    outcome, text, remedy = in_a_child(machine_checks.rights, without_admin)
    assert (outcome, text) == ("fails", "root without CAP_SYS_ADMIN")
    assert "privileged" in remedy


@needs_root
def test_the_capability_that_not_every_root_has_is_a_warning_where_it_is_missing() -> None:
    ((outcome, text),) = found(machine_checks.rights)
    has = int(status(os.getpid())["CapEff"], 16) >> 24 & 1
    assert (outcome, "CAP_SYS_RESOURCE" in text) == ((Outcome.OK, False) if has else (Outcome.WARNING, True))


def test_this_machine_has_what_it_needs() -> None:
    for check in (machine_checks.kernel, machine_checks.memory, machine_checks.cgroups):
        assert all(outcome is not Outcome.FAILS for outcome, _ in found(check)), found(check)


def test_an_old_kernel_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "5.4.0-100-generic")
    assert found(machine_checks.kernel) == [
        (Outcome.WARNING, "Linux 5.4.0-100-generic: no memory is held ready for the next restore, which is slower")
    ]


def test_huge_pages_that_cannot_be_switched_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "SWITCHES", tmp_path)
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    (of_restored, text), (of_gpumem, missing) = found(machine_checks.huge_pages)
    assert (of_restored, text) == (Outcome.OK, "restored memory: never, and switched on for as long as it takes")
    assert (of_gpumem, "this kernel has none" in missing) == (Outcome.WARNING, True)
    monkeypatch.setattr(os, "access", lambda *_: False)
    first = machine_checks.huge_pages(SUBJECT)[0]
    assert (first.outcome, first.remedy) == (Outcome.WARNING, f"as root: echo always > {tmp_path / 'enabled'}")


def test_a_limit_of_memory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text(f"{1 << 30}\n")
    monkeypatch.setattr(machine_checks, "cgroup_files", lambda _: [tmp_path / "cgroup.procs"])
    ((outcome, text),) = found(machine_checks.cgroups)
    assert outcome is Outcome.WARNING
    assert "this process and what it starts have 1.0 GiB of this machine's" in text


def test_too_little_memory_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "available_memory", lambda: 100 << 20)
    shm = SimpleNamespace(f_bavail=16, f_frsize=1 << 20, f_blocks=64)
    monkeypatch.setattr(os, "statvfs", lambda _: shm)
    (memory, text), (of_shm, little) = found(machine_checks.memory)
    assert (memory, of_shm) == (Outcome.FAILS, Outcome.WARNING)
    assert text.startswith("100 MiB of ")
    assert little == "/dev/shm: 16 MiB of 64 MiB free, which is little for torch and vLLM"


def test_the_clock_is_as_the_kernel_says() -> None:
    ((outcome, _),) = found(machine_checks.clock)
    state = ctypes.create_string_buffer(512)
    said = ctypes.CDLL(None).adjtimex(state)  # TIME_ERROR (5) is what it returns where nothing keeps it right
    assert (outcome is Outcome.OK) == (said != 5)
