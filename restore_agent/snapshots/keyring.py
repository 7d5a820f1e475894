"""Whose snapshots this node takes for true: Ed25519 keys as PEM files in a folder.

    signing.pem         the private key (PKCS8, mode 0600) that this node signs with; a node without one only restores
    trusted/<id>.pem    public keys whose signatures count; any number, so that keys can be changed while both are in use
    revoked/<id>.pem    public keys whose signatures count no longer, whatever else names them

A key's ID is the first 16 hex digits of the BLAKE3 of its raw public key. It is computed of what a file holds: no name of a file is
believed. So a folder that can hold no folders (a Secret, mounted) has `trusted-<any>.pem` and `revoked-<any>.pem` beside its `signing.pem`.

The folder is looked at whenever something is signed or verified, which costs a stat for each file: a key that is revoked counts no longer
from then on, in an agent that runs, too. Whatever cannot be read as a key is an error, never a key less: a revoked one might be meant.
Rejected: certificates (nothing here has a host name or an end in time, and clocks of nodes differ), and a key of each namespace (it is
agents who sign, and each captures for all namespaces).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from restore_agent.errors import AgentError, ErrorKind
from restore_agent.snapshots.unusable import Unusable
from zerowake_shared import durable
from zerowake_shared.json_text import parsed

SIGNATURE = "signature.json"  # beside what it signs
_SIGNING, _TRUSTED, _REVOKED = "signing.pem", "trusted", "revoked"
_ID_DIGITS = 16
_ID = re.compile(f"[0-9a-f]{{{_ID_DIGITS}}}")

_Identity = tuple[tuple[str, int, int, int], ...]


class Untrusted(Unusable):
    """Bytes bear no signature that counts here."""

    reason = "untrusted"


class NoSigningKey(AgentError):
    """This node signs nothing, so it can take no snapshot."""

    reason = "no-signing-key"


class UnusableKey(AgentError):
    """What was given is no key, or none that this can be done with."""

    kind = ErrorKind.INVALID
    reason = "invalid"


@dataclass(frozen=True)
class Signature:
    """Of some bytes, by the key with this ID."""

    key: str
    ed25519: bytes

    def encode(self) -> bytes:
        return (json.dumps({"key": self.key, "ed25519": base64.b64encode(self.ed25519).decode()}) + "\n").encode()

    @classmethod
    def decode(cls, data: bytes | None) -> Signature:
        """None: there is no such file. Raises Untrusted: it is no signature."""
        if data is None:
            raise Untrusted("it is not signed")
        try:
            fields = parsed(data)
            if not _ID.fullmatch(fields["key"]):  # what is said of it goes into messages
                raise ValueError
            return cls(fields["key"], base64.b64decode(fields["ed25519"], validate=True))
        except (ValueError, KeyError, TypeError, binascii.Error):
            raise Untrusted("its signature is torn") from None


@dataclass(frozen=True)
class _Keys:
    """What the folder held at a look at it."""

    signing: Ed25519PrivateKey | None = None
    trusted: dict[str, Ed25519PublicKey] = field(default_factory=dict)
    revoked: dict[str, Ed25519PublicKey] = field(default_factory=dict)

    @property
    def signing_id(self) -> str:
        return key_id(self.signing.public_key()) if self.signing else ""


class Keyring:
    """The keys in a folder. Its calls block on the disk; any number of threads may make them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._seen: tuple[_Identity, _Keys] = ((), _Keys())

    @property
    def signing(self) -> str:
        """ID of the key that signs; empty: there is none. Raises Untrusted: a file there is no key."""
        return self._keys().signing_id

    @property
    def trusted(self) -> list[str]:
        """IDs of the keys whose signatures count. Raises Untrusted: a file there is no key."""
        keys = self._keys()
        return sorted(keys.trusted.keys() - keys.revoked.keys())

    @property
    def revoked(self) -> list[str]:
        """Raises Untrusted: a file there is no key."""
        return sorted(self._keys().revoked)

    @property
    def identity(self) -> _Identity:
        """Another one whenever a key has come, gone, or been revoked."""
        return tuple((str(path), *_stat(path)) for path in self._files())

    def is_empty(self) -> bool:
        """No key of any kind is there."""
        return self.identity == ((str(self.folder / _SIGNING), 0, 0, 0),)

    def check_signs(self) -> None:
        """Raises NoSigningKey: `sign` would. Untrusted: a file there is no key."""
        self._signing_key()

    def sign(self, data: bytes) -> Signature:
        """Raises NoSigningKey, Untrusted: a file in the folder is no key."""
        key = self._signing_key()
        return Signature(key_id(key.public_key()), key.sign(data))

    def verify(self, data: bytes, signature: Signature) -> None:
        """Raises Untrusted: it is of a key that is not trusted here or was revoked, or not of these bytes."""
        keys = self._keys()
        if signature.key in keys.revoked:
            raise Untrusted(f"it is signed by key {signature.key}, which was revoked")
        public = keys.trusted.get(signature.key)
        if public is None:
            raise Untrusted(f"it is signed by key {signature.key}, which is not trusted here; `zerowake key trust` adds one")
        try:
            public.verify(signature.ed25519, data)
        except InvalidSignature:
            raise Untrusted(f"it is not what key {signature.key} has signed") from None

    def make(self) -> str:
        """A new pair, to sign with from now on; the key that signed before stays trusted. Returns its ID. Raises OSError."""
        key = Ed25519PrivateKey.generate()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        identity = self._add(_TRUSTED, key.public_key())
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        durable.replace(self.folder / _SIGNING, pem, 0o600)
        return identity

    def trust(self, pem: bytes) -> str:
        """Returns the key's ID. Raises UnusableKey: it is none, or it was revoked. OSError."""
        try:
            public = _public_key(pem)
        except ValueError:
            raise UnusableKey(
                "that is no Ed25519 public key in PEM; give a file of another node's `trusted` folder, or what `zerowake key list` names"
            ) from None
        if (identity := key_id(public)) in self._keys().revoked:
            raise UnusableKey(f"key {identity} was revoked here; to take that back, remove it from {self.folder / _REVOKED}")
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self._add(_TRUSTED, public)

    def revoke(self, identity: str) -> None:
        """Its signatures count no longer; it signs nothing either. Raises UnusableKey: no such key is here. OSError."""
        keys = self._keys()
        public = keys.trusted.get(identity)
        if public is None:
            known = ", ".join(keys.trusted) or "none"
            raise UnusableKey(f"no key {identity} is trusted here ({known}); to revoke another node's, trust it first")
        self._add(_REVOKED, public)
        for path in self._files_of(_TRUSTED):
            if key_id(_public_key(path.read_bytes())) == identity:
                path.unlink()

    def public_file(self, identity: str) -> Path | None:
        """Where the public key of that ID is kept, to take it to another node. Raises Untrusted: a file there is no key."""
        return next((path for path in self._files_of(_TRUSTED) if key_id(_read_public(path)) == identity), None)

    def _signing_key(self) -> Ed25519PrivateKey:
        keys = self._keys()
        if keys.signing is None:
            raise NoSigningKey(
                f"{self.folder} has no {_SIGNING}, so this node only restores; take snapshots on one that has it, or make a key there: "
                "`zerowake key make`"
            )
        if keys.signing_id in keys.revoked:
            raise NoSigningKey(f"key {keys.signing_id}, which this node signs with, was revoked; `zerowake key make` makes another")
        path = self.folder / _SIGNING
        if path.stat().st_mode & 0o007:
            raise NoSigningKey(
                f"{path} is open to every user of this node, and whoever has it may run programs on every node that trusts it; make it its "
                f"owner's (`chmod 600`), and if others may have it, `zerowake key make` another and revoke {keys.signing_id}"
            )
        return keys.signing

    def _keys(self) -> _Keys:
        identity = self.identity
        with self._lock:
            if self._seen[0] == identity:
                return self._seen[1]
        keys = self._read()
        with self._lock:
            self._seen = identity, keys
        return keys

    def _read(self) -> _Keys:
        signing = None
        path = self.folder / _SIGNING
        with contextlib.suppress(FileNotFoundError):
            try:
                loaded = serialization.load_pem_private_key(path.read_bytes(), None)
            except (ValueError, TypeError, UnsupportedAlgorithm):
                loaded = None
            if not isinstance(loaded, Ed25519PrivateKey):
                raise Untrusted(f"{path} is no Ed25519 private key in PEM without a password; `zerowake key make` makes one")
            signing = loaded
        trusted = {key_id(key): key for key in map(_read_public, self._files_of(_TRUSTED))}
        if signing:
            trusted[key_id(signing.public_key())] = signing.public_key()
        return _Keys(signing, trusted, {key_id(key): key for key in map(_read_public, self._files_of(_REVOKED))})

    def _files(self) -> list[Path]:
        return [self.folder / _SIGNING, *self._files_of(_TRUSTED), *self._files_of(_REVOKED)]

    def _files_of(self, kind: str) -> list[Path]:
        return sorted([*self.folder.glob(f"{kind}/*.pem"), *self.folder.glob(f"{kind}-*.pem")])

    def _add(self, kind: str, public: Ed25519PublicKey) -> str:
        identity = key_id(public)
        (self.folder / kind).mkdir(exist_ok=True, mode=0o700)
        pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        durable.replace(self.folder / kind / f"{identity}.pem", pem, 0o644)
        return identity


def key_id(key: Ed25519PublicKey) -> str:
    return blake3(key.public_bytes_raw()).hexdigest()[:_ID_DIGITS]


def _public_key(pem: bytes) -> Ed25519PublicKey:
    """Raises ValueError: it is none."""
    try:
        key = serialization.load_pem_public_key(pem)
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from None
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("a key of another kind")
    return key


def _read_public(path: Path) -> Ed25519PublicKey:
    try:
        return _public_key(path.read_bytes())
    except (OSError, ValueError):
        raise Untrusted(f"{path} is no Ed25519 public key in PEM, so nothing is trusted until it is removed or mended") from None


def _stat(path: Path) -> tuple[int, int, int]:
    """Zeros where there is nothing, or a link to nothing."""
    with contextlib.suppress(OSError):
        stat = path.stat()
        return stat.st_ino, stat.st_ctime_ns, stat.st_size
    return 0, 0, 0
