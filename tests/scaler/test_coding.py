"""What compressed bodies unpack to, piece by piece."""

import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaler.gateway import coding
from scaler.gateway.refusal import Refusal


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


@given(
    st.binary(max_size=2000),
    st.integers(1, 500),
    st.sampled_from([("gzip", gzip.compress), ("deflate", zlib.compress), ("deflate", raw_deflate)]),
)
def test_all_of_it(data: bytes, size: int, how: tuple[str, object]) -> None:
    name, pack = how
    packed = pack(data)  # type: ignore[operator]
    decoder = coding.decoder(name)
    assert decoder is not None
    found = b"".join(piece for start in range(0, len(packed), size) for piece in decoder.pieces(packed[start : start + size]))
    decoder.end()
    assert found == data


def test_several_gzip_members_are_one_body() -> None:
    decoder = coding.decoder("X-Gzip, identity")
    assert decoder is not None
    assert b"".join(decoder.pieces(gzip.compress(b"one ") + gzip.compress(b"two"))) == b"one two"
    decoder.end()


def test_a_bomb_comes_in_small_pieces() -> None:
    decoder = coding.decoder("gzip")
    assert decoder is not None
    pieces = decoder.pieces(gzip.compress(bytes(100 * 2**20)))
    assert all(len(next(pieces)) <= 2**18 for _ in range(10))


@pytest.mark.parametrize("name", ["", "identity", "Identity, identity"])
def test_what_is_not_packed(name: str) -> None:
    assert coding.decoder(name) is None


@pytest.mark.parametrize("name", ["br", "zstd", "compress", "gzip, gzip", "gzip, br"])
def test_other_codings_are_named(name: str) -> None:
    with pytest.raises(Refusal, match=name) as refused:
        coding.decoder(name)
    assert refused.value.status == 415
    assert refused.value.headers["Accept-Encoding"] == "gzip, deflate"


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("gzip", b'{"model": "m"}'),
        ("gzip", gzip.compress(b"cut off", mtime=0)[:-3]),
        ("gzip", gzip.compress(b"something behind", mtime=0) + b"x"),
        ("deflate", zlib.compress(b"something behind") + b"x"),
        ("deflate", zlib.compress(b"cut off")[:-3]),
        ("gzip", b""),
    ],
)
def test_what_is_not_what_it_is_called(name: str, packed: bytes) -> None:
    decoder = coding.decoder(name)
    assert decoder is not None
    with pytest.raises(Refusal, match=f"Content-Encoding, {name}"):
        list(decoder.pieces(packed))
        decoder.end()
