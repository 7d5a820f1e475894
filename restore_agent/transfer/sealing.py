"""An encrypted object: what its bytes are, and what they promise.

    head      64 bytes: "ZWSEAL", version, codec, ID of the key, bytes in clear, bytes of the payload, 32 random bytes
    segments  the payload (what was put, as it is or compressed), 256 KiB at a time, each by AES-256-GCM: ciphertext and a tag of 16 bytes

Each object has a key of its own: BLAKE3 of its random bytes, keyed by the store's key. So a nonce comes again under one key only if 256
random bits do, however many objects there are, and within an object it is the number of the segment, and whether it is the last. What is
authenticated beside it are the whole head and the object's key in the store (layout.py): nothing of one object can be put under another
name, into another place, or left out. A segment is given to nobody before its tag was verified. Who may write to a store and has not the
key can only destroy; that somebody with the key put the right bytes there, the signed manifest says.

Objects are compressed by zstd where that saves a tenth: pages of an engine do, most weights do not (tests/bench). What comes of it is
bounded by what the head says, and by what the reader asks for. How well something compresses can be seen by its size.

Rejected: one tag for the whole object (nothing could be given on before all of it is there: a slow line looks like a dead one, and one that
is cut always begins anew), random nonces under the store's key (they may not be used for more than 2**32 objects), and compressing each
segment alone (each would need its own size, and have a small window).
"""

from __future__ import annotations

import secrets
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from restore_agent.snapshots.encryption_keys import EncryptionKey
from restore_agent.transfer.source import Piece

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

SEGMENT = 256 << 10  # bytes of a payload under one tag
MAGIC = b"ZWSEAL"
_VERSION = 1
_PLAIN, _ZSTD = range(2)  # codecs
_HEAD = struct.Struct(">6sBB8sQQ32s")
HEAD = _HEAD.size
_TAG = 16
_LEVEL = 1
_WINDOW_BITS = 23  # of memory that a frame may make its reader take; level 1 needs less
_WORTH = 0.9  # of the size, at most
_SAMPLE, _SAMPLES = 8 << 10, 16  # bytes, at so many places, by which it is seen whether to compress all
ROOM = 4 << 20  # bytes that come of one step, at most


class Spoiled(ValueError):
    """Bytes are no object that was sealed under this name."""


@dataclass(frozen=True, slots=True)
class Head:
    """What an object says of itself, before anything of it was verified."""

    data: bytes
    key: str  # ID
    compressed: bool
    size: int  # bytes in clear
    payload: int  # bytes that are encrypted
    salt: bytes

    @classmethod
    def decode(cls, data: bytes) -> Head:
        """Raises Spoiled."""
        if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
            raise Spoiled("is not encrypted")
        if len(data) < HEAD:
            raise Spoiled("is cut off")
        _, version, codec, key, size, payload, salt = _HEAD.unpack(data)
        if version != _VERSION:
            raise Spoiled(f"has version {version}, which this zerowake does not know")
        if codec not in (_PLAIN, _ZSTD) or payload > size or (codec == _PLAIN and payload != size):
            raise Spoiled("has a head that nobody writes")
        return cls(data, key.hex(), codec == _ZSTD, size, payload, salt)

    @property
    def stored(self) -> int:
        """Bytes of the whole object."""
        return HEAD + stored_payload(self.payload)


def stored_payload(size: int) -> int:
    """Bytes that a payload takes, with its tags."""
    return size + _TAG * _segments(size)


def seal(data: Piece, name: str, key: EncryptionKey) -> bytearray:
    """The object that holds `data`, to be put under that name of the store. CPU work: for a thread."""
    packed = _compressed(data)
    payload = memoryview(data if packed is None else packed)
    codec = _PLAIN if packed is None else _ZSTD
    head = _HEAD.pack(MAGIC, _VERSION, codec, bytes.fromhex(key.id), len(data), len(payload), secrets.token_bytes(32))
    cipher, bound = _Cipher.of(Head.decode(head), key), head + name.encode()
    sealed = bytearray(HEAD + stored_payload(len(payload)))
    sealed[:HEAD] = head
    with memoryview(sealed) as target:
        for index in range(cipher.segments):
            begin = index * SEGMENT
            part, at = payload[begin : begin + SEGMENT], HEAD + begin + index * _TAG
            cipher.aes.encrypt_into(cipher.nonce(index), part, bound, target[at : at + len(part) + _TAG])
    return sealed


class Unsealing:
    """One object as it is read: its stored bytes go in as they come, and what they say comes out, verified. Not for two threads at once.

    The first stored byte that goes in is the one at `begins_at`; the first that comes out is the one at `offset`. Segments are decrypted
    from where they came to, into one and the same memory: new memory for each would cost the kernel more time than the cipher takes.
    """

    def __init__(self, head: Head, name: str, key: EncryptionKey, offset: int = 0, room: memoryview | None = None) -> None:
        """`room`: memory for what comes out, ROOM bytes; None: its own."""
        self._head = head
        self._bound = head.data + name.encode()
        self._cipher = _Cipher.of(head, key)
        self._unpacker = (
            zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_BITS}) if head.compressed else None
        )
        self._next = 0 if head.compressed else min(offset, max(0, head.size - 1)) // SEGMENT  # segment
        self._skip = offset - self._next * SEGMENT
        self._left = head.size - self._next * SEGMENT  # bytes in clear that are not out yet
        self.room = memoryview(bytearray(min(ROOM, max(SEGMENT, head.payload)))) if room is None else room
        self._tail = bytearray()  # of what has come: the beginning of a segment
        self.begins_at = HEAD + self._next * (SEGMENT + _TAG)

    def pieces(self, data: Piece) -> Iterator[memoryview]:
        """What can be said when these stored bytes have come, too; each at most 4 MiB, and there until the next is asked for. Each step is
        CPU work. To be taken to its end before more is said. Raises Spoiled."""
        rest = memoryview(data)
        while self._next < self._cipher.segments:
            used, opened = self._open(rest)
            if not used:
                self._tail += rest
                return
            rest = rest[used:]
            if self._unpacker is None:
                yield from self._given(opened)
                continue
            yield from self._unpacked(self._unpacker, opened)
            if self._unpacker.eof:
                break
        if self._unpacker and self._unpacker.eof and (self._left or self._unpacker.unused_data or self._next < self._cipher.segments):
            raise Spoiled("has another size than it says")

    @property
    def is_done(self) -> bool:
        """Everything has come out."""
        return self._next == self._cipher.segments and not self._left

    def _unpacked(self, unpacker: zstd.ZstdDecompressor, packed: memoryview) -> Iterator[memoryview]:
        data: memoryview | bytes = packed
        while True:
            try:
                plain = unpacker.decompress(data, min(ROOM, self._left + 1))
            except zstd.ZstdError as error:
                raise Spoiled(f"cannot be decompressed: {error}") from None
            if len(plain) > self._left:
                raise Spoiled(f"would be more than the {self._head.size} bytes that it says")
            yield from self._given(plain)
            if unpacker.needs_input or unpacker.eof:
                return
            data = b""

    def _given(self, plain: bytes | memoryview) -> Iterator[memoryview]:
        self._left -= len(plain)
        skipped = min(self._skip, len(plain))
        self._skip -= skipped
        if skipped < len(plain):
            yield memoryview(plain)[skipped:]

    def _open(self, data: memoryview) -> tuple[int, memoryview]:
        """How much of `data` is used, and the whole segments that the tail and that much of it are, in clear: a room of them at most."""
        used, done = 0, 0
        while self._next < self._cipher.segments and done + SEGMENT <= len(self.room):
            size = min(SEGMENT, self._head.payload - self._next * SEGMENT)
            lacks = size + _TAG - len(self._tail)
            if lacks > len(data) - used:
                break
            part = data[used : used + lacks]
            if self._tail:
                self._tail += part
                part = memoryview(self._tail)
                self._tail = bytearray()
            try:
                self._cipher.aes.decrypt_into(self._cipher.nonce(self._next), part, self._bound, self.room[done : done + size])
            except InvalidTag:
                raise Spoiled("was changed, or belongs under another name") from None
            self._next += 1
            used, done = used + lacks, done + size
        return used, self.room[:done]


@dataclass(frozen=True, slots=True)
class _Cipher:
    """Of one object."""

    aes: AESGCM
    segments: int

    @classmethod
    def of(cls, head: Head, key: EncryptionKey) -> _Cipher:
        return cls(AESGCM(blake3(head.salt, key=key.sealing).digest()), _segments(head.payload))

    def nonce(self, index: int) -> bytes:
        return struct.pack(">3xQB", index, index == self.segments - 1)


def _segments(size: int) -> int:
    """One for nothing, too: it has a tag."""
    return max(1, -(-size // SEGMENT))


def _compressed(data: Piece) -> bytes | None:
    """None: it does not pay."""
    size = len(data)
    if size > _SAMPLE * _SAMPLES:
        step = (size - _SAMPLE) // (_SAMPLES - 1)
        sample = b"".join(bytes(data[at : at + _SAMPLE]) for at in range(0, step * _SAMPLES, step))
        if len(zstd.compress(sample, _LEVEL)) > _WORTH * len(sample):
            return None
    packed = zstd.compress(data, _LEVEL)
    return packed if len(packed) <= _WORTH * size else None
