"""Images of one layer, made without any tool: `python -m tests.e2e.cluster.archive FOLDER NAME ARCHIVE COMMAND…` makes one of a folder.

The layer is written straight into the archive, and the name that it has there, its hash, afterwards into the place that was left for it: an
image of an engine has ten gigabytes.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

OCI = "application/vnd.oci.image"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
COPIED_AT_ONCE = 1 << 20


def write_archive(root: Path, name: str, archive: Path, command: list[str]) -> None:
    """The same folder gives the same archive: no times, no owners."""
    with image_archive(name, archive, command) as layer:
        for path in sorted(root.rglob("*")):
            layer.add(path, str(path.relative_to(root)), recursive=False, filter=_plain)


@contextmanager
def image_archive(name: str, archive: Path, entrypoint: Sequence[str], env: Mapping[str, str] | None = None) -> Iterator[tarfile.TarFile]:
    """Yields the image's layer, to be filled. The archive has its name when it is whole."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    fresh = archive.with_suffix(".new")
    with fresh.open("wb") as file:
        file.seek(tarfile.BLOCKSIZE)  # the layer's own header
        hashed = _Hashed(file)
        with tarfile.open(fileobj=hashed, mode="w", copybufsize=COPIED_AT_ONCE) as layer:  # type: ignore[call-overload]
            yield layer
        digest, size = hashed.hash.hexdigest(), hashed.size
        _pad(file)
        root_fs = {"type": "layers", "diff_ids": [f"sha256:{digest}"]}
        settings = {"Entrypoint": list(entrypoint), "Env": [f"{key}={value}" for key, value in ({"PATH": PATH} | dict(env or {})).items()]}
        config = _json({"architecture": ARCHITECTURES[platform.machine()], "os": "linux", "config": settings, "rootfs": root_fs})
        layers = [{"mediaType": f"{OCI}.layer.v1.tar", "digest": f"sha256:{digest}", "size": size}]
        manifest = _json({"schemaVersion": 2, "config": _described("config.v1+json", config), "layers": layers})
        named = _described("manifest.v1+json", manifest) | {"annotations": {"io.containerd.image.name": name}}
        others = {
            _blob(hashlib.sha256(config).hexdigest()): config,
            _blob(hashlib.sha256(manifest).hexdigest()): manifest,
            "oci-layout": _json({"imageLayoutVersion": "1.0.0"}),
            "index.json": _json({"schemaVersion": 2, "manifests": [named]}),
        }
        for member, content in others.items():
            file.write(_header(member, len(content)) + content)
            _pad(file)
        file.write(bytes(2 * tarfile.BLOCKSIZE))
        file.seek(0)
        file.write(_header(_blob(digest), size))
    fresh.rename(archive)


class _Hashed:
    """A file that hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hash = hashlib.sha256()
        self.size = 0

    def write(self, content: bytes) -> int:
        self.hash.update(content)
        self.size += len(content)
        return self._file.write(content)

    def tell(self) -> int:
        return self.size


def _described(kind: str, content: bytes) -> dict[str, object]:
    return {"mediaType": f"{OCI}.{kind}", "digest": f"sha256:{hashlib.sha256(content).hexdigest()}", "size": len(content)}


def _blob(digest: str) -> str:
    return f"blobs/sha256/{digest}"


def _header(name: str, size: int) -> bytes:
    """One block; GNU's, which has room for sizes beyond 8 GiB."""
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % tarfile.BLOCKSIZE))


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


if __name__ == "__main__":
    write_archive(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
