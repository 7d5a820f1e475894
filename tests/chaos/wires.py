"""Connections between the programs, and how each is cut, slow, silent, refused or half-open.

The store's goes through a proxy, and so does a machine's own to its agent, whose socket the proxy's is put in the place of. An engine's is
spoiled in the engine's own network, by what the kernel has for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

from tests.chaos.proxy import Proxy

WIRES = "s3", "agent", "engine"
_LOOK_SECONDS = 0.005  # a program that begins connects sooner than any stream could tell of its socket
_RULES = "table inet chaos {{ chain in {{ type filter hook input priority 0; tcp dport {port} {dport}; tcp sport {port} {sport}; }}; }}"


@contextlib.asynccontextmanager
async def between(agent: Path, proxy: Proxy) -> AsyncIterator[None]:
    """Has the proxy's socket in the place of the agent's, whenever there is another agent, until the block ends."""
    ours, new, behind = (agent.with_name(f"{name}.sock") for name in ("wire", "new-wire", "behind-wire"))
    proxy.target = behind

    async def keep() -> None:
        while True:
            # Without a gap; a disk that is full has no room for it, and the agent may end meanwhile.
            with contextlib.suppress(OSError):
                if agent.stat().st_ino != ours.stat().st_ino:
                    for each in (new, behind):
                        each.unlink(missing_ok=True)
                    behind.hardlink_to(agent)
                    new.hardlink_to(ours)
                    new.rename(agent)
            await asyncio.sleep(_LOOK_SECONDS)

    async with proxy.laid(ours):
        ours.chmod(0o600)
        keeping = asyncio.create_task(keep())
        try:
            yield
        finally:
            keeping.cancel()


class EngineWire:
    """The connections to an engine, in its own network. What is done to them says whether anybody may have felt it."""

    def __init__(self, network: str, port: int) -> None:
        """network: the path of its namespace. Raises OSError: it is gone."""
        self._port = port
        self._network = os.open(network, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._network)

    def cut(self) -> bool:
        """And both ends hear of it."""
        return bool(self._connections("dport", "--kill"))

    def slow(self) -> bool:
        self._run("tc", "qdisc", "add", "dev", "lo", "root", "tbf", "rate", "16kbit", "burst", "4kb", "latency", "5s")
        return True

    def silence(self) -> bool:
        self._filter("drop", "drop")
        return True

    def refuse(self) -> bool:
        """No new one, and none that is there goes on."""
        self.cut()
        self._filter("reject with tcp reset", "accept")
        return True

    def half_open(self) -> bool:
        """The engine's end is gone, and nobody hears of it: not until somebody sends something after it is healed."""
        self._filter("drop", "drop")
        return bool(self._connections("sport", "--kill"))

    def heal(self) -> None:
        self._run("nft", "delete", "table", "inet", "chaos")
        self._run("tc", "qdisc", "del", "dev", "lo", "root")

    def _connections(self, whose: str, *more: str) -> str:
        """Ends of them, a line each. whose: `sport`, the engine's, or `dport`, of whoever asks."""
        return self._run("ss", "-H", "-t", "-n", *more, f"{whose} = :{self._port}")

    def _filter(self, dport: str, sport: str) -> None:
        self._run("nft", _RULES.format(port=self._port, dport=dport, sport=sport))

    def _run(self, *command: str) -> str:
        network = f"--net=/proc/self/fd/{self._network}"
        ran = subprocess.run(["nsenter", network, *command], pass_fds=[self._network], capture_output=True, text=True, check=False)
        return ran.stdout
