"""A real Prometheus with the real rules, which reads real programs: what fires there now.

It waits for nothing: an alert that is to last for minutes before it fires does so at once, and what is too long after minutes is so after
seconds. How long each lasts, tests/test_alerts.py has.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import yaml

from tests.worlds.prometheus_server import prometheus_server
from tests.worlds.rules import RULES

_PATIENCE = 60.0  # seconds
_MINUTES, _SECONDS = "zerowake_plan_staging_oldest_seconds) > 300", "zerowake_plan_staging_oldest_seconds) > 3"


@dataclass
class Alerting:
    url: str
    session: aiohttp.ClientSession

    async def firing(self) -> dict[str, list[dict[str, str]]]:
        """The labels of each alert that fires, by its name."""
        async with self.session.get(f"{self.url}/api/v1/alerts") as response:
            response.raise_for_status()
            found: dict[str, list[dict[str, str]]] = {}
            for alert in (await response.json())["data"]["alerts"]:
                if alert["state"] == "firing":
                    found.setdefault(alert["labels"]["alertname"], []).append(alert["labels"])
            return found

    async def fires(self, alert: str, **labels: str) -> None:
        """Waits until it does, with these labels."""
        await self._until(alert, labels, fires=True)

    async def is_quiet(self, alert: str, **labels: str) -> None:
        """Waits until it does not fire any more."""
        await self._until(alert, labels, fires=False)

    async def _until(self, alert: str, labels: dict[str, str], *, fires: bool) -> None:
        found: dict[str, list[dict[str, str]]] = {}
        try:
            async with asyncio.timeout(_PATIENCE):
                while True:
                    with contextlib.suppress(aiohttp.ClientError):  # it is not ready yet
                        found = await self.firing()
                        if fires == any(labels.items() <= each.items() for each in found.get(alert, [])):
                            return
                    await asyncio.sleep(0.1)  # Prometheus tells nobody
        except TimeoutError:
            raise AssertionError(f"{alert} {'did not fire' if fires else 'still fires'}; what fires: {found}") from None


@contextlib.asynccontextmanager
async def alerting(folder: Path, *targets: int | str) -> AsyncIterator[Alerting]:
    """targets: the programs that it reads, as host:port, or by a port of this machine."""
    folder.mkdir()
    text = RULES.read_text()
    assert text.count(_MINUTES) == 1
    groups = yaml.safe_load(text.replace(_MINUTES, _SECONDS))
    for group in groups["groups"]:
        for rule in group["rules"]:
            rule.pop("for", None)
    rules = folder / "rules.yaml"
    rules.write_text(yaml.safe_dump(groups))
    async with prometheus_server(folder, *targets, every="1s", rules=rules) as server, aiohttp.ClientSession() as session:
        yield Alerting(server.url, session)
