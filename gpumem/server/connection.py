"""One connection to the server: its requests, and the leases that end with it.

Requests of one connection are answered as they are done, so a fill does not keep a release waiting. The connection is read all the time:
that it has closed is seen at once, whatever is being answered, and then everything that it asked for is stopped and given back.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol

from google.protobuf.message import DecodeError
from zerowake_proto import gpumem_pb2 as pb

from gpumem.filler.arena import Arena, ChunkSet
from gpumem.server.device import Device
from gpumem.server.filling import Filling
from gpumem.server.leases import Lease, Owner
from gpumem.server.regions import ID, Chunks, Region, State
from gpumem.wire.errors import Cancelled, Exists, Forbidden, GpumemError, Invalid, NotFound, VersionMismatch, WrongDevice, to_message
from gpumem.wire.frames import VERSION, Channel, Frame, ProtocolViolation, close_all
from zerowake_shared.lack import lack

_OUTSTANDING = 64  # requests that one connection may have open
_MOST_AT_ONCE = 256  # scratches that one request may ask for
_LONGEST_WAIT = 3600.0  # seconds that an attach may wait for its region

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """What requests are answered from: the server, without its sockets."""

    arena: Arena
    filling: Filling

    @property
    def devices(self) -> Mapping[str, Device]: ...

    def status(self, namespace: str | None) -> pb.Status:
        """Everything, or what a namespace may see."""

    async def resize(self, device: Device, wanted: int) -> int: ...

    def open_tenant(self, namespace: str) -> str:
        """Opens a namespace's socket; its path."""

    def set_quota(self, namespace: str, size: int) -> None: ...


class Connection:
    """One client at the server's end: its requests under way, and the leases that it holds."""

    def __init__(self, backend: Backend, channel: Channel, namespace: str, pid: int) -> None:
        """
        Args:
            namespace: whose socket the client connected to; "" is the operator's.
            pid: the client's, as the kernel says.
        """
        self._backend = backend
        self._channel = channel
        self._owner = Owner(namespace, pid, "")
        self._leases: dict[int, Lease] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._handled: set[int] = set()  # requests whose handler has not finished: these can be cancelled
        self._stopped: set[int] = set()  # those of them that the client has asked to stop

    async def run(self) -> None:
        """Answers until the peer is gone, then gives back what it held."""
        try:
            await self._greet()
            while True:
                frame = await self._channel.receive()
                try:
                    request = self._read(frame)
                except BaseException:
                    frame.close()
                    raise
                task = asyncio.create_task(self._answer(request, frame))
                self._tasks[request.id] = task
                task.add_done_callback(functools.partial(self._forget, request.id))
        except (EOFError, OSError):
            pass
        except (ProtocolViolation, DecodeError) as error:
            logger.warning("%s broke the protocol: %s", self._owner, error)
            await self._refuse(0, Invalid(f"{error}; the connection is closed"))
        except GpumemError as error:
            await self._refuse(0, error)
        finally:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            for lease in list(self._leases.values()):
                self._end(lease)
            self._channel.close()
            if tasks:
                await asyncio.wait(tasks)
            for lease in list(self._leases.values()):  # of requests that were granted while they were being cancelled
                self._end(lease)

    def _forget(self, number: int, _: asyncio.Task[None]) -> None:
        del self._tasks[number]

    async def _greet(self) -> None:
        frame = await self._channel.receive()
        frame.close()
        request = pb.Request.FromString(frame.payload)
        if request.WhichOneof("request") != "hello":
            raise ProtocolViolation("the first message is not Hello")
        if request.hello.version != VERSION:
            raise VersionMismatch(
                f"the client speaks version {request.hello.version} of gpumem's protocol and this server version {VERSION}: "
                "install the same zerowake for both"
            )
        self._owner = Owner(self._owner.namespace, self._owner.pid, request.hello.label[:100])
        devices = [pb.Device(identity=name, granularity=found.memory.granularity) for name, found in self._backend.devices.items()]
        welcome = pb.Welcome(version=VERSION, namespace=self._owner.namespace, devices=devices)
        await self._channel.send(pb.Reply(id=request.id, welcome=welcome).SerializeToString())

    def _read(self, frame: Frame) -> pb.Request:
        """The request in a frame. Raises ProtocolViolation, DecodeError: one that no client of ours sends."""
        request = pb.Request.FromString(frame.payload)
        if request.id in self._tasks:
            raise ProtocolViolation(f"request {request.id} is still being answered, and another has its id")
        if len(self._tasks) >= _OUTSTANDING:
            raise ProtocolViolation(f"more than {_OUTSTANDING} requests at once")
        if frame.descriptors and request.WhichOneof("request") != "fill":
            raise ProtocolViolation("descriptors with a request that takes none")
        return request

    async def _refuse(self, number: int, error: GpumemError) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1):
                await self._channel.send(pb.Reply(id=number, error=to_message(error)).SerializeToString())

    async def _answer(self, request: pb.Request, frame: Frame) -> None:
        kind = request.WhichOneof("request")
        descriptors: list[int] = []
        reply = pb.Reply()
        self._handled.add(request.id)
        try:
            handle = self._HANDLERS.get(kind or "")
            if handle is None:
                raise Invalid(f"no request of kind {kind}: install the same zerowake on both sides")
            reply = await handle(self, request, frame, descriptors)
        except GpumemError as error:
            reply.error.CopyFrom(to_message(error))
        except asyncio.CancelledError:
            if request.id not in self._stopped:
                raise
            self._stopped.discard(request.id)
            reply.error.CopyFrom(to_message(Cancelled("stopped, as asked; what is there stays for the next")))
        except Exception as error:
            if why := lack(error, "gpumem"):
                logger.warning("request %s of %s: %s", kind, self._owner, why)
                reply.error.message = why
            else:
                logger.exception("request %s of %s", kind, self._owner)
                reply.error.message = f"the server failed at this: {error!r}; its log says more"
        finally:
            frame.close()
            self._handled.discard(request.id)
        reply.id = request.id
        try:
            await self._channel.send(reply.SerializeToString(), descriptors)
        except OSError as error:
            logger.info("%s did not take an answer: %s", self._owner, error)
        finally:
            close_all(descriptors)

    # What can be asked

    async def _attach(self, request: pb.Request, _: Frame, descriptors: list[int]) -> pb.Reply:
        ref = request.attach.region
        device = self._device(ref.device)
        seconds = min(max(0.0, request.attach.wait_seconds), _LONGEST_WAIT)
        region = await device.wait_sealed(self._owner.namespace, _id(ref.id), ref.capability, seconds)
        granted = self._grant(device.lend(region, self._owner), descriptors)
        granted.layout = region.layout
        return pb.Reply(granted=granted)

    async def _begin(self, request: pb.Request, _: Frame, descriptors: list[int]) -> pb.Reply:
        begin = request.begin
        device = self._device(begin.device)
        chunks = Chunks.parse(begin.layout)
        before = device.regions.get((self._owner.namespace, _id(begin.id)))
        if before is not None and before.state is State.SEALED:
            raise Exists(f"{before} is there already on {device.identity}: attach to it")
        if before is not None and before.state is State.PAUSED:
            device.evict(before)
        region = await device.create(begin.id, begin.layout, chunks, self._owner, private=True, pinned=begin.pinned, written=True)
        granted = self._grant(device.lend(region, self._owner, writable=True), descriptors)
        granted.capability = region.capability
        return pb.Reply(granted=granted)

    async def _seal(self, request: pb.Request, *_: Any) -> pb.Reply:
        lease = self._lease(request.seal.lease)
        if lease.region is None or not lease.writable:
            raise Invalid(f"lease {lease.number} is not of a region that is being written: seal the lease that Begin granted, once")
        self._backend.devices[lease.device].seal(lease.region)
        lease.writable = False
        return self._done()

    async def _release(self, request: pb.Request, *_: Any) -> pb.Reply:
        number = request.release.lease
        for lease in [self._lease(number)] if number else list(self._leases.values()):
            self._end(lease)
        return self._done()

    async def _scratch(self, request: pb.Request, _: Frame, descriptors: list[int]) -> pb.Reply:
        sizes = [request.scratch.size, *request.scratch.more]
        if wrong := [size for size in sizes if not 0 < size < 1 << 60]:
            raise Invalid(f"scratch.size: {wrong[0]} bytes; ask for 1 byte or more, and for less than 2**60")
        if len(sizes) > _MOST_AT_ONCE:
            raise Invalid(f"scratch.more: {len(sizes)} at once; {_MOST_AT_ONCE} are the most, ask for the others by another request")
        secrets = [*request.scratch.secrets, *[b""] * (len(sizes) - len(request.scratch.secrets))]
        if len(secrets) > len(sizes) or any(secret and len(secret) != ID for secret in secrets):
            raise Invalid(f"scratch.secrets: there is one of {ID} bytes, or an empty one, for each size")
        device = self._device(request.scratch.device)
        leases: list[Lease] = []
        try:
            for size, secret in zip(sizes, secrets, strict=True):
                leases.append(await device.lend_scratch(size, self._owner, secret))
            granted, *more = [self._grant(lease, descriptors) for lease in leases]
        except BaseException:
            for lease in leases:
                self._leases.pop(lease.number, None)
                device.end(lease)
            close_all(descriptors)
            raise
        granted.more.extend(more)
        return pb.Reply(granted=granted)

    async def _join(self, request: pb.Request, _: Frame, descriptors: list[int]) -> pb.Reply:
        join = request.join
        seconds = min(max(0.0, join.wait_seconds), _LONGEST_WAIT)
        lease = await self._device(join.device).join(_id(join.secret), self._owner, seconds)
        return pb.Reply(granted=self._grant(lease, descriptors))

    async def _fill(self, request: pb.Request, frame: Frame, _: list[int]) -> pb.Reply:
        files, frame.descriptors = frame.descriptors, []
        return pb.Reply(filled=await self._backend.filling.fill(request.fill, files, self._owner))

    async def _cancel(self, request: pb.Request, *_: Any) -> pb.Reply:
        number = request.cancel.fill
        if number in self._handled and number != request.id:
            self._stopped.add(number)
            self._tasks[number].cancel()
        return self._done()

    async def _pin(self, request: pb.Request, *_: Any) -> pb.Reply:
        found = self._own(request.pin.region)
        if isinstance(found, ChunkSet):
            name = (self._owner.namespace, request.pin.region.id)
            self._backend.arena.add_set(name, ChunkSet(found.keys, found.size, request.pin.pinned, []))
        else:
            found.pinned = request.pin.pinned
        return self._done()

    async def _evict(self, request: pb.Request, *_: Any) -> pb.Reply:
        found = self._own(request.evict.region)
        if isinstance(found, ChunkSet):
            self._backend.arena.remove_set((self._owner.namespace, request.evict.region.id))
        else:
            self._backend.devices[found.device].evict(found)
        return self._done()

    async def _reserve(self, request: pb.Request, *_: Any) -> pb.Reply:
        self._operator_only("what a device holds")
        if request.reserve.size >= 1 << 60:
            raise Invalid(f"reserve.size: {request.reserve.size} bytes; ask for less than 2**60")
        return pb.Reply(reserved=pb.Reserved(size=await self._backend.resize(self._device(request.reserve.device), request.reserve.size)))

    async def _quota(self, request: pb.Request, *_: Any) -> pb.Reply:
        self._operator_only("quotas")
        self._backend.set_quota(request.quota.namespace, request.quota.size)
        return self._done()

    async def _tenant(self, request: pb.Request, *_: Any) -> pb.Reply:
        self._operator_only("sockets of namespaces")
        return pb.Reply(tenant=pb.TenantSocket(path=self._backend.open_tenant(request.tenant.namespace)))

    async def _status(self, *_: Any) -> pb.Reply:
        return pb.Reply(status=self._backend.status(self._owner.namespace or None))

    _HANDLERS: Mapping[str, Callable[..., Coroutine[Any, Any, pb.Reply]]] = {
        "attach": _attach,
        "begin": _begin,
        "seal": _seal,
        "release": _release,
        "scratch": _scratch,
        "join": _join,
        "fill": _fill,
        "cancel": _cancel,
        "pin": _pin,
        "evict": _evict,
        "reserve": _reserve,
        "quota": _quota,
        "tenant": _tenant,
        "status": _status,
    }

    # What they share

    def _device(self, identity: str) -> Device:
        found = self._backend.devices.get(identity)
        if found is None:
            there = ", ".join(self._backend.devices)
            raise WrongDevice(f"this server holds no memory of {identity or 'an unnamed device'}, only of {there}: name one of these")
        return found

    def _grant(self, lease: Lease, descriptors: list[int]) -> pb.Granted:
        """Writes a lease down, and copies its descriptors: it may end before they are sent."""
        self._leases[lease.number] = lease
        try:
            for slab in lease.slabs:
                descriptors.append(os.dup(slab.fd))
        except OSError as error:
            self._end(lease)
            close_all(descriptors)
            raise GpumemError(f"the server has too many open files to lend {len(lease.slabs)} slabs ({error}): raise its limit") from error
        return pb.Granted(lease=lease.number, writable=lease.writable, pieces=[slab.size for slab in lease.slabs])

    def _lease(self, number: int) -> Lease:
        found = self._leases.get(number)
        if found is None:
            raise NotFound(f"this connection has no lease {number}: it was released, or the connection is another one since")
        return found

    def _end(self, lease: Lease) -> None:
        """Ends a lease of this connection: its memory is its owner's no longer."""
        del self._leases[lease.number]
        self._backend.devices[lease.device].end(lease)

    def _own(self, ref: pb.RegionRef) -> Region | ChunkSet:
        """A region, or a set of chunks in the arena, that the caller may pin or evict."""
        found: Region | ChunkSet | None
        if not ref.device:
            found = self._backend.arena.sets.get((self._owner.namespace, _id(ref.id)))
        else:
            found = self._device(ref.device).find(self._owner.namespace, _id(ref.id), ref.capability)
        if found is None and not self._owner.namespace and ref.device:  # the operator needs no capability
            found = next((region for region in self._device(ref.device).regions.values() if region.id == ref.id), None)
        if found is None:
            raise NotFound(f"region {ref.id.hex()[:12]} is not on {ref.device or 'the arena'}, or not the caller's: see `gpumem status`")
        if isinstance(found, Region) and self._owner.namespace and found.namespace != self._owner.namespace:
            raise Forbidden(f"{found} is not namespace {self._owner.namespace}'s own: ask the operator")
        return found

    def _operator_only(self, what: str) -> None:
        if self._owner.namespace:
            raise Forbidden(
                f"{what} are the operator's to set, and this is the socket of namespace {self._owner.namespace}: use the operator's"
            )

    def _done(self) -> pb.Reply:
        return pb.Reply(done=pb.Done(leases=len(self._leases)))


def _id(value: bytes) -> bytes:
    if len(value) != ID:
        raise Invalid(f"an id of {len(value)} bytes; a region's has {ID}")
    return value
