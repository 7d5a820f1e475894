"""The forecast of a replica that has run for longer, for one that is new: by itself it would learn again for days.

All replicas see all demand, so what the eldest knows is what this one would have seen. It is asked once, as soon as it is heard of; where
every replica is new, each learns by itself. So what was learned survives as long as one replica does, as in every rolling upgrade.
Rejected: a ConfigMap, which holds a megabyte, and a volume, which every replica would need.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import grpc
from zerowake_proto import peers_pb2 as pb
from zerowake_proto import peers_pb2_grpc as pb_grpc

from scaler.fleet.member import Hearing, Member
from scaler.fleet.peers import Peers
from zerowake_shared.tls import BadCertificate

log = logging.getLogger(__name__)

_SECONDS = 60.0
_MOST_BYTES = 512 << 20  # 10,000 models take some 10 MB


async def inherit(peers: Peers, adopt: Callable[[bytes], Awaitable[bool]]) -> None:
    """Returns once `adopt` has taken what an elder replica told, or was told that this one knows as much. `adopt` may raise ValueError."""
    changed = asyncio.Event()
    peers.on_members(changed.set)
    asked: set[str] = set()
    while True:
        changed.clear()
        elders = [each for each in peers.members() if each.hearing is Hearing.HEARD and 0 < each.born < peers.born]
        for elder in sorted(elders, key=lambda each: each.born):
            if elder.instance not in asked and await _inherited(peers, elder, adopt, asked):
                return
        await changed.wait()


async def _inherited(peers: Peers, elder: Member, adopt: Callable[[bytes], Awaitable[bool]], asked: set[str]) -> bool:
    try:
        async with asyncio.timeout(_SECONDS):
            content = await _told(peers, elder.address)
        asked.add(elder.instance)
        adopted = await adopt(content)
    except (grpc.aio.AioRpcError, BadCertificate, TimeoutError, ValueError) as error:
        why: object = error
        if isinstance(error, grpc.aio.AioRpcError):
            why = error.details()
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:  # an earlier version
                asked.add(elder.instance)
        log.warning("what the replica at %s has learned cannot be taken over (%s): the forecast learns by itself", elder.address, why)
        return False
    if adopted:
        log.info("what the replica at %s has learned is taken over: %d bytes", elder.address, len(content))
    return True


async def _told(peers: Peers, address: str) -> bytes:
    pieces, size = [], 0
    async with peers.channel(address) as channel:
        async for piece in pb_grpc.PeersStub(channel).Forecast(pb.ForecastRequest()):
            pieces.append(piece.data)
            size += len(piece.data)
            if size > _MOST_BYTES:
                raise ValueError(f"it is more than {_MOST_BYTES >> 20} MiB")
    return b"".join(pieces)
