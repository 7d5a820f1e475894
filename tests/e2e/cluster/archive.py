"""An image of one layer, made from a folder without any tool: `python -m tests.e2e.cluster.archive FOLDER NAME ARCHIVE COMMAND…`."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import sys
import tarfile
from pathlib import Path

OCI = "application/vnd.oci.image"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def write_archive(root: Path, name: str, archive: Path, command: list[str]) -> None:
    """The same folder gives the same archive: no times, no owners."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for path in sorted(root.rglob("*")):
            tar.add(path, str(path.relative_to(root)), recursive=False, filter=_plain)
    blobs: dict[str, bytes] = {}

    def blob(kind: str, content: bytes) -> dict[str, object]:
        digest = hashlib.sha256(content).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = content
        return {"mediaType": f"{OCI}.{kind}", "digest": f"sha256:{digest}", "size": len(content)}

    content = layer.getvalue()
    root_fs = {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(content).hexdigest()}"]}
    settings = {"Entrypoint": command, "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]}
    config = blob(
        "config.v1+json", _json({"architecture": ARCHITECTURES[platform.machine()], "os": "linux", "config": settings, "rootfs": root_fs})
    )
    manifest = {"schemaVersion": 2, "config": config, "layers": [blob("layer.v1.tar", content)]}
    named = blob("manifest.v1+json", _json(manifest)) | {"annotations": {"io.containerd.image.name": name}}
    files = {"oci-layout": _json({"imageLayoutVersion": "1.0.0"}), "index.json": _json({"schemaVersion": 2, "manifests": [named]}), **blobs}
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w") as tar:
        for member_name, data in files.items():
            member = tarfile.TarInfo(member_name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


if __name__ == "__main__":
    write_archive(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
