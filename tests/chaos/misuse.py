"""Who misuses what listens: the scaler's gRPC, as a KEDA that has gone wrong would, and the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from pathlib import Path

import grpc
from zerowake_proto import externalscaler_pb2 as pb
from zerowake_proto import externalscaler_pb2_grpc

from tests.chaos.journal import append

_MODELS = ("quick", "stand", "lent", "cold", "nobody")


def _reference(chance: random.Random) -> pb.ScaledObjectRef:
    model = chance.choice(_MODELS)
    return pb.ScaledObjectRef(name=model, namespace="default", scalerMetadata={"model": model, "targetPending": "3"})


async def storm(port: int, chance: random.Random) -> bool:
    """Reconnects, each with a stream and calls that have no deadline, and left in the middle."""

    async def one() -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = externalscaler_pb2_grpc.ExternalScalerStub(channel)
            stream = stub.StreamIsActive(_reference(chance))
            reading = asyncio.ensure_future(stream.read())
            with contextlib.suppress(grpc.RpcError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await stub.IsActive(_reference(chance))
                    await stub.GetMetricSpec(_reference(chance))
            await asyncio.sleep(chance.uniform(0, 0.1))
            if chance.random() < 0.5:
                stream.cancel()
            reading.cancel()

    await asyncio.gather(*(one() for _ in range(20)), return_exceptions=True)
    return True


async def half_open(port: int, chance: random.Random, seconds: float) -> bool:
    """Connections that say nothing, or speak HTTP/2's first words and then nothing."""
    writers = []
    with contextlib.suppress(OSError):
        for _ in range(10):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writers.append(writer)
            if chance.random() < 0.5:
                writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
    await asyncio.sleep(seconds)
    for writer in writers:
        writer.transport.abort()
    return bool(writers)


async def garbage(port: int, chance: random.Random) -> bool:
    """Bytes that nobody speaks."""
    done = False
    for _ in range(5):
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(chance.choice((b"", b"GET ", b"POST /models/quick/answer HTTP/1.1\r\nContent-Length: ")) + chance.randbytes(300))
            with contextlib.suppress(OSError):
                await writer.drain()
            await asyncio.sleep(0.02)
            writer.transport.abort()
            done = True
    return done


async def slow_heads(port: int, seconds: float) -> bool:
    """Requests whose heads come a byte at a time, and never whole."""

    async def one() -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        with contextlib.suppress(OSError):
            for byte in b"GET /models/quick/answer":
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(seconds / 24)
        writer.transport.abort()
        return True

    return any(await asyncio.gather(*(one() for _ in range(20))))


async def leave(port: int, journal: Path, chance: random.Random) -> bool:
    """Many ask at once, and leave before they can have an answer."""

    async def one(number: int) -> None:
        model, identity = chance.choice(_MODELS[:4]), f"left-{chance.getrandbits(40):010x}-{number}"
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            append(journal, id=identity, what="sent", machine="", model=model, kind="leaver")
            body = json.dumps({"id": identity}).encode()
            writer.write(b"POST /models/%b/answer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (model.encode(), len(body), body))
            await writer.drain()
            await asyncio.sleep(chance.uniform(0, 0.3))
            writer.transport.abort()
            append(
                journal, id=identity, what="done", machine="", model=model, kind="leaver", status=0, error="left", right=False, refusal=""
            )

    await asyncio.gather(*(one(number) for number in range(30)))
    return True
