"""A store in a bucket of S3, or of anything that speaks it, by obstore: its connections, signatures, roles and retries are not ours.

Where the bucket is and whose are read where Amazon's own tools read them (environment, files, roles of machine and pod), so a URL holds a
bucket and a prefix, never a key. An object is put by one request, or in parts that become an object at the end: a reader sees all of it or
none. The server checks what it gets, by the SHA-256 that the request's signature holds.

What is read is asked for by requests that obstore signs and connections of ours carry (signed_reads.py). Whatever fails that way obstore
reads itself, from where it stands.

There are two clients. obstore's own limit on a request's length would end a large object on a slow line, so what moves bytes has none to
speak of, and the one who reads decides what is too slow (fetch.py). A request that only asks has a short one.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from restore_agent.transfer.credentials import CredentialFiles
from restore_agent.transfer.obstore_threads import obstore_threads
from restore_agent.transfer.s3_errors import code_of, status_of, word_for
from restore_agent.transfer.signed_reads import SignedReads
from restore_agent.transfer.source import Absent, Denied, Piece, Stored, TransferError
from zerowake_shared.clock import SYSTEM_CLOCK, Clock

_SMALLEST, _LARGEST = 256 << 10, 4 << 20  # bytes of a piece
_PER_PIECE = 0.25  # seconds that a piece may take: who reads waits for one, and each costs as much as a megabyte
_PARTS_FROM = 64 << 20  # bytes; a smaller object is one request
_PART = 16 << 20
_ENDPOINTS = "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"
_RETRIES = {"max_retries": 3, "retry_timeout": datetime.timedelta(seconds=20)}
_CONNECT, _ASK, _MOVE = "5s", "30s", "1h"
_MOVING = 3600.0  # seconds, as _MOVE


class Bucket:
    """A Destination below a prefix of a bucket."""

    def __init__(self, bucket: str, prefix: str = "", clock: Clock = SYSTEM_CLOCK) -> None:
        """Raises Denied: credentials that the environment names cannot be read."""
        files = CredentialFiles()
        settings = files.settings()
        config = {"region": os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or settings.get("region", "us-east-1")}
        endpoint = next((os.environ[name] for name in _ENDPOINTS if name in os.environ), "") or settings.get("endpoint_url", "")
        if endpoint:
            config["endpoint"] = endpoint
        provider = files if files.have_keys() else None
        self._clock = clock
        self._piece = _SMALLEST  # as large as the last stream's rate allows
        self._name = "s3://" + "/".join(part for part in (bucket, prefix) if part)

        def client(timeout: str) -> S3Store:
            return S3Store(
                bucket,
                prefix=prefix or None,
                config=config,  # type: ignore[arg-type]
                client_options={"allow_http": endpoint.startswith("http://"), "connect_timeout": _CONNECT, "timeout": timeout},
                retry_config=_RETRIES,  # type: ignore[arg-type]
                credential_provider=provider,
            )

        self._asks, self._moves = client(_ASK), client(_MOVE)
        self._signed = SignedReads(self._moves, clock)

    def __str__(self) -> str:
        return self._name

    async def close(self) -> None:
        """Does not wait for calls that hang."""
        self._signed.close()

    async def read(self, key: str, offset: int, length: int) -> AsyncGenerator[Piece, None]:
        """See Source."""
        came = 0
        if length and self._signed.are_tried:
            with contextlib.suppress(TransferError):
                async with contextlib.aclosing(self._signed.read(key, offset, length)) as received:
                    async for each in received:
                        came += len(each)
                        yield each
                    return
        if came < length:
            async with contextlib.aclosing(self._read_by_obstore(key, offset + came, length - came)) as pieces:
                async for piece in pieces:
                    yield piece

    async def _read_by_obstore(self, key: str, offset: int, length: int) -> AsyncGenerator[Piece, None]:
        with self._words(key):
            try:
                answer = await obstore.get_async(self._moves, key, options={"range": (offset, offset + length)})
            except BaseError as error:
                if status_of(str(error)) == 416:
                    return  # it ends before
                raise
            begin, waited, came = self._clock.now(), 0.0, 0
            async for piece in answer.stream(min_chunk_size=self._piece):
                waited += self._clock.now() - begin
                came += len(piece)
                if came >= _SMALLEST and waited:
                    self._piece = int(max(_SMALLEST, min(_LARGEST, came / waited * _PER_PIECE)))
                yield memoryview(piece)
                begin = self._clock.now()

    async def size(self, key: str) -> int:
        """See Source."""
        with self._words(key):
            try:
                return (await obstore.head_async(self._asks, key))["size"]
            except (BaseError, FileNotFoundError) as error:
                if code_of(str(error)):
                    raise
                # The answer to HEAD has no body, so it does not say why.
                answer = await obstore.get_async(self._asks, key, options={"range": (0, 1)})
                return answer.meta["size"]

    async def objects(self, prefix: str) -> AsyncIterator[Stored]:
        """See Source."""
        with self._words(f"list of {prefix or 'all'}"):
            async for some in obstore.list(self._asks, prefix or None):
                for each in some:
                    yield Stored(each["path"], each["size"], each["last_modified"].timestamp())

    async def unfinished(self) -> AsyncIterator[Stored]:
        """None: parts of an object that never became one are for a rule of the bucket to remove, obstore does not list them."""
        return
        yield  # it is a generator

    async def put(self, key: str, data: Piece) -> None:
        """See Destination."""
        with self._words(key):
            async with asyncio.timeout(_MOVING):
                await obstore.put_async(self._moves, key, data, use_multipart=len(data) > _PARTS_FROM, chunk_size=_PART, max_concurrency=4)

    async def remove(self, key: str) -> None:
        """See Destination."""
        with contextlib.suppress(Absent), self._words(key):
            await obstore.delete_async(self._asks, key)

    @contextlib.contextmanager
    def _words(self, what: str) -> Iterator[None]:
        with obstore_threads():
            try:
                yield
            except Denied as error:
                raise error from None
            except (BaseError, OSError, ValueError) as error:
                raise word_for(error, what, str(self)) from None
