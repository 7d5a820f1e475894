"""What is found of what the agent works with: on a real machine, with its parts broken one by one."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from restore_agent.drivers.cuda import Cuda, CudaError
from restore_agent.programs import checks
from restore_agent.snapshots.keyring import Keyring
from tests.worlds.agent import Agent
from tests.worlds.cuda_driver import Driver, Nvml
from tests.worlds.s3_server import S3Server
from zerowake_shared.checkup import Finding, Outcome, Subject

OK, WARNING, FAILS = Outcome.OK, Outcome.WARNING, Outcome.FAILS


def subject(state: Path, **more: object) -> Subject:
    return Subject(state, Path("/nowhere/gpumem.sock"), **more)  # type: ignore[arg-type]


async def found(check: Callable[[Subject], Awaitable[Sequence[Finding]]], of: Subject) -> list[tuple[Outcome, str]]:
    return [(finding.outcome, finding.found) for finding in await check(of)]


# --- CRIU


async def test_the_criu_of_this_machine_works_in_a_sandbox(needs_criu: None, tmp_path: Path) -> None:
    (which, _), (tried, how) = await found(checks.criu, subject(tmp_path))
    assert (which, tried, how) == (OK, OK, "criu check misses nothing, and it works in a sandbox")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("version", "says"), [("", "no `criu` beside this Python or on PATH"), ("3.17.1", "is CRIU 3.17.1")])
async def test_no_criu_or_an_old_one(version: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    if version:
        (tmp_path / "criu").write_text(f"#!/bin/sh\necho Version: {version}\n")
        (tmp_path / "criu").chmod(0o755)
    (finding,) = await checks.criu(subject(tmp_path))
    assert finding.outcome is FAILS
    assert says in finding.found
    assert "4.2 or later" in finding.remedy


async def test_what_criu_check_misses_is_told(needs_criu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "criu").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && { echo Version: 4.2; exit; }\necho "Error (cr-check.c:1): no timer slack" >&2\nexit 1\n'
    )
    (tmp_path / "criu").chmod(0o755)
    (_, _), (outcome, text) = await found(checks.criu, subject(tmp_path))
    assert (outcome, text) == (FAILS, "Error (cr-check.c:1): no timer slack")


# --- the state folder and its disk


def outcomes(findings: Sequence[Finding]) -> list[Outcome]:
    return [finding.outcome for finding in findings]


def test_a_state_folder_that_is_not_there_yet_is_fine(tmp_path: Path) -> None:
    first, room = checks.state_folder(subject(tmp_path / "not/yet"))
    assert (first.outcome, first.found) == (OK, f"{tmp_path}/not/yet is not there yet: it is made at the first start")
    assert room.of == "room"
    assert list(tmp_path.iterdir()) == []


def test_a_state_folder_that_is_none_or_open_to_others(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert outcomes(checks.state_folder(subject(tmp_path / "file"))) == [FAILS]
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    first, _ = checks.state_folder(subject(tmp_path / "open"))
    assert (first.outcome, first.remedy) == (WARNING, f"chmod go-w {tmp_path}/open")
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o777


async def test_a_state_folder_in_use_names_who(agent: Agent) -> None:
    first, _ = checks.state_folder(subject(agent.state))
    assert first.outcome is OK
    assert "in use by pid" in first.found


def in_own_mounts(options: str, folder: Path, *arguments: str) -> list[str]:
    """`zerowake doctor` beside a tmpfs that nobody else sees."""
    program = f"mount -t tmpfs -o {options} tmpfs {folder} && exec {sys.executable} -m scaler.programs.cli doctor {' '.join(arguments)}"
    return ["unshare", "--mount", "sh", "-c", program]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount")
@pytest.mark.parametrize(
    ("options", "says", "disk"),
    [("ro", "is on a file system that is read-only", "cannot be written from here"), ("size=1m", "too little for a snapshot", "is full")],
)
async def test_a_state_folder_on_a_disk_that_is_full_or_read_only(options: str, says: str, disk: str, tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *in_own_mounts(options, tmp_path, "--machine", "--state", str(tmp_path)), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode == 1
    lines = out.decode().splitlines()
    assert any(line.startswith("fails") and says in line for line in lines), out.decode()
    assert any(line.startswith("warning") and disk in line for line in lines), out.decode()


def test_the_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    (finding,) = checks.disk(subject(tmp_path / "not" / "yet"))
    assert "MB/s" in finding.found or "has no direct I/O" in finding.found
    assert list(tmp_path.iterdir()) == []


def test_a_slow_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_timed", lambda move, most: (most, 100e6))
    (finding,) = checks.disk(subject(tmp_path))
    if "direct I/O" not in finding.found:
        assert finding.outcome is WARNING
        assert finding.found.endswith("cache: 11 s for each GiB that is not in memory")


# --- keys and snapshots


def test_keys(tmp_path: Path) -> None:
    assert checks.keys(subject(tmp_path))[0].found.startswith("none yet")
    keyring = Keyring(tmp_path / "keys")
    mine = keyring.make()
    (finding,) = checks.keys(subject(tmp_path))
    assert (finding.outcome, finding.found) == (OK, f"{mine} signs; 1 trusted, 0 revoked; stores are not encrypted")
    (tmp_path / "keys/signing.pem").unlink()
    assert outcomes(checks.keys(subject(tmp_path))) == [WARNING]
    (tmp_path / "keys/encryption.key").write_text("torn")
    (finding,) = checks.keys(subject(tmp_path))
    assert (finding.outcome, "is no key" in finding.found) == (FAILS, True)
    (finding,) = checks.keys(subject(tmp_path, keys=tmp_path / "empty"))
    assert (finding.outcome, "holds no key" in finding.found) == (FAILS, True)


def test_a_snapshot_that_cannot_be_restored_is_told(state: Path) -> None:
    (finding,) = checks.snapshots(subject(state))
    assert (finding.outcome, finding.found) == (OK, "1 of 1 can be restored here")
    (manifest,) = (state / "snapshots").glob("*/manifest.json")
    manifest.write_text(manifest.read_text() + " ")
    count, unfit = checks.snapshots(subject(state))
    assert count.found == "0 of 1 can be restored here"
    assert (unfit.outcome, unfit.of) == (FAILS, "default/small")
    assert checks.snapshots(subject(state / "nowhere"))[0].found == "none yet"


# --- GPUs and engines


@pytest.mark.parametrize(("driver", "outcome"), [("570.86", OK), ("535.104", FAILS)])
def test_a_driver_that_suspends_nothing_fails(driver: str, outcome: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml(["GPU-00000000-0000-0000-0000-000000000001"], {})
    monkeypatch.setattr(nvml, "nvmlSystemGetDriverVersion", lambda: driver, raising=False)
    there = Cuda(Driver(["GPU-00000000-0000-0000-0000-000000000001"], []), nvml)
    monkeypatch.setattr(Cuda, "find", lambda: there)
    (finding,) = checks.gpus(subject(Path("/nowhere")))
    assert (finding.outcome, driver in finding.found) == (outcome, True)


def test_gpus_that_cannot_be_used_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise CudaError("this node has a GPU but pynvml is missing; install zerowake with its extra `gpu`")

    monkeypatch.setattr(Cuda, "find", broken)
    (finding,) = checks.gpus(subject(Path("/nowhere")))
    assert (finding.outcome, finding.remedy) == (FAILS, "install zerowake with its extra `gpu`")
    monkeypatch.setattr(Cuda, "find", lambda: None)
    (finding,) = checks.gpus(subject(Path("/nowhere")))
    assert (finding.outcome, "engines on the CPU" in finding.found) == (OK, True)


def test_engines_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "none of" in checks.engines(subject(tmp_path))[0].found
    (tmp_path / "llama-server").touch(0o755)
    assert checks.engines(subject(tmp_path))[0].found == str(tmp_path / "llama-server")


# --- the store


async def test_a_bucket_that_answers_is_away_or_refuses(s3: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await checks.store(subject(tmp_path)) == []
    url = f"s3://{bucket}/fleet"
    assert await found(checks.store, subject(tmp_path, store=url)) == [(OK, f"{url} answers: 0 names")]
    ((outcome, _),) = await found(checks.store, subject(tmp_path, store="s3://there-is-none"))
    assert outcome is FAILS
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    ((outcome, said),) = await found(checks.store, subject(tmp_path, store=url))
    assert outcome is FAILS
    assert "SignatureDoesNotMatch" in said or "refuse" in said, said


async def test_doctor_says_so_on_the_command_line(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "zerowake.yaml").write_text(
        f"state: state\nlisten: 127.0.0.1:0\nstore: s3://{bucket}\nmodels: {{m: {{snapshot: m, command: [sh], port: 8000}}}}\n"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "scaler.programs.cli", "doctor", "--machine", "-o", "json", str(tmp_path / "zerowake.yaml")),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    (line,) = [each for each in json.loads(out)["checks"] if each["check"] == "store"]
    assert (line["outcome"], line["found"]) == ("ok", f"s3://{bucket} answers: 0 names")
