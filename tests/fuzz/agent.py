"""Parsers of the restore agent: what stores, peers, runtimes and pods send it."""

from __future__ import annotations

import atexit
import functools
import io
import json
import os
import random
import shutil
import socket
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from zerowake_proto import criu_pb2, gpumem_pb2

from restore_agent.pages import images
from restore_agent.pages.fill import Arena, FillError
from restore_agent.pages.images import ImageError
from restore_agent.places.laid_out_changes import Changes
from restore_agent.places.overlay import OverlayError
from restore_agent.snapshots.catalog import Corrupt
from restore_agent.snapshots.chunks import Chunk
from restore_agent.snapshots.encryption_keys import EncryptionKey
from restore_agent.snapshots.keyring import Signature, Untrusted
from restore_agent.snapshots.manifest import (
    CHANGES_FILE,
    CanaryRecord,
    ChunkRecord,
    EngineRecord,
    FileRecord,
    InvalidManifest,
    InvalidName,
    Manifest,
    PartRecord,
    WeightsRecord,
    layout_file,
)
from restore_agent.snapshots.names import says_withdrawn
from restore_agent.snapshots.page_runs import PAGE, PageRun
from restore_agent.transfer import peer_server
from restore_agent.transfer.contents import in_files
from restore_agent.transfer.http_connection import Connection
from restore_agent.transfer.leases import Claim
from restore_agent.transfer.offers import Offered, Offers
from restore_agent.transfer.sealing import HEAD, Head, Spoiled, Unsealing, seal
from restore_agent.transfer.sending import _claimed
from restore_agent.transfer.source import TransferError
from tests.fuzz.parser import Parser
from tests.worlds.images import ANONYMOUS, READ, WRITE, write_image
from zerowake_shared.address import Address

_HASH = "ab" * 32
_REGION = WeightsRecord(region="cd" * 32, size=300, parts=(PartRecord(path="model.safetensors", offset=8, first_chunk=0, chunks=2),))
_LAYOUT = gpumem_pb2.Layout(size=300, chunks=[gpumem_pb2.Chunk(hash=bytes(32), size=200), gpumem_pb2.Chunk(hash=bytes([1] * 32), size=100)])
_KEY = EncryptionKey.of(bytes(range(32)))
_MEMORY = 1 << 32  # address


@contextmanager
def _folder() -> Iterator[Path]:
    """In memory: a disk would be asked a thousand times a second."""
    made = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm"))
    try:
        yield made
    finally:
        shutil.rmtree(made)


# --- snapshots


def _manifest(**changes: object) -> bytes:
    from tests.worlds.snapshots import node_fits  # noqa: PLC0415

    usual = {
        "namespace": "default",
        "name": "chat",
        "model": "smol",
        "created": "2026-01-01T00:00:00.000+00:00",
        "engine": EngineRecord(command=("serve", "--port", "80"), env={"A": "b"}, port=80),
        "canary": CanaryRecord(path="/", answer="yes"),
        "processes": (),
        "root_pid": 7,
        "stdio": ("pipe:[1]", "pipe:[2]"),
        "files": {name: FileRecord(size=9, hash=_HASH) for name in ("images/core-7.img", CHANGES_FILE, layout_file(_REGION))},
        "chunks": (ChunkRecord(hash=_HASH, size=4096),),
        "host_bytes": 4096,
        "gpus": {"GPU-1": 1 << 30},
        "weights": (_REGION,),
        "fits": node_fits("4.2.1", [], None),
    }
    return Manifest(**(usual | changes)).encode()  # type: ignore[arg-type]


def _read_manifest(data: bytes) -> None:
    manifest = Manifest._read(data)
    folder = "/var/lib/zerowake/arriving"
    for name in [*manifest.files, *(part.path for each in manifest.weights for part in each.parts)]:
        there = os.path.normpath(f"{folder}/{name}")
        assert there.startswith(f"{folder}/"), f"{name!r} is outside of the snapshot"
    assert Manifest.decode(manifest.encode()) == manifest
    # Numbers of the protocol, and of the kernel.
    for number in (manifest.image_bytes, manifest.weights_bytes, manifest.host_bytes, *manifest.gpus.values()):
        assert 0 <= number < 1 << 63
    for each in manifest.distinct_weights:
        for part in each.parts:
            assert part.offset < 1 << 63


def _read_layout(data: bytes) -> None:
    for part in in_files(_REGION, data):
        assert len(part.chunk.hash) == 64
        assert part.chunk.size > 0 and part.offset + part.chunk.size < 1 << 63


def _read_index(data: bytes) -> None:
    Arena([Chunk(_HASH, 2 * PAGE), Chunk(_HASH[::-1], PAGE)], data)


_INDEX = b"".join(map(bytes, (PageRun(7, _MEMORY, PAGE), PageRun(7, _MEMORY + (2 << 20) - PAGE, 2 * PAGE))))


def _read_records(data: bytes) -> None:
    """What is in a store beside manifests, before a signature was looked at."""
    says_withdrawn(data)
    assert _claimed(data) >= 0
    for decode in (Signature.decode, Claim.decode):
        try:
            decode(data)
        except (Untrusted, ValueError):
            continue


def _read_sealed(data: bytes) -> None:
    unsealing = Unsealing(head := Head.decode(data[:HEAD]), "chunks/ab/abc", _KEY)
    said = b"".join(bytes(piece) for piece in unsealing.pieces(data[HEAD:]))
    assert len(said) <= head.size
    assert not unsealing.is_done or said in _SECRETS


_SECRETS = (b"", b"words " * 400, random.Random(1).randbytes(500))
_SEALED = tuple(bytes(seal(each, "chunks/ab/abc", _KEY)) for each in _SECRETS)

# --- images of CRIU


def _images() -> dict[str, bytes]:
    with _folder() as folder:
        content = random.Random(2).randbytes(3 * PAGE)
        write_image(folder, {_MEMORY: (content, READ | WRITE, ANONYMOUS), 2 * _MEMORY: (content, READ, ANONYMOUS)})
        core = criu_pb2.Core(
            thread=criu_pb2.Thread(creds=criu_pb2.Credentials(uid=1, gid=1, euid=1, egid=1, suid=1, sgid=1, fsuid=1, fsgid=1))
        )
        images.write_image(folder / "core-7.img", images._CORE, [core.SerializeToString()])
        images.write_image(folder / "pstree.img", images._PSTREE, [criu_pb2.Process(pid=7, threads=[7]).SerializeToString()])
        timer = criu_pb2.File(tfd=criu_pb2.Timer(ticks=1, settime_flags=1, vsec=0, vnsec=0, isec=1, insec=0))
        images.write_image(folder / "files.img", images.FILES, [timer.SerializeToString()])
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _packed(files: dict[str, bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(content)) + content for content in files.values())


_IMAGES = _images()


def _read_images(data: bytes) -> None:
    """All files of an image, one behind the other, each led by its length; each is read, whatever is wrong with another."""
    torn: ImageError | None = None
    with _folder() as folder:
        for name in _IMAGES:
            length = int.from_bytes(data[:4], "little")
            (folder / name).write_bytes(data[4 : 4 + length])
            data = data[4 + length :]
        reads: tuple[Callable[[Path], object], ...] = (
            images.rights,
            images.process_ids,
            images.kernel_written,
            images.opened,
            images.mend_timers,
            lambda folder: [run.length for run in images.split(folder)],
            lambda folder: list(images.skeletons(folder)),
        )
        for read in reads:
            try:
                read(folder)
            except ImageError as error:
                torn = error
    if torn is not None:
        raise torn


# --- what an engine had written


def _changes(*entries: tuple[str, bytes, dict[str, str]]) -> bytes:
    data = io.BytesIO()
    with tarfile.TarFile(None, "w", data, format=tarfile.PAX_FORMAT, pax_headers={"ZEROWAKE.first": "1"}) as tar:
        for name, content, headers in entries:
            entry = tarfile.TarInfo(name)
            entry.size, entry.pax_headers = len(content), headers
            if content.startswith(b"-> "):
                entry.type, entry.linkname, entry.size = tarfile.SYMTYPE, content[3:].decode(), 0
            tar.addfile(entry, io.BytesIO(content))
    return data.getvalue()


@functools.cache
def _root() -> Path:
    """A file system of its own, as a place has one, in a folder that is ours alone, for as long as this process lives. Needs root."""
    root = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm"), "root")
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "fuzz", root], check=True)
    atexit.register(lambda: (subprocess.run(["umount", root], check=True), shutil.rmtree(root.parent)))
    return root


def _lay_out(data: bytes) -> None:
    root = _root()
    (root / "dev/shm").mkdir(parents=True)
    with _folder() as folder:
        source = folder / CHANGES_FILE
        source.write_bytes(data)
        changes = Changes(source, root)
        try:
            changes.put_first()
            changes.put_rest()
        finally:
            assert list(root.parent.iterdir()) == [root], "it was written outside of the place"
            for path in root.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()


# --- other agents


def _offers() -> Offers:
    offered = Offered("default", _HASH, b"{}", b"{}", [Chunk(_HASH, 4)])
    return Offers(lambda digest: offered if digest == _HASH else None)


_OFFERS = _offers()


def _read_request(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        ours.settimeout(5)
        for asked in peer_server._requests(ours):  # type: ignore[arg-type]
            assert 0 <= peer_server._wait(asked) <= peer_server.LONGEST_WAIT
            first, last = peer_server._part(asked.headers.get("range", ""), 100)
            assert first >= 0 and last < 100
            namespace, _, rest = asked.path.removeprefix("/").partition("/")
            digest, _, key = rest.partition("/")
            try:
                assert len(_OFFERS.get(namespace, digest).get(key, 0)) == 2  # type: ignore[arg-type]
            except TransferError:
                continue


def _read_answer(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        connection = Connection(Address("127.0.0.1", 1), "peer", lambda: None, lambda _: None)
        connection._socket = ours
        size = connection.ask("GET", "/", {}, 0)
        room = memoryview(bytearray(min(size, 100)))
        while room:
            room = room[connection.read_into(room) :]


def parsers() -> Iterator[Parser]:
    yield Parser("manifest", (_manifest(), _manifest(weights=(), gpus={})), _read_manifest, (InvalidManifest, InvalidName))
    yield Parser("layout", (_LAYOUT.SerializeToString(),), _read_layout, (Corrupt,))
    yield Parser("page-index", (_INDEX,), _read_index, (FillError,))
    record = {"record": {"namespace": "a", "name": "b", "digest": _HASH, "sequence": 3, "published": ""}, "signature": {"key": "0" * 16}}
    signature = Signature("0123456789abcdef", bytes(64)).encode()
    yield Parser("records", (json.dumps(record).encode(), signature, Claim(_HASH, (_HASH,)).encode()), _read_records, ())
    yield Parser("sealed", _SEALED, _read_sealed, (Spoiled,))
    yield Parser("criu-images", (_packed(_IMAGES),), _read_images, (ImageError,))
    holes = {"GNU.sparse.map": "0,1,4,2", "GNU.sparse.size": "9"}
    tars = (_changes(("a", b"1", {}), ("b", b"", {})), _changes(("c", b"123", holes)))
    links = _changes(("tmp", b"-> ../../..", {}), ("tmp/x", b"2", {})), _changes(("tmp", b"-> /etc", {}), ("tmp/x", b"2", {}))
    yield Parser("changes", tars, _lay_out, (OverlayError,), links)
    gets = (
        f"GET /default/{_HASH}/snapshots/{_HASH}/manifest.json HTTP/1.1\r\nHost: a\r\nRange: bytes=0-9\r\nPrefer: wait=5\r\n\r\n",
        f"GET /default/{_HASH}/chunks/ab/{_HASH} HTTP/1.1\r\n\r\nHEAD /../../etc/passwd HTTP/1.1\r\n\r\n",
    )
    yield Parser("peer-requests", tuple(each.encode() for each in gets), _read_request, (peer_server._BadRequest,))
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nwell"
    others = b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno", b"HTTP/1.1 206 Part\r\nConnection: close\r\n\r\n"
    yield Parser("peer-answers", (whole,), _read_answer, (TransferError,), others)
