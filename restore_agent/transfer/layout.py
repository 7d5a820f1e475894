"""Where what is in a store: the same keys in a folder, a bucket and an agent, below whatever prefix the store has.

    chunks/ab/<BLAKE3>                    all bytes: pages, small files, weights
    snapshots/<digest>/manifest.json      and signature.json
    names/<namespace>/<name>.json         which digest a name stands for, or that it was withdrawn: a signed record

    leases/<kind>-<random>.json           an upload or a collection that is at work (leases.py)

    store.json                            what kind of store it is: plain, or encrypted and by which key (opened_store.py)

In an encrypted store chunks have other names, and everything but names and store.json is encrypted (sealed.py).

Writers put the chunks first, then the manifest, then the name. So what is named is whole, wherever a writer was ended.
"""

from __future__ import annotations

from restore_agent.snapshots.catalog import MANIFEST
from restore_agent.snapshots.keyring import SIGNATURE

CHUNKS, SNAPSHOTS, NAMES, LEASES = "chunks", "snapshots", "names", "leases"
DESCRIPTION = "store.json"
LIMIT = 64 << 20  # bytes that a manifest, a signature or a name may have: they are read before anything says how large they are


def chunk_key(chunk_hash: str) -> str:
    return f"{CHUNKS}/{chunk_hash[:2]}/{chunk_hash}"


def manifest_key(digest: str) -> str:
    return f"{SNAPSHOTS}/{digest}/{MANIFEST}"


def signature_key(digest: str) -> str:
    return f"{SNAPSHOTS}/{digest}/{SIGNATURE}"


def name_key(namespace: str, name: str) -> str:
    return f"{NAMES}/{namespace}/{name}.json"


def is_readable(key: str) -> bool:
    """It is not encrypted in an encrypted store, either."""
    return key == DESCRIPTION or key.startswith(f"{NAMES}/")
