"""What compressed bodies unpack to, piece by piece."""

import gzip
import zlib
from collections.abc import Callable

import brotli
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from scaler.gateway import coding
from scaler.gateway.refusal import Refusal


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


HOW = [("gzip", gzip.compress), ("deflate", zlib.compress), ("br", brotli.compress), ("zstd", zstd.compress)]


@given(
    st.binary(max_size=2000),
    st.integers(1, 500),
    st.sampled_from([*HOW, ("deflate", raw_deflate)]),
)
def test_all_of_it(data: bytes, size: int, how: tuple[str, Callable[[bytes], bytes]]) -> None:
    name, pack = how
    packed = pack(data)
    decoder = coding.decoder(name)
    assert decoder is not None
    found = b"".join(piece for start in range(0, len(packed), size) for piece in decoder.pieces(packed[start : start + size]))
    decoder.end()
    assert found == data


@pytest.mark.parametrize(("name", "pack"), [("X-Gzip, identity", gzip.compress), ("zstd", zstd.compress)])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_several_members_are_one_body(name: str, pack: Callable[[bytes], bytes], size: int) -> None:
    decoder = coding.decoder(name)
    assert decoder is not None
    packed = pack(b"one ") + pack(b"") + pack(b"two")
    assert b"".join(piece for start in range(0, len(packed), size) for piece in decoder.pieces(packed[start : start + size])) == b"one two"
    decoder.end()


@pytest.mark.parametrize(("name", "pack"), HOW)
def test_a_bomb_comes_in_small_pieces(name: str, pack: Callable[[bytes], bytes]) -> None:
    decoder = coding.decoder(name)
    assert decoder is not None
    packed = pack(bytes(100 * 2**20))
    assert len(packed) < 2**18
    pieces = [len(piece) for piece in decoder.pieces(packed)]
    decoder.end()
    assert max(pieces) <= 2**19 and sum(pieces) == 100 * 2**20


def test_what_a_sender_has_kept_is_bounded() -> None:
    """A window that its header asks for is memory before a byte has come."""
    packer = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    packed = packer.compress(b"{}") + packer.flush()
    decoder = coding.decoder("zstd")
    assert decoder is not None and decoder.memory == 8 * 2**20
    with pytest.raises(Refusal, match="requires too much memory"):
        list(decoder.pieces(packed))


def test_without_their_packages_other_codings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coding, "_installed", lambda package: None)
    monkeypatch.setattr(coding, "_CODINGS", dict(coding._known()))
    for name in ("br", "zstd"):
        with pytest.raises(Refusal, match=name) as refused:
            coding.decoder(name)
        assert refused.value.headers["Accept-Encoding"] == "gzip, deflate"
    assert coding.decoder("gzip")


@pytest.mark.parametrize("name", ["", "identity", "Identity, identity"])
def test_what_is_not_packed(name: str) -> None:
    assert coding.decoder(name) is None


@pytest.mark.parametrize("name", ["lzma", "compress", "gzip, gzip", "gzip, br"])
def test_other_codings_are_named(name: str) -> None:
    with pytest.raises(Refusal, match=name) as refused:
        coding.decoder(name)
    assert refused.value.status == 415
    assert refused.value.headers["Accept-Encoding"] == "gzip, deflate, br, zstd"


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("gzip", b'{"model": "m"}'),
        ("gzip", gzip.compress(b"cut off", mtime=0)[:-3]),
        ("gzip", gzip.compress(b"something behind", mtime=0) + b"x"),
        ("deflate", zlib.compress(b"something behind") + b"x"),
        ("deflate", zlib.compress(b"cut off")[:-3]),
        ("gzip", b""),
        ("br", brotli.compress(b"something behind") + b"x"),
        ("br", brotli.compress(b"cut off")[:-3]),
        ("br", b'{"model": "m"}'),
        ("zstd", zstd.compress(b"something behind") + b"x"),
        ("zstd", zstd.compress(b"cut off")[:-3]),
        ("zstd", b'{"model": "m"}'),
        ("br", b""),
        ("zstd", b""),
    ],
)
def test_what_is_not_what_it_is_called(name: str, packed: bytes) -> None:
    decoder = coding.decoder(name)
    assert decoder is not None
    with pytest.raises(Refusal, match=f"Content-Encoding, {name}"):
        list(decoder.pieces(packed))
        decoder.end()
