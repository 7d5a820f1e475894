"""`zerowake key …` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from restore_agent.snapshots.encryption_keys import EncryptionKeys
from restore_agent.snapshots.keyring import Keyring
from tests.worlds.command import zerowake


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The public key of another node."""
    keyring = Keyring(tmp_path / "other")
    path = keyring.public_file(keyring.make())
    assert path is not None
    return path


async def test_keys_are_made_listed_trusted_and_revoked(tmp_path: Path, other: Path) -> None:
    state = ("--state", str(tmp_path / "state"))
    said = await zerowake("key", "make", *state)
    keyring = Keyring(tmp_path / "state" / "keys")
    first = keyring.signing
    assert f"key {first} signs from now on" in said
    assert f"`zerowake key trust {keyring.public_file(first)}`" in said
    assert f"key {other.stem} is trusted" in await zerowake("key", "trust", *state, str(other))
    assert f"key {first}, which signed before, stays trusted" in await zerowake("key", "make", *state)
    assert f"key {first} is revoked" in await zerowake("key", "revoke", *state, first)
    rows = [line.split() for line in (await zerowake("key", "list", *state)).splitlines()]
    assert sorted(row[:2] for row in rows[1:]) == sorted([[keyring.signing, "signs"], [other.stem, "trusted"], [first, "revoked"]])
    listed = {each["key"]: each for each in json.loads(await zerowake("key", "list", "-o", "json", *state))}
    assert listed[keyring.signing] == {"key": keyring.signing, "status": "signs", "file": str(keyring.public_file(keyring.signing))}
    assert listed[first] == {"key": first, "status": "revoked", "file": None}


async def test_a_key_to_encrypt_by_is_made_changed_and_listed(tmp_path: Path) -> None:
    state = ("--state", str(tmp_path / "state"))
    keys = EncryptionKeys(tmp_path / "state" / "keys")
    said = await zerowake("key", "make", "--encryption", *state)
    [first] = keys.all()
    assert f"key {first} encrypts what this node puts into stores from now on" in said and str(keys.writes_by) in said
    said = await zerowake("key", "make", "--encryption", *state)
    second = next(iter(keys.all()))
    kept = keys.folder / "encryption" / f"{first}.key"
    assert f"key {first}, which encrypted before, still decrypts" in said and f"remove {kept}" in said
    rows = [line.split() for line in (await zerowake("key", "list", *state)).splitlines()]
    assert [row[:2] for row in rows[1:]] == [[second, "encrypts"], [first, "decrypts"]]
    keys.writes_by.write_text("no key")
    assert f"{keys.writes_by} is no key" in (line := await zerowake("key", "list", *state, code=1))
    assert line.count("\n") == 1


async def test_keys_in_a_folder_that_is_named(tmp_path: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROWAKE_KEYS", str(tmp_path / "fleet"))
    await zerowake("key", "trust", str(other))
    assert Keyring(tmp_path / "fleet").trusted == [other.stem]
    assert Keyring(tmp_path / "fleet").signing == ""


async def test_what_is_no_key_is_refused_in_one_line(tmp_path: Path, other: Path) -> None:
    state = ("--state", str(tmp_path / "state"))
    (tmp_path / "no.pem").write_text("no key")
    for words, said in (
        (("trust", str(tmp_path / "no.pem")), "that is no Ed25519 public key in PEM"),
        (("trust", str(tmp_path / "nothing.pem")), f"{tmp_path / 'nothing.pem'} cannot be read: No such file"),
        (("trust", str(tmp_path / "other" / "signing.pem")), "that is no Ed25519 public key in PEM"),
        (("revoke", "0123"), "no key 0123 is trusted here (none)"),
    ):
        assert said in (line := await zerowake("key", *words, *state, code=1))
        assert line.count("\n") == 1
    (tmp_path / "state").touch()
    assert (await zerowake("key", "make", *state, code=1)).count("\n") == 1
