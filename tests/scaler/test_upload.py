"""What of a body is read ahead, kept, and passed on."""

import asyncio

import pytest

from scaler.gateway import upload
from scaler.gateway.refusal import Refusal
from scaler.gateway.upload import Upload


class Content:
    def __init__(self, chunks: list[bytes]) -> None:
        self.chunks = chunks
        self.total_bytes = 0

    async def readany(self) -> bytes:
        await asyncio.sleep(0)
        return self.chunks.pop(0) if self.chunks else b""

    def is_eof(self) -> bool:
        return False

    def at_eof(self) -> bool:
        return not self.chunks


class Request:
    """As much of a request as a body needs."""

    def __init__(self, chunks: list[bytes], **headers: str) -> None:
        self.content = Content(chunks)
        self.headers = headers
        self.body_exists = True
        self.version = (1, 1)
        self.transport = self
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)


async def read(body: Upload) -> bytes:
    return b"".join([piece async for piece in body.pieces()])


@pytest.mark.parametrize("in_memory", [True, False])
async def test_what_was_kept_comes_before_the_rest_and_comes_again(in_memory: bool) -> None:
    parts = [bytes([number]) * 700_000 for number in range(5)]
    body = Upload(Request(list(parts)))  # type: ignore[arg-type]
    for _ in range(3):
        await body.keep(await body.more(), in_memory=in_memory)
    assert body.size == (2_100_000 if in_memory else 700_000)
    assert body.streams
    assert body.whole() is None
    assert body.repeatable
    assert await read(body) == b"".join(parts)
    assert not body.repeatable
    body.close()


async def test_a_body_that_is_here_can_be_sent_again_until_it_is_forgotten() -> None:
    body = Upload(Request([b"one", b"two"]))  # type: ignore[arg-type]
    while body.streams:
        await body.keep(await body.more(), in_memory=True)
    assert body.whole() == b"onetwo"
    assert await read(body) == await read(body) == b"onetwo"
    assert body.repeatable
    body.forget()
    assert not body.repeatable
    assert body.size == 0


async def test_it_is_asked_for_when_it_is_needed() -> None:
    request = Request([b"x"], Expect="100-Continue")
    body = Upload(request)  # type: ignore[arg-type]
    assert body.waits
    assert not request.written
    assert await read(body) == b"x"
    assert request.written == [b"HTTP/1.1 100 Continue\r\n\r\n"]
    assert not body.waits


async def test_a_disk_that_is_full_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(upload.tempfile, "TemporaryFile", full)
    body = Upload(Request([b"x" * 2**20]))  # type: ignore[arg-type]
    with pytest.raises(Refusal, match="No space left on device"):
        await body.keep(await body.more(), in_memory=False)
