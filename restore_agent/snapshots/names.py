"""Which snapshot a name means where snapshots are kept for many nodes: a signed record, counted up whenever the name is given anew.

A record is signed, so whoever can write to the store cannot make one; but they can bring back an older one, which is signed as well: a
snapshot with a hole that is closed by now, say. So every node remembers the highest number that it has seen of each name, and refuses a
lower one. That memory is no cache: a node that has lost it would take an older record again.

A name that is withdrawn has a record, too: one without a digest, above the number of the one before. So who has seen it takes none of the
older ones for the name any more, and who gives the name anew counts on from it. It stays where it is for ever: without it a node that has
seen none of the numbers would begin at 1 again, and the others would refuse that.

Rejected: a time instead of a number (clocks of nodes differ, and one that is ahead could never be followed), and one list of all names
(two who publish at once would take each other's names away).
"""

from __future__ import annotations

import json
import threading
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from restore_agent.snapshots.keyring import Keyring, Signature, Untrusted
from restore_agent.snapshots.manifest import check_name
from zerowake_shared import durable
from zerowake_shared.json_text import parsed

_FILE = "sequences.json"


class Replayed(Untrusted):
    """A record is older than one that this node has seen."""


class NameRecord(BaseModel):
    """`digest`: empty where the name was withdrawn. `sequence`: higher than that of every record of this name before. `published`: ISO
    8601, UTC; for people."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    namespace: str
    name: str
    digest: str
    sequence: int = Field(gt=0)
    published: str

    @field_validator("namespace", "name")
    @classmethod
    def _named(cls, value: str) -> str:
        return check_name("name", value)

    def encode_signed(self, keyring: Keyring) -> bytes:
        """Raises NoSigningKey, Untrusted: a file of the keyring is no key."""
        signature = keyring.sign(self._signed())
        return (json.dumps({"record": self.model_dump(), "signature": json.loads(signature.encode())}, sort_keys=True) + "\n").encode()

    @classmethod
    def decode_signed(cls, data: bytes, keyring: Keyring, namespace: str, name: str) -> NameRecord:
        """The record of that name. Raises Untrusted: it is none, is another name's, or bears no signature that counts here."""
        named = f"the record of the name {namespace}/{name}"
        try:
            said = parsed(data)
            record, signature = cls.model_validate(said["record"]), said.get("signature")
        except (ValidationError, ValueError, LookupError, TypeError, AttributeError):
            raise Untrusted(f"{named} is torn; publish it again") from None
        try:
            keyring.verify(record._signed(), Signature.decode(None if signature is None else json.dumps(signature).encode()))
        except Untrusted as error:
            raise Untrusted(f"{named}: {error}") from None
        if (record.namespace, record.name) != (namespace, name):
            raise Untrusted(f"{named} is that of {record.namespace}/{record.name}; somebody has moved it: publish it again")
        return record

    def _signed(self) -> bytes:
        return json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":")).encode()


def says_withdrawn(data: bytes) -> bool:
    """Whether a record, of which nothing is verified, is that of a name that was withdrawn."""
    try:
        return bool(parsed(data)["record"]["digest"] == "")
    except (ValueError, LookupError, TypeError):
        return False


class SeenNames:
    """The highest number of each name that this node has seen, in its state folder. Its calls block; any thread may make them."""

    def __init__(self, state: Path) -> None:
        self._path = state / _FILE
        self._lock = threading.Lock()

    def last(self, namespace: str, name: str) -> int:
        """0: none. Raises Untrusted: what was seen can no longer be read."""
        return self._read().get(f"{namespace}/{name}", 0)

    def accept(self, record: NameRecord) -> None:
        """Remembers it. Raises Replayed: it is older than one that was seen; Untrusted: what was seen can no longer be read; OSError."""
        key = f"{record.namespace}/{record.name}"
        with self._lock:
            seen = self._read()
            if record.sequence < seen.get(key, 0):
                raise Replayed(
                    f"the record of the name {key} has number {record.sequence}, and number {seen[key]} was seen here: somebody brought "
                    "back an older one; publish it again"
                )
            if record.sequence > seen.get(key, 0):
                durable.replace(self._path, json.dumps(seen | {key: record.sequence}, sort_keys=True).encode(), 0o600)

    def _read(self) -> dict[str, int]:
        data = durable.content(self._path)
        try:
            return {str(key): int(number) for key, number in dict(json.loads(data or b"{}")).items()}
        except (ValueError, TypeError):
            raise Untrusted(
                f"{self._path} is torn, so older records of names could not be told from newer ones; remove it to take whatever comes first"
            ) from None
