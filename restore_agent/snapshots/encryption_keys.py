"""By which keys snapshots are encrypted where they lie in stores: 256 random bits each, as hex digits in files of the keyring's folder.

    encryption.key          the key that this node encrypts by (mode 0600); a node without one encrypts nothing
    encryption/<id>.key     keys that it decrypts by as well; any number, so that keys can be changed while both are in use

A key's ID is the first 16 hex digits of a BLAKE3 that is derived of the key: it is in every store, and says nothing of the key. It is
computed of what a file holds: no name of a file is believed. A folder that can hold no folders (a Secret, mounted) has
`encryption-<any>.key` beside its `encryption.key`. The files are read whenever a store is opened: an agent that runs follows at once.
Whatever cannot be read as a key is an error, never a key less.

Rejected: a random key in each store that these keys only wrap. A key could be changed without encrypting anew, but not taken from whoever
had it, all would hang on one small file of the store, and two who begin a store at once would each make one.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from restore_agent.errors import AgentError
from zerowake_shared import durable

_ENCRYPTS, _DECRYPTS = "encryption.key", "encryption"
_KEY = re.compile(r"[0-9a-f]{64}")
_ID_DIGITS = 16
_PURPOSE = "zerowake 2026-11-27 encryption of stores: "


class NoEncryptionKey(AgentError):
    """A file is no key, or none to encrypt by."""

    reason = "no-encryption-key"


@dataclass(frozen=True, slots=True)
class EncryptionKey:
    """Keys derived of one: `naming` for the names of chunks, `sealing` for what is in objects. `id`: hex digits."""

    id: str
    naming: bytes = field(repr=False)
    sealing: bytes = field(repr=False)

    @classmethod
    def of(cls, secret: bytes) -> EncryptionKey:
        def derived(purpose: str) -> bytes:
            return blake3(secret, derive_key_context=_PURPOSE + purpose).digest()

        return cls(derived("id").hex()[:_ID_DIGITS], derived("names"), derived("objects"))


class EncryptionKeys:
    """The keys in a folder. Its calls block on the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def writes_by(self) -> Path:
        """The file of the key that encrypts, if there is one."""
        return self.folder / _ENCRYPTS

    def encrypts(self) -> EncryptionKey | None:
        """The key that this node encrypts by. Raises NoEncryptionKey: its file is no key, or is open to everybody."""
        path = self.writes_by
        key = _read(path)
        if key and path.stat().st_mode & 0o007:
            raise NoEncryptionKey(
                f"{path} is open to every user of this node, so nothing is encrypted by it; make it its owner's (`chmod 600`), or if "
                "others may have it, `zerowake key make --encryption` another"
            )
        return key

    def all(self) -> dict[str, tuple[EncryptionKey, Path]]:
        """Every key that is here, and where, by ID; the one that encrypts first. Raises NoEncryptionKey: a file is no key."""
        found: dict[str, tuple[EncryptionKey, Path]] = {}
        for path in (self.writes_by, *sorted([*self.folder.glob(f"{_DECRYPTS}/*.key"), *self.folder.glob(f"{_DECRYPTS}-*.key")])):
            if key := _read(path):
                found.setdefault(key.id, (key, path))
        return found

    def make(self) -> str:
        """A new key, to encrypt by from now on; the one before still decrypts. Returns its ID.

        Raises OSError; NoEncryptionKey: what is there is no key.
        """
        before = _read(self.writes_by)
        secret = secrets.token_bytes(32)
        identity = EncryptionKey.of(secret).id
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if before:
            (self.folder / _DECRYPTS).mkdir(exist_ok=True, mode=0o700)
            durable.replace(self.folder / _DECRYPTS / f"{before.id}.key", self.writes_by.read_bytes(), 0o600)
        durable.replace(self.writes_by, f"{secret.hex()}\n".encode(), 0o600)
        return identity


def _read(path: Path) -> EncryptionKey | None:
    """None: there is no such file, or a link to nothing."""
    text = b""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise NoEncryptionKey(f"{path} cannot be read: {error.strerror}") from None
    with contextlib.suppress(ValueError):
        if _KEY.fullmatch(digits := text.decode("ascii").strip()):
            return EncryptionKey.of(bytes.fromhex(digits))
    raise NoEncryptionKey(f"{path} is no key: it has to hold 64 hex digits; `zerowake key make --encryption` makes one")
