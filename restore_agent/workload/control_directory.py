"""The engine's side of the control directory (NVIDIA Snapshot's workload protocol), with the one word that is ours.

An engine that finds SNAPSHOT_CONTROL_DIR in its environment is about to be dumped:

    engine   quiesces: lets go of what is not its own, makes itself small     → writes `ready-for-snapshot`
    agent    dumps it, or has restored it                                     → writes `snapshot-complete` or `restore-complete`
    agent    parks one that was restored, before anybody asks for it          → writes `renewal-requested` (ours)
    engine   takes back what it let go of, and serves
    agent    wants it as a standby: removes those words                       → writes `quiesce-requested` (ours); the engine begins anew

`restore-complete` says how long the process was away, whether it was made of an image, and entropy for that once: renewal.py, which makes
Python's random state anew before an engine is told to resume. `renewal-requested` says the same before, while nobody waits for it.
A process that woke on other GPUs finds `gpus.json` ({"GPU-old": "GPU-new"}) beside `restore-complete`. An engine whose weights lie in a
region that it published itself names the checkpoint directory in `weights.json`, before it is ready, so that the snapshot knows them; one
that has several GPUs says on which of them each lies. It says, too, what of a GPU it let go of as it quiesced and takes again as it resumes
(`wake-bytes-PID-GPU-SIZE`, an empty file for each GPU): nobody else may have that memory by then.
A process that was restored in another pod finds `environment.json` there, the variables as they are in its own pod: what it has in its
memory is the capture pod's.
Files appear whole: a temporary name, then renamed.

Waiting costs nothing: the engine's thread stands in `open` of a FIFO, a door, which the agent opens when it has said the word. While it
stands there it has no descriptor that would be in an image, a stopped process stands there again when it goes on, and so does a restored
one, by a door of the same name where it is now: CRIU begins the call anew. A door stands open for as long as its word stands, so that no
word is missed by who comes late, and there is one for each wait, so that nobody runs through one that is still open. Rejected: inotify,
whose descriptor would be one more thing in the image; a FIFO that is read, for the same reason. An agent that makes no doors (NVIDIA's) is
polled, every millisecond while an answer is due. This file runs inside engines and imports the standard library alone; the agent takes the
words from here.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from restore_agent.workload import renewal
from restore_agent.workload.renewal import Return, announce, is_announced, renew_if_restored

VARIABLE = renewal.VARIABLE
READY = "ready-for-snapshot"
SNAPSHOT_COMPLETE, RESTORE_COMPLETE = renewal.SNAPSHOT_COMPLETE, renewal.RESTORE_COMPLETE
RENEWAL_REQUESTED = renewal.RENEWAL_REQUESTED  # ours
ANSWERS = (RESTORE_COMPLETE, SNAPSHOT_COMPLETE)
QUIESCE_REQUESTED, GPUS, WEIGHTS, ENVIRONMENT = "quiesce-requested", "gpus.json", "weights.json", "environment.json"  # ours
WAKE_BYTES = "wake-bytes-"  # ours; PID-GPU-SIZE
ANSWER_DOOR, REQUEST_DOOR = renewal.ANSWER_DOOR, "request.fifo"  # ours: one for the two answers, one for `quiesce-requested`
DOORS = {RESTORE_COMPLETE: ANSWER_DOOR, SNAPSHOT_COMPLETE: ANSWER_DOOR, QUIESCE_REQUESTED: REQUEST_DOOR}
ASLEEP_POLL_SECONDS = 0.001  # where there is no door; part of every restore there
AWAKE_POLL_SECONDS = 0.05
FAILED = 70  # exit code of an engine that could not quiesce or resume


class ControlDirectory:
    """One engine's control directory, as the engine sees it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def from_environment(cls) -> ControlDirectory | None:
        """None where nobody wants a snapshot of this process."""
        named = os.environ.get(VARIABLE)
        return cls(Path(named)) if named else None

    def start(
        self, quiesce: Callable[[], None], resume: Callable[[Mapping[str, str]], None], renew_others: Callable[[], None] = lambda: None
    ) -> None:
        """`take_part` in a thread. Where it fails, the process ends: an agent that sees it idle would dump what cannot be restored."""

        def run() -> None:
            try:
                self.take_part(quiesce, resume, renew_others)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(FAILED)

        threading.Thread(target=run, name="control-directory", daemon=True).start()

    def take_part(
        self, quiesce: Callable[[], None], resume: Callable[[Mapping[str, str]], None], renew_others: Callable[[], None] = lambda: None
    ) -> None:
        """Plays the engine's part for as long as the process lives: for a thread of its own.

        Args:
            quiesce: called first, and whenever the agent asks; nothing of the engine may work when it returns.
            resume: called with the GPUs that have others in their place, old UUID → new one; empty where none has.
            renew_others: called while the engine sleeps, before `renew` of this process: has its other processes do so. Those that it
                does not reach do it as they wake.

        Raises whatever these two raise. The engine must then end: what it says is that it cannot be dumped, or cannot go on.
        """
        while True:
            quiesce()
            announce(self._folder)
            self._write(READY, "")
            self._wait(ANSWERS, ANSWER_DOOR, ASLEEP_POLL_SECONDS, lambda: self._renew_asleep(renew_others))
            self.renew()
            resume(self.moved())
            (self._folder / GPUS).unlink(missing_ok=True)  # the next time that it wakes, other GPUs may have moved
            self._wait([QUIESCE_REQUESTED], REQUEST_DOOR, AWAKE_POLL_SECONDS)

    def renew(self) -> None:
        """Makes this process's random state anew, if it was restored (renewal.py) and has not done so: for each process of an engine that
        is told otherwise of its wake. Says so to the agent."""
        with contextlib.suppress(FileNotFoundError):  # it is the one that was dumped, and goes on as itself
            if not is_announced(self._folder):
                renew_if_restored(self._folder)
                announce(self._folder)

    def back(self) -> Return:
        """How it has come to go on, after `restore-complete`. Raises FileNotFoundError: that was not said."""
        return Return.read(self._folder)

    def announce(self) -> None:
        """That this process calls `renew` when it has woken."""
        announce(self._folder)

    def name_weights(self, directory: Path | str, gpu: str = "") -> None:
        """Adds a checkpoint directory whose region this engine has attached, on the GPU of that UUID; empty: on its only one."""
        path = self._folder / WEIGHTS
        known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"directories": []}
        if str(directory) not in known["directories"]:
            known["directories"].append(str(directory))
            if gpu:
                known.setdefault("gpus", {})[str(directory)] = gpu
            self._write(WEIGHTS, json.dumps(known))

    def name_wake_bytes(self, gpu: str, size: int) -> None:
        """That resuming takes so many bytes of the GPU of that UUID, which quiescing set free. Said anew each time it quiesces."""
        for before in self._folder.glob(f"{WAKE_BYTES}{os.getpid()}-*"):
            before.unlink(missing_ok=True)
        (self._folder / f"{WAKE_BYTES}{os.getpid()}-{gpu}-{size}").touch()

    def moved(self) -> dict[str, str]:
        """The GPUs that have others in their place, old UUID → new one: there from before the engine wakes until `resume` has returned, for
        every process of the engine."""
        try:
            found: dict[str, str] = json.loads((self._folder / GPUS).read_text())
        except FileNotFoundError:
            return {}
        return found

    def environment(self) -> dict[str, str]:
        """The environment as it is where this process runs now; before it was restored in another pod, its own."""
        try:
            found: dict[str, str] = json.loads((self._folder / ENVIRONMENT).read_text())
        except FileNotFoundError:
            return dict(os.environ)
        return found

    def _renew_asleep(self, renew_others: Callable[[], None]) -> None:
        """Once, if the agent wants it."""
        if self._has(RENEWAL_REQUESTED) and not is_announced(self._folder):
            try:
                renew_others()
            except Exception:  # they do it as they wake
                traceback.print_exc()
            self.renew()

    def _wait(self, words: Iterable[str], door: str, poll_seconds: float, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Until one of the words is there. Whatever is wrong with the door, it is polled. `meanwhile`: whenever it was open."""
        while not any(self._has(word) for word in words):
            meanwhile()
            try:
                os.close(os.open(self._folder / door, os.O_RDONLY))  # until somebody opens it for writing
            except OSError:
                time.sleep(poll_seconds)

    def _has(self, word: str) -> bool:
        return os.access(self._folder / word, os.F_OK)

    def _write(self, word: str, content: str) -> None:
        fresh = self._folder / f".{word}"
        fresh.write_text(content)
        fresh.rename(self._folder / word)
