"""Keys that stores are encrypted by, and objects in clear that are worth to compress or are not."""

from __future__ import annotations

import random
from hashlib import sha256

from restore_agent.snapshots.encryption_keys import EncryptionKey

RANDOM = random.Random(16).randbytes((4 << 20) - 4096)  # as weights are
PAGES = b"".join(random.Random(at).randbytes(1200).ljust(4096, b"\0") for at in range(1024))  # as an engine's are


def key(name: str) -> EncryptionKey:
    return EncryptionKey.of(sha256(name.encode()).digest())
