"""Snapshots of processes that never were: real files and chunks, published in a real store, by code that needs no root and no CRIU."""

from __future__ import annotations

import platform
import random
from pathlib import Path

from restore_agent.snapshots.catalog import Snapshot
from restore_agent.snapshots.chunks import Lease, write_chunks
from restore_agent.snapshots.compatibility import node_fits
from restore_agent.snapshots.manifest import CanaryRecord, ChunkRecord, EngineRecord, Manifest
from restore_agent.snapshots.page_runs import PAGE, Pages, write_index
from restore_agent.snapshots.store import Store, record_file

PID = 7  # in the image
ADDRESS = 1 << 32
CRIU = "4.2.1"
# Pages of two engines that have none in common.
CONTENT = random.Random(5).randbytes(64 * PAGE)
OTHER = random.Random(6).randbytes(64 * PAGE)


def pages(content: bytes, address: int = ADDRESS) -> Pages:
    return Pages(PID, address, memoryview(bytearray(content)))


def draft(lease: Lease, workspace: Path, content: bytes, name: str = "small", **fields: object) -> Manifest:
    """Everything of a snapshot but its name: files in `workspace`, chunks under the lease. `fields`: of the manifest, instead of ours."""
    (workspace / "images").mkdir()
    (workspace / "images" / "inventory.img").write_bytes(b"the skeleton of " + name.encode())
    chunks, index = write_chunks(lease, [pages(content)])
    write_index(workspace / "pages.index", index)
    usual = {
        "namespace": "default",
        "name": name,
        "model": name,
        "created": "2026-01-01T00:00:00.000+00:00",
        "engine": EngineRecord(command=("true",), port=8000),
        "canary": CanaryRecord(path="/", answer="yes"),
        "processes": (),
        "root_pid": PID,
        "stdio": ("pipe:[1]", "pipe:[2]"),
        "files": {str(path.relative_to(workspace)): record_file(path) for path in workspace.rglob("*") if path.is_file()},
        "chunks": tuple(ChunkRecord(hash=chunk.hash, size=chunk.size) for chunk in chunks),
        "host_bytes": len(content),
        "fits": node_fits(CRIU, [], None),
    }
    return Manifest(**(usual | fields))  # type: ignore[arg-type]


def publish(store: Store, content: bytes, name: str = "small", *, replace: bool = False, **fields: object) -> Snapshot:
    workspace = store.workspace()
    with store.chunks.lease() as lease:
        return store.publish(workspace, draft(lease, workspace, content, name, **fields), lease, replace=replace)


def another_kernel() -> str:
    return f"{int(platform.release().partition('.')[0]) + 1}.0.0"


def chunks(state: Path) -> set[str]:
    """Names of those that a state folder has."""
    return {path.name for path in (state / "chunks").glob("*/*")}
