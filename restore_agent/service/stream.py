"""The stream of one node, for one who listens: all that it has, then what changes, and how it is in itself every other second.

A snapshot or replica that changes is told at once, and nothing else is told with it. So is the node itself where a GPU of it has much more
or less free than was told. What is on its way is looked at a few times a second
and told as far as it has come since: so a listener who is slow hears of it less often, and nothing waits for him. Its end is told before
the next word about anything else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

from zerowake_proto import agent_pb2

from restore_agent.sequences.changes import Change, Removed
from restore_agent.sequences.inventory import Gpu, Transfer
from restore_agent.sequences.node import Node
from restore_agent.sequences.replicas import Replica, State
from restore_agent.service import messages
from restore_agent.snapshots.catalog import Snapshot
from restore_agent.transfer.progress import Progress
from zerowake_shared.clock import SYSTEM_CLOCK, Clock

_NODE_SECONDS = 2.0  # between two words about the node itself: who hears none for longer takes the agent for lost
_LOOK_SECONDS = 0.25  # between two words about what is on its way, and two looks at what is free on GPUs
_GPU_SHARE = 0.01  # of all that a GPU has: by less than that may differ what was told


class Stream:
    """Use `updates` once."""

    def __init__(self, node: Node, clock: Clock = SYSTEM_CLOCK) -> None:
        self._node = node
        self._clock = clock
        self._moving: dict[Transfer, Progress] = {}  # as it was told last
        self._gpus: list[Gpu] = []  # the same

    async def updates(self) -> AsyncIterator[agent_pb2.NodeUpdate]:
        """Without end."""
        node = self._node
        with node.changes.heard() as changes:
            yield self._itself()
            for found in await asyncio.to_thread(node.store.list):
                yield agent_pb2.NodeUpdate(residency=messages.listed(node, found))
            for replica in node.replicas:
                if replica.state is not State.GONE:
                    yield agent_pb2.NodeUpdate(replica=messages.replica(replica))
            for update in self._transfers():
                yield update
            yield agent_pb2.NodeUpdate(synced=True)
            node_due = self._clock.now() + _NODE_SECONDS
            look_due = self._clock.now() + _LOOK_SECONDS
            while True:
                change: Change | None = None
                try:
                    async with asyncio.timeout(min(node_due, look_due) - self._clock.now()):
                        change = await changes.get()
                except TimeoutError:
                    pass
                for update in self._ended():
                    yield update
                if change is not None and (told := self._told(change)):
                    yield told
                is_other = False
                if self._clock.now() >= look_due:
                    for update in self._transfers():
                        yield update
                    is_other = self._has_other_room()
                    look_due = self._clock.now() + _LOOK_SECONDS
                if is_other or self._clock.now() >= node_due:
                    yield self._itself()
                    node_due = self._clock.now() + _NODE_SECONDS

    def _itself(self) -> agent_pb2.NodeUpdate:
        self._gpus = self._node.inventory.gpus
        return agent_pb2.NodeUpdate(node=messages.node(self._node))

    def _has_other_room(self) -> bool:
        """On a GPU, than was told."""
        told = {gpu.uuid: gpu.free_bytes for gpu in self._gpus}
        return any(abs(gpu.free_bytes - told.get(gpu.uuid, 0)) > _GPU_SHARE * gpu.total_bytes for gpu in self._node.inventory.gpus)

    def _told(self, change: Change) -> agent_pb2.NodeUpdate | None:
        """None: it is of a snapshot that another has replaced, and what is said of that one counts. Of one that is removed all there is to
        say is that it is gone, whatever changed in it (its image had come into memory at last, a standby of it had ended).
        """
        if isinstance(change, Replica):
            return agent_pb2.NodeUpdate(replica=messages.replica(change))
        changed = change.snapshot if isinstance(change, Removed) else change
        absent = messages.removed(changed, self._node.changes.revision())
        named = self._node.store.named(absent.snapshot.namespace, absent.snapshot.name)
        if not named:
            return agent_pb2.NodeUpdate(residency=absent)
        if isinstance(changed, Snapshot) and changed.digest != named:
            return None
        return agent_pb2.NodeUpdate(residency=messages.listed(self._node, changed))

    def _transfers(self) -> Iterator[agent_pb2.NodeUpdate]:
        """Those that have come further."""
        for transfer, progress in self._node.inventory.transfers().items():
            if self._moving.get(transfer) != progress:
                self._moving[transfer] = progress
                yield agent_pb2.NodeUpdate(transfer=messages.transfer(transfer, progress))

    def _ended(self) -> Iterator[agent_pb2.NodeUpdate]:
        if self._moving:
            for transfer in self._moving.keys() - self._node.inventory.transfers().keys():
                del self._moving[transfer]
                yield agent_pb2.NodeUpdate(transfer=messages.transfer(transfer, None))
