"""Checkpoint directories as layouts: what a region would hold is what the files hold; what is no checkpoint is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from gpumem.checkpoint.safetensors import (
    CHUNK,
    PADDING,
    Checkpoint,
    InvalidCheckpoint,
    byte_size,
    keep_reading,
    kept_reading,
    read_checkpoint,
    write_checkpoint,
)

NUMBERS = np.random.default_rng(5)


def region(checkpoint: Checkpoint) -> bytes:
    """What a server would put into the region, each chunk compared with its hash."""
    content = b""
    for path, offset, first, count in checkpoint.parts:
        data = path.read_bytes()[offset:]
        for chunk in checkpoint.layout.chunks[first : first + count]:
            assert blake3(data[: chunk.size]).digest() == chunk.hash
            content, data = content + data[: chunk.size], data[chunk.size :]
    assert len(content) == checkpoint.layout.size
    return content


def save(path: Path, **tensors: np.ndarray) -> dict[str, bytes]:
    save_file(tensors, path)
    return {name: tensor.tobytes() for name, tensor in tensors.items()}


def test_shards_and_their_index(tmp_path: Path) -> None:
    odd = NUMBERS.integers(0, 255, 1001, dtype=np.uint8)  # so that the next file does not begin where it should by itself
    expected = save(tmp_path / "model-1.safetensors", a=NUMBERS.random((3, 5), dtype=np.float32), odd=odd)
    expected |= save(tmp_path / "model-2.safetensors", b=NUMBERS.random(7), c=NUMBERS.random((2, 2, 2)).astype(np.float16))
    expected |= save(tmp_path / "model-3.safetensors", big=NUMBERS.random(CHUNK // 4 + 9, dtype=np.float32))
    save(tmp_path / "consolidated.safetensors", a=NUMBERS.random(3))  # the same model in another form, as some directories have it
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors", "big": "model-3.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    checkpoint = read_checkpoint(tmp_path)
    content = region(checkpoint)
    assert {tensor.name for tensor in checkpoint.layout.tensors} == expected.keys()
    for tensor in checkpoint.layout.tensors:
        assert content[tensor.offset : tensor.offset + byte_size(tensor)] == expected[tensor.name]
        assert tensor.offset % (byte_size(tensor) // int(np.prod(tensor.shape))) == 0
    firsts = [min(t.offset for t in checkpoint.layout.tensors if t.name in names) for names in ({"a", "odd"}, {"b", "c"}, {"big"})]
    assert all(offset % 16 == 0 for offset in firsts)
    assert len(checkpoint.layout.chunks) == 4
    assert read_checkpoint(tmp_path).layout == checkpoint.layout


def test_a_checkpoint_of_one_file(tmp_path: Path) -> None:
    expected = save(tmp_path / "model.safetensors", a=NUMBERS.random(4))
    save(tmp_path / "adapter.safetensors", a=NUMBERS.random(4))
    assert region(read_checkpoint(tmp_path)) == expected["a"]
    assert read_checkpoint(tmp_path / "model.safetensors").layout == read_checkpoint(tmp_path).layout


def test_no_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="holds no"):
        read_checkpoint(tmp_path)
    file = tmp_path / "a.safetensors"
    save(file, a=NUMBERS.random(100))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(InvalidCheckpoint, match=r"a\.safetensors.*torn"):
        read_checkpoint(tmp_path)
    file.write_bytes(whole)
    save(tmp_path / "b.safetensors", a=NUMBERS.random(100))
    with pytest.raises(InvalidCheckpoint, match="two tensors of the name 'a'"):
        read_checkpoint(tmp_path)
    for strange in ({"a": "../a.safetensors"}, {"a": 5}, [], "x"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": strange}))
        with pytest.raises(InvalidCheckpoint, match=r"index\.json"):
            read_checkpoint(tmp_path)


entry = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "X"]) | st.integers(), "shape": st.lists(st.integers(-2, 5), max_size=3)},
    optional={"data_offsets": st.lists(st.integers(-5, 200), max_size=3)},
)
headers = st.dictionaries(st.text(max_size=3), entry | st.none() | st.integers(), max_size=3).map(lambda found: json.dumps(found).encode())


@settings(deadline=None)
@given(header=headers | st.binary(max_size=50), size=st.integers(0, 200) | st.none(), data=st.binary(max_size=100))
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, header: bytes, size: int | None, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    file.write_bytes((len(header) if size is None else size).to_bytes(8, "little") + header + data)
    try:
        checkpoint = read_checkpoint(file)
    except InvalidCheckpoint as refused:
        assert "fuzzed" in str(refused)
    else:
        region(checkpoint)


def test_what_is_written_is_read_aligned(tmp_path: Path) -> None:
    arrays = {
        "scale": NUMBERS.random((), dtype=np.float32),
        "odd": NUMBERS.integers(0, 255, 1001, dtype=np.uint8),
        "big": NUMBERS.random((CHUNK // 4 + 9,), dtype=np.float32),
        "last": NUMBERS.random((3, 5)).astype(np.float16),
    }
    dtypes = {"scale": "F32", "odd": "U8", "big": "F32", "last": "F16"}

    def content(name: str) -> Iterator[memoryview]:
        data = arrays[name].tobytes()
        yield memoryview(data[: len(data) // 2])
        yield memoryview(data[len(data) // 2 :])

    directory = tmp_path / "made"
    write_checkpoint(directory, [(name, dtypes[name], array.shape) for name, array in arrays.items()], content)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    for name, array in load_file(directory / "model.safetensors").items():  # the library agrees that it is one
        assert name.startswith(PADDING) or np.array_equal(array, arrays[name])
    checkpoint = read_checkpoint(directory)
    held = region(checkpoint)
    for tensor in checkpoint.layout.tensors:
        if not tensor.name.startswith(PADDING):
            assert tensor.offset % 256 == 0
            assert held[tensor.offset : tensor.offset + byte_size(tensor)] == arrays[tensor.name].tobytes()
    assert kept_reading(directory) is None
    keep_reading(directory, checkpoint)
    assert kept_reading(directory) == checkpoint
    assert read_checkpoint(directory) == checkpoint


@pytest.mark.parametrize(
    "torn",
    [b"", b'{"layout": "0a', b"\xff\xfe", b"[]", b'{"layout": "0", "parts": []}', b'{"parts": [[1]]}', b'{"layout": "ffff", "parts": []}'],
)
def test_a_reading_that_is_torn_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture, torn: bytes) -> None:
    """A node that lost its power keeps such; whoever starts there reads the weights anew, instead of failing each time."""
    save_file({"a": NUMBERS.random(4, dtype=np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "reading.json").write_bytes(torn)
    assert kept_reading(tmp_path) is None
    assert f"{tmp_path / 'reading.json'} cannot be read" in caplog.text
    keep_reading(tmp_path, checkpoint := read_checkpoint(tmp_path))
    assert kept_reading(tmp_path) == checkpoint


def test_two_writers_of_a_reading_do_not_take_each_other_s_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": NUMBERS.random(4, dtype=np.float32)}, tmp_path / "model.safetensors")
    checkpoint, rename = read_checkpoint(tmp_path), Path.rename

    def as_another_writes(path: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        keep_reading(tmp_path, checkpoint)
        return path.rename(target)

    monkeypatch.setattr(Path, "rename", as_another_writes)
    keep_reading(tmp_path, checkpoint)
    assert kept_reading(tmp_path) == checkpoint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "reading.json"]


def test_content_of_another_length_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'a' has 16 bytes, and 3 were given"):
        write_checkpoint(tmp_path / "made", [("a", "F32", [4])], lambda name: [memoryview(b"abc")])
    assert not list(tmp_path.iterdir())
