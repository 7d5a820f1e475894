"""Where a process listens is told as long as it is not where it should, from real sockets in a network of their own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from restore_agent.engine import engine
from restore_agent.engine.engine import Engine, EngineError
from restore_agent.engine.listening import listens_elsewhere
from restore_agent.places.sandbox import Sandbox
from restore_agent.snapshots.manifest import EngineRecord
from tests.worlds.waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for namespaces")
LISTENER = """
import socket, sys, time
kept = []
for address, port in zip(sys.argv[1::2], sys.argv[2::2]):
    made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    made.bind((address, int(port)))
    made.listen()
    kept.append(made)
print("listens", flush=True)
time.sleep(1000)
"""


def record(*listens: str) -> EngineRecord:
    command = (sys.executable, "-c", LISTENER, *listens)
    return EngineRecord(command=command, env={"PATH": os.environ["PATH"]}, port=8000, health_path="/", ready_timeout_seconds=60)


@pytest.mark.parametrize(
    ("listens", "words"),
    [
        ((), ""),
        (("127.0.0.1", "8000"), ""),
        (("0.0.0.0", "8000"), ""),
        (("::", "8000"), ""),
        (("127.0.0.1", "9000", "0.0.0.0", "8000"), ""),
        (("::ffff:127.0.0.1", "8000"), ""),
        (("::1", "8000", "127.0.0.1", "9000"), "it listens on 127.0.0.1:9000, [::1]:8000, not on 127.0.0.1:8000"),
        (("127.0.0.2", "8000"), "it listens on 127.0.0.2:8000, not on 127.0.0.1:8000"),
    ],
)
async def test_where_it_listens_instead(tmp_path: Path, listens: tuple[str, ...], words: str) -> None:
    async with await Sandbox.create(tmp_path / "kdat") as sandbox:
        output = sandbox.output("listener")
        started = await Engine.start(record(*listens), sandbox, output, for_snapshot=False)
        await until(lambda: "listens" in output.tail())
        assert listens_elsewhere(sandbox.host_pids()[started.pid], 8000) == words
        output.close()


async def test_an_engine_that_listens_elsewhere_and_rests_is_told_so_before_its_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_MISPLACED_SECONDS", 0.5)
    async with await Sandbox.create(tmp_path / "kdat") as sandbox:
        output = sandbox.output("listener")
        started = await Engine.start(record("::1", "8000"), sandbox, output, for_snapshot=False)
        with pytest.raises(
            EngineError, match=r"was not healthy within [0-5]?\d s: it listens on \[::1\]:8000, not on 127.0.0.1:8000; give"
        ):
            await started.wait_healthy()
        output.close()


def test_of_what_has_ended_nothing_is_said() -> None:
    assert listens_elsewhere(2**22 + 1, 8000) == ""
