"""Keys in a folder: what they sign counts where they are trusted, until they are revoked, and nothing else does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

from restore_agent.snapshots.keyring import Keyring, NoSigningKey, Signature, Untrusted, UnusableKey

DATA = b"a manifest"


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    made = Keyring(tmp_path / "keys")
    made.make()
    return made


@pytest.fixture
def other(tmp_path: Path) -> Keyring:
    made = Keyring(tmp_path / "other")
    made.make()
    return made


def public(keyring: Keyring) -> bytes:
    path = keyring.public_file(keyring.signing)
    assert path is not None
    return path.read_bytes()


def of_another_kind() -> bytes:
    key = generate_private_key(SECP256R1()).public_key()
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def test_what_a_key_signs_counts_where_it_is(keyring: Keyring) -> None:
    signature = keyring.sign(DATA)
    assert signature.key == keyring.signing
    keyring.verify(DATA, Signature.decode(signature.encode()))
    Keyring(keyring.folder).verify(DATA, signature)


def test_the_private_key_is_its_owner_s_alone(keyring: Keyring) -> None:
    assert (keyring.folder / "signing.pem").stat().st_mode & 0o777 == 0o600
    assert keyring.folder.stat().st_mode & 0o077 == 0


def test_other_bytes_and_other_signatures_do_not_count(keyring: Keyring) -> None:
    signature = keyring.sign(DATA)
    with pytest.raises(Untrusted, match=f"not what key {signature.key} has signed"):
        keyring.verify(DATA + b" ", signature)
    flipped = bytes([signature.ed25519[0] ^ 1]) + signature.ed25519[1:]
    for wrong in (flipped, signature.ed25519[:-1], b""):
        with pytest.raises(Untrusted, match="not what key"):
            keyring.verify(DATA, Signature(signature.key, wrong))


_ID = b'{"key": "0123456789abcdef", "ed25519": '


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"key": "a"}', _ID + b'"*"}', _ID + b"1}", b"[" * 100_000])
def test_what_is_no_signature(data: bytes) -> None:
    with pytest.raises(Untrusted, match="torn"):
        Signature.decode(data)


@pytest.mark.parametrize("key", ["a", "0" * 17, "0123456789abcde\n", 7])
def test_a_key_that_is_no_id_is_in_no_message(key: object) -> None:
    with pytest.raises(Untrusted, match="torn"):
        Signature.decode(json.dumps({"key": key, "ed25519": ""}).encode())


def test_no_signature_at_all() -> None:
    with pytest.raises(Untrusted, match="not signed"):
        Signature.decode(None)


def test_a_foreign_key_counts_once_it_is_trusted(keyring: Keyring, other: Keyring) -> None:
    signature = other.sign(DATA)
    with pytest.raises(Untrusted, match=rf"{other.signing}, which is not trusted here; `zerowake key trust`"):
        keyring.verify(DATA, signature)
    assert keyring.trust(public(other)) == other.signing
    keyring.verify(DATA, signature)
    assert keyring.trusted == sorted([keyring.signing, other.signing])


def test_a_signature_that_names_another_key_than_signed_does_not_count(keyring: Keyring, other: Keyring) -> None:
    with pytest.raises(Untrusted, match="not what key"):
        keyring.verify(DATA, Signature(keyring.signing, other.sign(DATA).ed25519))


def test_a_revoked_key_counts_no_longer_and_in_a_ring_that_has_read_it_already_too(keyring: Keyring, other: Keyring) -> None:
    keyring.trust(public(other))
    running, signature = Keyring(keyring.folder), other.sign(DATA)
    running.verify(DATA, signature)
    before = running.identity
    keyring.revoke(other.signing)
    assert running.identity != before
    with pytest.raises(Untrusted, match=f"{other.signing}, which was revoked"):
        running.verify(DATA, signature)
    assert (running.trusted, running.revoked) == ([keyring.signing], [other.signing])
    with pytest.raises(UnusableKey, match="was revoked here"):
        keyring.trust(public(other))


def test_a_key_that_is_trusted_and_revoked_is_revoked(keyring: Keyring, other: Keyring) -> None:
    """Whoever adds a file to `trusted` brings nothing back."""
    keyring.trust(public(other))
    pem = public(other)
    keyring.revoke(other.signing)
    (keyring.folder / "trusted" / "again.pem").write_bytes(pem)
    with pytest.raises(Untrusted, match="which was revoked"):
        keyring.verify(DATA, other.sign(DATA))
    assert other.signing not in keyring.trusted


def test_a_key_that_is_not_here_cannot_be_revoked(keyring: Keyring) -> None:
    with pytest.raises(UnusableKey, match=rf"no key 0123 is trusted here \({keyring.signing}\)"):
        keyring.revoke("0123")


def test_another_key_takes_over_and_the_old_one_stays_trusted(keyring: Keyring) -> None:
    old, signature = keyring.signing, keyring.sign(DATA)
    new = keyring.make()
    assert keyring.signing == new != old
    keyring.verify(DATA, signature)
    keyring.verify(DATA, keyring.sign(DATA))
    keyring.revoke(old)
    with pytest.raises(Untrusted, match="revoked"):
        keyring.verify(DATA, signature)


def test_a_ring_without_a_key_to_sign_with_only_verifies(keyring: Keyring, tmp_path: Path) -> None:
    restores = Keyring(tmp_path / "restores")
    assert restores.is_empty()
    restores.trust(public(keyring))
    assert not restores.is_empty()
    assert restores.signing == ""
    restores.verify(DATA, keyring.sign(DATA))
    for does in (restores.check_signs, lambda: restores.sign(DATA)):
        with pytest.raises(NoSigningKey, match=r"has no signing\.pem, so this node only restores"):
            does()


def test_a_ring_whose_own_key_is_revoked_signs_nothing(keyring: Keyring) -> None:
    keyring.revoke(keyring.signing)
    assert keyring.trusted == []
    with pytest.raises(NoSigningKey, match="was revoked"):
        keyring.sign(DATA)
    keyring.make()
    keyring.check_signs()


@pytest.mark.parametrize("mode", [0o644, 0o602, 0o604])
def test_a_private_key_that_is_open_to_everybody_signs_nothing(keyring: Keyring, mode: int) -> None:
    signature, path = keyring.sign(DATA), keyring.folder / "signing.pem"
    path.chmod(mode)
    for attempt in (keyring.check_signs, lambda: keyring.sign(DATA)):
        with pytest.raises(NoSigningKey, match=rf"{path} is open to every user of this node.*chmod 600.*revoke {signature.key}"):
            attempt()
    keyring.verify(DATA, signature)
    path.chmod(0o440)
    assert keyring.sign(DATA) == signature


def test_keys_as_a_mounted_secret_has_them(keyring: Keyring, other: Keyring, tmp_path: Path) -> None:
    """No folders, names of anybody's choice, links through a folder that is exchanged as a whole."""
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    files = {"signing.pem": (keyring.folder / "signing.pem").read_bytes(), "trusted-other.pem": public(other)}
    for version in ("one", "two"):
        (mounted / version).mkdir()
        for name, data in files.items():
            (mounted / version / name).write_bytes(data)
        files = {"trusted-other.pem": data, "revoked-signing.pem": public(keyring)}
    (mounted / "..data").symlink_to("one")
    for name in ("signing.pem", "trusted-other.pem"):
        (mounted / name).symlink_to(f"..data/{name}")
    ring, ours, theirs = Keyring(mounted), keyring.sign(DATA), other.sign(DATA)
    ring.verify(DATA, ours)
    ring.verify(DATA, theirs)
    assert ring.signing == keyring.signing
    (mounted / "revoked-signing.pem").symlink_to("..data/revoked-signing.pem")
    with pytest.raises(Untrusted, match=r"revoked-signing\.pem is no"):
        ring.verify(DATA, theirs)  # the link leads nowhere yet: which key it revokes cannot be known
    (mounted / "..new").symlink_to("two")
    (mounted / "..new").replace(mounted / "..data")
    with pytest.raises(Untrusted, match="revoked"):
        ring.verify(DATA, ours)
    ring.verify(DATA, theirs)


@pytest.mark.parametrize("name", ["trusted/a.pem", "revoked/a.pem", "signing.pem"])
@pytest.mark.parametrize("content", [b"no key", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", of_another_kind()])
def test_a_file_that_is_no_key_trusts_nothing_and_is_named(keyring: Keyring, name: str, content: bytes) -> None:
    signature = keyring.sign(DATA)
    (keyring.folder / "revoked").mkdir(exist_ok=True)
    (keyring.folder / name).write_bytes(content)
    with pytest.raises(Untrusted, match=rf"{keyring.folder / name} is no Ed25519"):
        keyring.verify(DATA, signature)


@pytest.mark.parametrize("pem", [b"", b"no key", of_another_kind()])
def test_only_a_public_key_can_be_trusted(keyring: Keyring, pem: bytes) -> None:
    with pytest.raises(UnusableKey, match="no Ed25519 public key"):
        keyring.trust(pem)
    with pytest.raises(UnusableKey, match="no Ed25519 public key"):
        keyring.trust((keyring.folder / "signing.pem").read_bytes())


def test_keys_are_read_again_only_when_a_file_has_changed(keyring: Keyring, monkeypatch: pytest.MonkeyPatch) -> None:
    signature = keyring.sign(DATA)
    keyring.verify(DATA, signature)
    monkeypatch.setattr(Path, "read_bytes", pytest.fail)
    keyring.verify(DATA, signature)


def test_a_pair_that_could_not_be_written_leaves_the_old_one(keyring: Keyring, monkeypatch: pytest.MonkeyPatch) -> None:
    old = keyring.signing
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        keyring.make()
    monkeypatch.undo()
    assert keyring.signing == old
    assert not [path for path in keyring.folder.rglob("*") if path.name.startswith(".")]


def test_a_signature_is_a_small_json_file(keyring: Keyring) -> None:
    assert json.loads(keyring.sign(DATA).encode()).keys() == {"key", "ed25519"}
