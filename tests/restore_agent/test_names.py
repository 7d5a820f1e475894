"""Names of snapshots: what a record says counts where its key does, for its own name, and never after a newer one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from restore_agent.snapshots.keyring import Keyring, NoSigningKey, Untrusted
from restore_agent.snapshots.names import NameRecord, Replayed, SeenNames


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    made = Keyring(tmp_path / "keys")
    made.make()
    return made


def record(sequence: int = 1, name: str = "chat", namespace: str = "models") -> NameRecord:
    return NameRecord(namespace=namespace, name=name, digest="ab" * 32, sequence=sequence, published="2026-01-01T00:00:00Z")


def test_what_is_signed_is_read_again(keyring: Keyring) -> None:
    data = record().encode_signed(keyring)
    assert NameRecord.decode_signed(data, keyring, "models", "chat") == record()


def test_a_record_of_another_name_is_not_taken_for_this_one(keyring: Keyring) -> None:
    """It is signed, and somebody has copied it."""
    data = record(name="other").encode_signed(keyring)
    with pytest.raises(Untrusted, match="the name models/chat is that of models/other"):
        NameRecord.decode_signed(data, keyring, "models", "chat")


@pytest.mark.parametrize("field", ["digest", "sequence", "published"])
def test_an_edited_record_does_not_count(keyring: Keyring, field: str) -> None:
    said = json.loads(record().encode_signed(keyring))
    said["record"][field] = 2 if field == "sequence" else "another"
    with pytest.raises(Untrusted, match="models/chat: it is not what key"):
        NameRecord.decode_signed(json.dumps(said).encode(), keyring, "models", "chat")


def test_unsigned_foreign_and_revoked_records_do_not_count(keyring: Keyring, tmp_path: Path) -> None:
    unsigned = json.dumps({"record": record().model_dump()}).encode()
    with pytest.raises(Untrusted, match="it is not signed"):
        NameRecord.decode_signed(unsigned, keyring, "models", "chat")
    other = Keyring(tmp_path / "other")
    other.make()
    with pytest.raises(Untrusted, match="not trusted here"):
        NameRecord.decode_signed(record().encode_signed(other), keyring, "models", "chat")
    data = record().encode_signed(keyring)
    keyring.revoke(keyring.signing)
    with pytest.raises(Untrusted, match="revoked"):
        NameRecord.decode_signed(data, keyring, "models", "chat")
    with pytest.raises(NoSigningKey):
        record().encode_signed(keyring)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"7", b"{}", b'{"record": {}}', b'{"record": []}', b"[" * 100_000])
def test_what_is_no_record(keyring: Keyring, data: bytes) -> None:
    with pytest.raises(Untrusted, match="is torn"):
        NameRecord.decode_signed(data, keyring, "models", "chat")


def test_a_name_that_could_be_a_path_is_in_no_record() -> None:
    with pytest.raises(ValueError, match="is not allowed"):
        record(name="../up")


def test_an_older_record_is_refused_by_whoever_has_seen_a_newer_one(tmp_path: Path) -> None:
    seen = SeenNames(tmp_path)
    assert seen.last("models", "chat") == 0
    for sequence in (1, 3, 3):
        seen.accept(record(sequence))
    again = SeenNames(tmp_path)  # of the next agent
    assert again.last("models", "chat") == 3
    with pytest.raises(Replayed, match="models/chat has number 2, and number 3 was seen here"):
        again.accept(record(2))
    again.accept(record(4))
    again.accept(record(1, name="other"))
    again.accept(record(1, namespace="tenant"))
    assert (seen.last("models", "chat"), seen.last("models", "other")) == (4, 1)


@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"models/chat": "x"}'])
def test_what_was_seen_and_is_torn_lets_nothing_pass(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "sequences.json").write_bytes(content)
    with pytest.raises(Untrusted, match=r"sequences\.json is torn"):
        SeenNames(tmp_path).accept(record())
