"""Encrypted objects: what was put comes out, byte by byte the same or not at all."""

from __future__ import annotations

import struct

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from restore_agent.transfer import sealing
from restore_agent.transfer.sealing import HEAD, SEGMENT, Head, Spoiled, Unsealing, seal
from tests.worlds.encrypted import PAGES, RANDOM, key

KEY = key("store")
NAME = "chunks/ab/abc"
TAG = 16


def unsealed(stored: bytes, name: str = NAME, offset: int = 0, by: str = "store", piece: int = 300_000) -> bytes:
    head = Head.decode(stored[:HEAD])
    unsealing = Unsealing(head, name, key(by), offset)
    said = bytearray()
    rest = stored[unsealing.begins_at :]
    for at in range(0, len(rest), piece):
        for each in unsealing.pieces(rest[at : at + piece]):
            assert len(each) <= 4 << 20
            said += each
    if not unsealing.is_done:
        raise Spoiled("is cut off")
    return bytes(said)


@pytest.mark.parametrize("size", [0, 1, SEGMENT - 1, SEGMENT, SEGMENT + 1, len(RANDOM)])
@pytest.mark.parametrize("content", [RANDOM, PAGES])
@pytest.mark.parametrize("piece", [1000, 70_000, 8 << 20])
def test_what_was_put_comes_out(content: bytes, size: int, piece: int) -> None:
    data = content[:size]
    stored = bytes(seal(memoryview(data), NAME, KEY))
    head = Head.decode(stored[:HEAD])
    assert (head.key, head.size, head.stored) == (KEY.id, size, len(stored))
    for offset in (0, 1, SEGMENT - 1, SEGMENT, size // 2, max(0, size - 1)):
        assert unsealed(stored, offset=offset, piece=piece) == data[offset:]


def test_only_what_saves_a_tenth_is_compressed() -> None:
    assert len(seal(PAGES, NAME, KEY)) < 0.4 * len(PAGES)
    assert len(seal(RANDOM, NAME, KEY)) == HEAD + len(RANDOM) + 16 * TAG
    little = RANDOM[:100_000] + bytes(9_000)
    assert len(seal(little, NAME, KEY)) > len(little)
    assert len(seal(RANDOM[: 1 << 20] + bytes(1 << 20), NAME, KEY)) < 1.2 * (1 << 20)


def test_nothing_in_clear_is_in_it_and_no_two_are_alike() -> None:
    data = b"password=hunter2 " * 10 + RANDOM[:1000]
    one, two = bytes(seal(data, NAME, KEY)), bytes(seal(data, NAME, KEY))
    assert b"hunter2" not in one and RANDOM[:20] not in one
    assert Head.decode(one[:HEAD]).salt != Head.decode(two[:HEAD]).salt
    assert one[HEAD:] != two[HEAD:]


def test_no_nonce_comes_twice_under_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[bytes, bytes]] = []

    class Watched:
        def __init__(self, key: bytes) -> None:
            self._key, self._aes = key, AESGCM(key)

        def encrypt_into(self, nonce: bytes, data: bytes, bound: bytes, target: memoryview) -> int:
            used.append((self._key, nonce))
            return self._aes.encrypt_into(nonce, data, bound, target)

    monkeypatch.setattr(sealing, "AESGCM", Watched)
    for _ in range(3):
        for size in (0, SEGMENT, 3 * SEGMENT, 3 * SEGMENT + 1):
            seal(RANDOM[:size], NAME, KEY)
    assert len(used) == len(set(used)) == 3 * (1 + 1 + 3 + 4)
    assert len({key for key, _ in used}) == 3 * 4


_FIELDS = {"magic": 0, "version": 6, "codec": 7, "key": 8, "size": 16, "payload": 24, "salt": 32, "first segment": HEAD}


@pytest.mark.parametrize("content", [RANDOM[: 3 * SEGMENT + 5], PAGES])
@pytest.mark.parametrize("at", [*_FIELDS.values(), *(begin - 1 for begin in _FIELDS.values() if begin), -TAG - 1, -TAG, -1])
def test_a_flipped_bit_anywhere_is_seen(content: bytes, at: int) -> None:
    stored = seal(content, NAME, KEY)
    assert unsealed(bytes(stored)) == content
    stored[at] ^= 1
    with pytest.raises(Spoiled):
        unsealed(bytes(stored))


def test_a_flipped_bit_in_each_segment_is_seen_before_anything_of_that_segment_comes_out() -> None:
    whole = seal(RANDOM[: 4 * SEGMENT], NAME, KEY)
    for index in range(4):
        stored = bytearray(whole)
        stored[HEAD + index * (SEGMENT + TAG) + 1000] ^= 0x80
        unsealing = Unsealing(Head.decode(bytes(stored[:HEAD])), NAME, KEY)
        said = bytearray()
        with pytest.raises(Spoiled, match="was changed, or belongs under another name"):
            for at in range(HEAD, len(stored), SEGMENT + TAG):
                for each in unsealing.pieces(stored[at : at + SEGMENT + TAG]):
                    said += each
        assert bytes(said) == RANDOM[: index * SEGMENT]


def test_segments_cannot_change_places_or_be_left_out() -> None:
    stored = bytes(seal(RANDOM[: 3 * SEGMENT], NAME, KEY))
    head, step = stored[:HEAD], SEGMENT + TAG
    one, two, three = (stored[HEAD + at * step : HEAD + (at + 1) * step] for at in range(3))
    for wrong in (two + one + three, one + three + two, one + one + three, one + three):
        with pytest.raises(Spoiled):
            unsealed(head + wrong)
    fewer = struct.pack(">QQ", 2 * SEGMENT, 2 * SEGMENT)
    with pytest.raises(Spoiled):
        unsealed(head[:16] + fewer + head[32:] + one + two)


@pytest.mark.parametrize("content", [RANDOM[: 2 * SEGMENT], PAGES])
def test_one_that_was_cut_off_is_not_whole(content: bytes) -> None:
    stored = bytes(seal(content, NAME, KEY))
    for size in (HEAD, HEAD + 5, len(stored) // 2, len(stored) - TAG, len(stored) - 1):
        with pytest.raises(Spoiled, match="is cut off"):
            unsealed(stored[:size])


def test_another_object_s_bytes_under_this_name_are_seen() -> None:
    with pytest.raises(Spoiled, match="belongs under another name"):
        unsealed(bytes(seal(RANDOM, "chunks/ab/other", KEY)))


def test_another_key_opens_nothing() -> None:
    with pytest.raises(Spoiled):
        unsealed(bytes(seal(RANDOM, NAME, KEY)), by="another")


@pytest.mark.parametrize(
    ("data", "why"),
    [(b"", "is not encrypted"), (b"{" * 100, "is not encrypted"), (b"ZWSEAL", "is cut off"), (b"ZWSEAL\2" + bytes(57), "has version 2")],
)
def test_what_is_no_head(data: bytes, why: str) -> None:
    with pytest.raises(Spoiled, match=why):
        Head.decode(data[:HEAD])


def test_a_bomb_goes_off_at_the_size_that_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes one has the key."""
    bomb = sealing.zstd.compress(bytes(1 << 30), 1)
    monkeypatch.setattr(sealing, "_compressed", lambda data: bomb)
    stored = bytes(seal(bytes(1 << 20), NAME, KEY))
    assert Head.decode(stored[:HEAD]).size == 1 << 20
    unsealing = Unsealing(Head.decode(stored[:HEAD]), NAME, KEY)
    with pytest.raises(Spoiled, match="would be more than the 1048576 bytes that it says"):
        list(unsealing.pieces(stored[HEAD:]))


def test_of_one_that_says_much_no_more_than_a_piece_comes_at_a_time() -> None:
    stored = bytes(seal(bytes(64 << 20), NAME, KEY))
    assert len(stored) < SEGMENT
    unsealing = Unsealing(Head.decode(stored[:HEAD]), NAME, KEY)
    assert max(map(len, unsealing.pieces(stored[HEAD:]))) <= 4 << 20


def test_a_payload_that_is_no_zstd_or_less_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for packed in (b"no zstd at all", sealing.zstd.compress(bytes(1000)), sealing.zstd.compress(bytes(5000)) + b"more"):
        monkeypatch.setattr(sealing, "_compressed", lambda data, packed=packed: packed)
        with pytest.raises(Spoiled):
            unsealed(bytes(seal(bytes(5000), NAME, KEY)))
