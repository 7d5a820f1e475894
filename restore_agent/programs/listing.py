"""What a node has, listed: its snapshots and its keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.text import Text

from restore_agent.snapshots.catalog import Snapshot, Unreadable
from restore_agent.snapshots.encryption_keys import EncryptionKeys
from restore_agent.snapshots.keyring import Keyring
from zerowake_shared import tables
from zerowake_shared.output import Format, printed


def print_snapshots(found: Iterable[Snapshot | Unreadable], output: Format) -> None:
    """Sizes are megabytes for people, and bytes for programs; what cannot be used says why."""
    listed = [_snapshot(each) for each in found]
    if output is not Format.TEXT:
        printed(listed, output)
        return
    table = tables.table("NAMESPACE", "NAME", "DIGEST", "MODEL", "PAGES", "CRIU", "TAKEN")
    for each in listed:
        if each["unusable"]:
            table.add_row(each["namespace"], each["name"], Text("unusable", style="red"), each["unusable"], "", "", "")
        else:
            sizes = f"{each['page_bytes'] / 1e6:.0f} MB", f"{each['criu_bytes'] / 1e6:.1f} MB"
            table.add_row(each["namespace"], each["name"], each["digest"][:12], each["model"], *sizes, each["created"][:19])
    tables.console().print(table)


def print_keys(keyring: Keyring, encryption: EncryptionKeys, output: Format) -> None:
    """Those whose signatures count, those that were revoked, and those that stores are encrypted by, each with its file if it has one."""
    listed = [
        *(_key(each, "signs" if each == keyring.signing else "trusted", keyring.public_file(each)) for each in keyring.trusted),
        *(_key(each, "revoked", None) for each in keyring.revoked),
        *(_key(each, "encrypts" if path == encryption.writes_by else "decrypts", path) for each, (_, path) in encryption.all().items()),
    ]
    if output is not Format.TEXT:
        printed(listed, output)
        return
    table = tables.table("KEY", "STATUS", "FILE")
    for each in listed:
        table.add_row(each["key"], Text("revoked", style="red") if each["status"] == "revoked" else each["status"], each["file"] or "")
    tables.console().print(table)


def _snapshot(found: Snapshot | Unreadable) -> dict[str, Any]:
    if isinstance(found, Unreadable):
        return {"namespace": found.namespace, "name": found.name, "unusable": str(found.why)}
    manifest = found.manifest
    return {
        "namespace": manifest.namespace,
        "name": manifest.name,
        "unusable": None,
        "digest": found.digest,
        "model": manifest.model,
        "page_bytes": manifest.page_bytes,
        "criu_bytes": manifest.criu_bytes,
        "weights_bytes": manifest.weights_bytes,
        "created": manifest.created,
    }


def _key(key: str, status: str, file: object) -> dict[str, Any]:
    return {"key": key, "status": status, "file": str(file) if file else None}
