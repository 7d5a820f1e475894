"""The engine's side of the control directory, spoken to as the agent speaks: files under temporary names, renamed."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from restore_agent.workload import renewal
from restore_agent.workload.control_directory import (
    ANSWER_DOOR,
    ANSWERS,
    FAILED,
    GPUS,
    QUIESCE_REQUESTED,
    READY,
    RENEWAL_REQUESTED,
    RESTORE_COMPLETE,
    SNAPSHOT_COMPLETE,
    VARIABLE,
    WAKE_BYTES,
    WEIGHTS,
    ControlDirectory,
)
from restore_agent.workload.renewal import Return
from tests.worlds.waiting import blocking_until

PATIENCE = 10.0


class Ended(Exception):
    """The engine's process is over, as far as a test is concerned."""


class FakeEngine:
    """What the protocol asks of an engine, in order; it ends when `last` words are done."""

    def __init__(self, folder: Path, rounds: int) -> None:
        self.folder = folder
        self.said: list[object] = []
        self.ready_at_quiesce: list[bool] = []
        self._rounds = rounds
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            ControlDirectory(self.folder).take_part(self.quiesce, self.resume)
        except Ended:
            self.said.append("ended")

    def quiesce(self) -> None:
        self.ready_at_quiesce.append((self.folder / READY).exists())
        self.said.append("quiesce")

    def resume(self, moved: Mapping[str, str]) -> None:
        self.said.append(dict(moved))
        self._rounds -= 1
        if not self._rounds:
            raise Ended


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Callable[[int], FakeEngine]]:
    made: list[FakeEngine] = []

    def make(rounds: int) -> FakeEngine:
        made.append(FakeEngine(tmp_path, rounds))
        return made[-1]

    yield make
    for each in made:
        each.thread.join(PATIENCE)
        assert not each.thread.is_alive()


def tell(folder: Path, word: str, content: str = "") -> None:
    fresh = folder / f".{word}"
    fresh.write_text(content)
    fresh.rename(folder / word)


def test_both_sides_use_the_same_words() -> None:
    assert (VARIABLE, READY) == ("SNAPSHOT_CONTROL_DIR", "ready-for-snapshot")
    assert (SNAPSHOT_COMPLETE, RESTORE_COMPLETE) == ("snapshot-complete", "restore-complete")
    assert set(ANSWERS) == {SNAPSHOT_COMPLETE, RESTORE_COMPLETE}


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_engine_is_ready_after_it_has_quiesced_and_resumes_at_the_answer(
    engine: Callable[[int], FakeEngine], tmp_path: Path, answer: str
) -> None:
    one = engine(1)
    blocking_until((tmp_path / READY).exists)
    assert one.said == ["quiesce"] and one.ready_at_quiesce == [False]
    tell(tmp_path, answer)
    one.thread.join(PATIENCE)
    assert one.said == ["quiesce", {}, "ended"]


def test_an_engine_becomes_ready_again_when_it_is_asked(engine: Callable[[int], FakeEngine], tmp_path: Path) -> None:
    one = engine(3)
    for _ in range(2):
        blocking_until((tmp_path / READY).exists)
        tell(tmp_path, RESTORE_COMPLETE)
        blocking_until(lambda: one.said[-1] == {})
        for word in (READY, *ANSWERS):
            (tmp_path / word).unlink(missing_ok=True)
        tell(tmp_path, QUIESCE_REQUESTED)
        blocking_until((tmp_path / READY).exists)
        (tmp_path / QUIESCE_REQUESTED).unlink()
    assert one.said == ["quiesce", {}, "quiesce", {}, "quiesce"]
    tell(tmp_path, RESTORE_COMPLETE)


def test_gpus_that_moved_are_told_once(engine: Callable[[int], FakeEngine], tmp_path: Path) -> None:
    one = engine(2)
    blocking_until((tmp_path / READY).exists)
    tell(tmp_path, GPUS, json.dumps({"GPU-a": "GPU-b", "GPU-b": "GPU-a"}))
    tell(tmp_path, RESTORE_COMPLETE)
    blocking_until(lambda: len(one.said) == 2)
    for word in (READY, RESTORE_COMPLETE):
        (tmp_path / word).unlink()
    tell(tmp_path, QUIESCE_REQUESTED)
    blocking_until((tmp_path / READY).exists)
    tell(tmp_path, RESTORE_COMPLETE)
    one.thread.join(PATIENCE)
    assert one.said == ["quiesce", {"GPU-a": "GPU-b", "GPU-b": "GPU-a"}, "quiesce", {}, "ended"]


def test_a_restored_engine_renews_once_while_it_sleeps_and_not_as_it_wakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def renew(back: Return) -> dict[str, str]:
        done.append(back.entropy.hex())
        return {}

    monkeypatch.setattr(renewal, "renew", renew)
    is_over = threading.Event()
    os.mkfifo(tmp_path / ANSWER_DOOR)

    def resume(moved: Mapping[str, str]) -> None:
        done.append("resumed")
        is_over.set()
        raise Ended

    def take_part() -> None:
        with contextlib.suppress(Ended):
            ControlDirectory(tmp_path).take_part(lambda: None, resume, lambda: done.append("others"))

    thread = threading.Thread(target=take_part, daemon=True)
    thread.start()
    blocking_until((tmp_path / READY).exists)
    announced = tmp_path / f"{renewal.ANNOUNCED}{os.getpid()}-{renewal.PYTHON}"
    announced.unlink()  # it is in another folder now, as one that was restored
    asked, woken = Return.fresh(1.0, restored=True), Return.fresh(2.0, restored=True)
    tell(tmp_path, RENEWAL_REQUESTED, asked.encode())
    door = os.open(tmp_path / ANSWER_DOOR, os.O_RDWR | os.O_NONBLOCK)
    blocking_until(announced.exists)
    os.close(door)
    assert not is_over.is_set()
    tell(tmp_path, RESTORE_COMPLETE, woken.encode())
    door = os.open(tmp_path / ANSWER_DOOR, os.O_RDWR | os.O_NONBLOCK)
    assert is_over.wait(PATIENCE)
    os.close(door)
    thread.join(PATIENCE)
    assert done == ["others", asked.entropy.hex(), "resumed"]


def test_an_engine_that_cannot_quiesce_is_never_ready(tmp_path: Path) -> None:
    def refuse() -> None:
        raise Ended

    with pytest.raises(Ended):
        ControlDirectory(tmp_path).take_part(refuse, lambda moved: None)
    assert not list(tmp_path.iterdir())


def test_an_engine_whose_thread_fails_ends_and_says_why(tmp_path: Path) -> None:
    program = (
        "import time; from pathlib import Path; from restore_agent.workload.control_directory import ControlDirectory\n"
        "def quiesce(): raise RuntimeError('still mapped')\n"
        f"ControlDirectory(Path({str(tmp_path)!r})).start(quiesce, print)\n"
        "time.sleep(60)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == FAILED
    assert "still mapped" in ended.stderr


def test_weights_are_named_each_once(tmp_path: Path) -> None:
    directory = ControlDirectory(tmp_path)
    for name in ("/model", "/draft", "/model"):
        directory.name_weights(Path(name))
    assert json.loads((tmp_path / WEIGHTS).read_text()) == {"directories": ["/model", "/draft"]}
    directory.name_weights("/rank-1", "GPU-b")
    assert json.loads((tmp_path / WEIGHTS).read_text()) == {"directories": ["/model", "/draft", "/rank-1"], "gpus": {"/rank-1": "GPU-b"}}
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]


def test_what_a_wake_takes_again_is_said_anew_by_each_process(tmp_path: Path) -> None:
    of_another = tmp_path / f"{WAKE_BYTES}1-GPU-a-7"
    of_another.touch()
    for gpu, size in (("GPU-a", 3), ("GPU-a", 5), ("GPU-b", 4)):
        ControlDirectory(tmp_path).name_wake_bytes(gpu, size)
    assert set(tmp_path.iterdir()) == {of_another, tmp_path / f"{WAKE_BYTES}{os.getpid()}-GPU-b-4"}


def test_without_the_variable_nobody_wants_a_snapshot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert ControlDirectory.from_environment() is None
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    found = ControlDirectory.from_environment()
    assert found is not None
    found.name_weights(Path("/model"))
    assert (tmp_path / WEIGHTS).exists()
