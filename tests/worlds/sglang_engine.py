"""The SGLang of tests/worlds/sglang_sources.py as a process, with or without the adapter; the test plays the agent."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from restore_agent.workload.control_directory import QUIESCE_REQUESTED, READY, RESTORE_COMPLETE
from restore_agent.workload.sglang.plugin import SGLANG_WEIGHTS
from tests.worlds.device import ROOT
from tests.worlds.ports import free_port
from tests.worlds.sglang_sources import FILES, install
from tests.worlds.waiting import blocking_until

READ = "the checkpoint is read"  # what it says when it does
STARTING = 120.0  # seconds


class SGLang:
    """Use `with SGLang.started(…) as engine`."""

    def __init__(self, folder: Path, port: int, process: subprocess.Popen[bytes]) -> None:
        self.control = folder / "control"
        self._log = folder / "engine.log"
        self._port = port
        self._process = process

    @classmethod
    @contextlib.contextmanager
    def started(
        cls, folder: Path, model: Path, gpumem: Path | None, weights: Path, *options: str, files: Mapping[str, str] = FILES
    ) -> Iterator[SGLang]:
        """`gpumem`: its socket; None: without a control directory, and so without the adapter."""
        (folder / "control").mkdir(parents=True)
        install(folder / "site", dict(files))
        port = free_port()
        env = os.environ | {"PYTHONPATH": f"{folder / 'site'}:{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        if gpumem:
            env |= {"GPUMEM_SOCKET": str(gpumem), "SNAPSHOT_CONTROL_DIR": str(folder / "control"), SGLANG_WEIGHTS: str(weights)}
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--port", str(port), *options]
        with (folder / "engine.log").open("wb") as log, subprocess.Popen(command, env=env, stdout=log, stderr=log) as process:
            engine = cls(folder, port, process)
            try:
                if gpumem:
                    engine.until_asleep()
                else:
                    blocking_until(lambda: engine.status("/health") == 200, "the engine is healthy", STARTING)
                yield engine
            finally:
                process.terminate()
                try:
                    process.wait(10)
                finally:
                    process.kill()

    @property
    def said(self) -> str:
        return self._log.read_text()

    def until_asleep(self) -> None:
        blocking_until(lambda: (self.control / READY).exists() or self._process.poll() is not None, "the engine is asleep", STARTING)
        assert self._process.poll() is None, self.said

    def ended(self) -> int:
        return self._process.wait(STARTING)

    def wake(self) -> None:
        (self.control / RESTORE_COMPLETE).touch()
        blocking_until(lambda: self.status("/health") == 200, "the engine is awake")

    def sleep(self) -> None:
        for word in (READY, RESTORE_COMPLETE):
            (self.control / word).unlink()
        (self.control / QUIESCE_REQUESTED).touch()
        self.until_asleep()
        (self.control / QUIESCE_REQUESTED).unlink()

    def status(self, path: str) -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=60) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def answers(self, *prompts: str) -> list[str]:
        return [self.ask(prompt) for prompt in prompts]

    def ask(self, prompt: str) -> str:
        request = urllib.request.Request(f"http://127.0.0.1:{self._port}/v1/completions", json.dumps({"prompt": prompt}).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(json.load(answer)["choices"][0]["text"])
