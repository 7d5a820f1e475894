"""What a program prints whose output is the agent's. It owns the pipes: a log file that grew after a dump would spoil its restore."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence

_LOG = logging.getLogger("zerowake.engine")
_KEPT_LINES = 400
_TOLD_LINES, _TOLD_CAUSES = 8, 2
_RAISED = re.compile(r"\b[A-Za-z_.]*(?:Error|Exception): \S.*")  # as Python ends a traceback


def in_short(lines: Sequence[str]) -> str:
    """For a single line: the last exceptions that a program has printed, else its last words. Of an engine of several processes the last
    exception only says that another process has failed."""
    raised = list(dict.fromkeys(found[0] for line in lines if (found := _RAISED.search(line))))
    words = [line.strip() for line in lines if line.strip()]
    return " / ".join(raised[-_TOLD_CAUSES:] or words[-_TOLD_CAUSES:])


class Pipes:
    """An Output of two pipes, for stdout and stderr, drained for as long as this lives; the last lines are kept for error texts."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._partial: dict[int, bytes] = {}
        self._loop = asyncio.get_running_loop()
        self._writers: list[int] = []
        try:
            for _ in range(2):
                reader, writer = os.pipe()
                os.set_blocking(reader, False)
                self._partial[reader] = b""
                self._writers.append(writer)
                self._loop.add_reader(reader, self._drain, reader)
        except OSError:
            self.close()
            raise
        # The names that an image knows these pipes by.
        self.keys = (self._key(0), self._key(1))

    @contextlib.contextmanager
    def writers(self) -> Iterator[list[int]]:
        """The ends to hand to the program; closed here afterwards, so that its end is seen."""
        try:
            yield list(self._writers)
        finally:
            for writer in self._writers:
                os.close(writer)
            self._writers.clear()

    def lines(self) -> list[str]:
        """The last lines, so many as are kept."""
        for reader in list(self._partial):
            self._drain(reader)
        return [*self._lines, *(part.decode(errors="replace") for part in self._partial.values() if part)]

    def tail(self) -> str:
        """The last few lines, each led by a newline, or nothing. Before them stand the exceptions that were printed earlier: where an
        engine of several processes ends, the last lines are of one that only says that another has failed."""
        lines = [line.rstrip("\r") for line in self.lines()]
        last = lines[-_TOLD_LINES:]
        causes: dict[str, str] = {}
        for line in lines[:-_TOLD_LINES]:
            if (raised := _RAISED.search(line)) and not any(raised[0] in each for each in last):
                causes[raised[0]] = line
        return "".join(f"\n  {self.name}: {line}" for line in [*list(causes.values())[-_TOLD_CAUSES:], *last])

    def close(self) -> None:
        for writer in self._writers:
            os.close(writer)
        self._writers.clear()
        for reader in list(self._partial):
            self._drain(reader)
            self._forget(reader)

    def _key(self, which: int) -> str:
        return f"pipe:[{os.fstat(self._writers[which]).st_ino}]"

    def _drain(self, reader: int) -> None:
        try:
            data = os.read(reader, 1 << 16)
        except BlockingIOError:
            return
        if not data:
            self._forget(reader)
            return
        *lines, self._partial[reader] = (self._partial[reader] + data).split(b"\n")
        self._partial[reader] = self._partial[reader][-(1 << 16) :]
        for line in lines:
            text = line.decode(errors="replace")
            self._lines.append(text)
            _LOG.info("%s: %s", self.name, text)

    def _forget(self, reader: int) -> None:
        if (rest := self._partial.pop(reader, None)) is not None:
            if rest:
                self._lines.append(rest.decode(errors="replace"))
            self._loop.remove_reader(reader)
            os.close(reader)
