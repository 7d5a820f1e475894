"""Pins that no model of zerowake.yaml wishes any more: of one that was taken out of the file, the plan says nothing.

They are taken back once, when the agent is heard; while this runs the file does not change.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection

from scaler.books.snapshot_name import SnapshotName
from scaler.fleet.agent import AgentError, AgentUnreachable
from scaler.fleet.nodes import Nodes
from scaler.plan.rungs import Rung
from zerowake_shared.backoff import Backoff

log = logging.getLogger(__name__)

_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 0.5, 30.0


async def take_back(nodes: Nodes, address: str, named: Collection[SnapshotName]) -> None:
    """Those of the agent at that address, of snapshots that are not `named`. Returns when none is left, or the agent refuses."""
    agent = nodes.agent(address)
    assert agent is not None
    backoff = Backoff(_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS)
    while True:
        await agent.synced.wait()
        left = [(name, each.digest) for name, each in agent.residencies.items() if each.pinned > Rung.ABSENT and name not in named]
        try:
            for name, digest in left:
                await agent.pin(name, digest, Rung.ABSENT)
                log.info("snapshot %s is not pinned any more: no model has it", name)
            return
        except AgentUnreachable:
            await asyncio.sleep(backoff.next())
        except AgentError as error:
            log.warning("snapshot %s stays pinned, though no model has it any more: %s", name, error)
            return
