"""Random state that is made anew: in this process and in programs of its own, and what the agent knows and says of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from restore_agent.engine import renewal as agents
from restore_agent.places.processes import descendants
from restore_agent.workload import renewal
from restore_agent.workload.renewal import KEEP_SEEDS, RESTORE_COMPLETE, Return, renew
from tests.worlds.device import ROOT

PATIENCE = 30
PROGRAM = """
import json, os, random, ssl, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from restore_agent.workload.renewal import Return, renew
import numpy.random
random.seed(1); numpy.random.seed(1)
done = renew(Return(bytes(32), None, True))
print(json.dumps([done, random.random(), float(numpy.random.random())]))
"""


def ran(env: dict[str, str] | None = None) -> Any:
    program = PROGRAM.format(root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=PATIENCE, env=os.environ | (env or {}))
    return json.loads(done.stdout)


def test_generators_are_new_each_time_though_the_entropy_is_the_same() -> None:
    (done, *first), (_, *second) = ran(), ran()
    assert {name for name, what in done.items() if what == "new"} >= {"random", "numpy.random"}
    assert any("libcrypto" in name or name == "ssl" for name in done)
    assert all(one != other for one, other in zip(first, second, strict=True)), "processes of one engine are told the same"


def test_seeds_stay_where_that_is_asked_for() -> None:
    (done, *first), (_, *second) = ran({KEEP_SEEDS: "1"}), ran({KEEP_SEEDS: "1"})
    assert done["random"] == done["numpy.random"] == f"left: {KEEP_SEEDS} is set"
    assert first == second


@pytest.mark.parametrize(("seed", "stays"), [(0, True), (2**32 - 1, True), (2**32, False), (2**63, False)])
def test_a_seed_that_torch_was_given_stays(seed: int, stays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says by what it was seeded; the three are seeded together."""
    seeds: list[int] = []
    torch = SimpleNamespace(initial_seed=lambda: seed, manual_seed=seeds.append)
    generators = types.ModuleType("random")
    generators.seed = lambda by: seeds.append(len(by))  # type: ignore[attr-defined]
    for name, module in (("torch", torch), ("random", generators), ("numpy.random", None)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(renewal, "_openssl", dict)
    done = [renew(Return(b"e" * 32, None, True)) for _ in range(2)]
    if stays:
        assert (seeds, done[0]["random"]) == ([], f"left: torch was seeded by {seed}")
    else:
        assert seeds == [64, seeds[1], 64, seeds[1]], "all ranks of an engine come to the same"
        assert seeds[1] >= 2**32, "it is not taken for one that was given"


def test_one_generator_that_refuses_keeps_no_other_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(seed: bytes) -> None:
        raise RuntimeError("it is locked")

    monkeypatch.setattr(renewal, "_openssl", lambda: {"locked": refuses, "well": len})
    monkeypatch.setitem(sys.modules, "random", None)
    done = renew(Return(b"e" * 32, None, True))
    assert (done["locked"], done["well"]) == ("left: RuntimeError('it is locked')", "new")


def test_what_is_said_of_a_return_is_read_as_it_was_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Return.read(tmp_path)
    said = Return.fresh(12.34567, restored=False)
    (tmp_path / RESTORE_COMPLETE).write_text(said.encode())
    assert Return.read(tmp_path) == Return(said.entropy, 12.346, False)
    for others in ("", "{}", "[]", '{"entropy": 1}'):  # NVIDIA's agent writes nothing
        (tmp_path / RESTORE_COMPLETE).write_text(others)
        read = Return.read(tmp_path)
        assert (read.away_seconds, read.restored, len(read.entropy)) == (None, True, 32)
        assert read.entropy != Return.read(tmp_path).entropy


def test_only_processes_of_the_engine_are_awaited_and_only_one_signal_is_sent(tmp_path: Path) -> None:
    for name, content in (
        ("renews-7-node", "SIGURG"),
        ("renews-8-openssl", ""),
        ("renews-9-python", "SIGKILL"),
        ("renews-10-python", ""),  # it has ended
        ("renews-x-python", ""),
        (".renews-7-python", ""),
    ):
        (tmp_path / name).write_text(content)
    (tmp_path / "renews-7-link").symlink_to(tmp_path / "renews-7-node")
    found = agents.announced(tmp_path, {7, 8, 9})
    assert set(found) == {(7, "link", ""), (7, "node", "SIGURG"), (8, "openssl", ""), (9, "python", "")}
    (tmp_path / agents.RENEWAL_FILE).write_bytes(agents.encode(found))
    assert set(agents.read(tmp_path)) == set(found)
    assert agents.read(tmp_path / "none") == ()
    assert agents.awaited(found, tmp_path) == []
    (tmp_path / "renews-8-openssl").unlink()
    assert agents.awaited(found, tmp_path) == [(8, "openssl", "")]


def test_the_signal_reaches_who_wants_it_and_nobody_else() -> None:
    program = "import signal; signal.pthread_sigmask(0, [signal.SIGURG]); print(flush=True); print(signal.sigwait([signal.SIGURG]))"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        agents.send([(7, "node", ""), (9, "node", "SIGURG")], {7: process.pid}.get)
        agents.send([(7, "node", "SIGURG")], {7: process.pid}.get)
        assert int(process.stdout.read()) == signal.SIGURG


def test_a_note_names_who_keeps_state_and_does_not_say_that_it_is_made_anew() -> None:
    program = "import ssl; print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdin
        process.stdout.readline()
        try:
            hosts = descendants(process.pid)
            (pid,) = hosts
            told = agents.note(hosts, [], is_sandbox=True)
            assert f"Python's random of pid {pid}" in told and "Take it with --renew, or have it draw anew" in told
            assert ". Have it draw anew" in agents.note(hosts, [], is_sandbox=False), "nothing is laid out in pods"
            assert "OpenSSL" not in agents.note(hosts, [(pid, "python", "")], is_sandbox=True)
            assert agents.note(hosts, [(pid, "python", "")], is_sandbox=True) == ""
        finally:
            process.stdin.close()
    with subprocess.Popen(["sleep", "infinity"]) as process:
        try:
            assert agents.note({7: process.pid}, [], is_sandbox=True) == ""
        finally:
            process.kill()
    assert agents.note({7: process.pid}, [], is_sandbox=True) == "", "it has ended"
