"""Keys to encrypt by, in files of a folder: one encrypts, all decrypt, and what is no key is an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from restore_agent.snapshots.encryption_keys import EncryptionKey, EncryptionKeys, NoEncryptionKey


@pytest.fixture
def keys(tmp_path: Path) -> EncryptionKeys:
    return EncryptionKeys(tmp_path / "keys")


def test_a_folder_without_any_encrypts_nothing(keys: EncryptionKeys) -> None:
    assert keys.encrypts() is None
    assert keys.all() == {}


def test_a_key_is_its_owner_s_alone_and_is_known_by_what_it_is(keys: EncryptionKeys) -> None:
    identity = keys.make()
    made = keys.encrypts()
    assert made is not None and made.id == identity
    assert keys.writes_by.stat().st_mode & 0o777 == 0o600
    assert keys.folder.stat().st_mode & 0o077 == 0
    secret = bytes.fromhex(keys.writes_by.read_text().strip())
    assert EncryptionKey.of(secret) == made
    assert len({secret, made.naming, made.sealing}) == 3
    assert secret.hex()[:16] != identity and made.sealing.hex() not in repr(made)


def test_a_new_key_encrypts_and_the_one_before_still_decrypts(keys: EncryptionKeys) -> None:
    first, second, third = (keys.make() for _ in range(3))
    assert (made := keys.encrypts()) and made.id == third
    assert next(iter(keys.all())) == third
    assert set(keys.all()) == {first, second, third}
    assert (keys.folder / "encryption" / f"{first}.key").stat().st_mode & 0o777 == 0o600
    (keys.folder / "encryption" / f"{first}.key").unlink()
    assert set(keys.all()) == {second, third}


def test_as_a_secret_has_them(keys: EncryptionKeys, tmp_path: Path) -> None:
    first, second = keys.make(), keys.make()
    mounted = EncryptionKeys(tmp_path)
    (tmp_path / "encryption.key").write_bytes(keys.writes_by.read_bytes())
    (tmp_path / "encryption-any.key").write_bytes((keys.folder / "encryption" / f"{first}.key").read_bytes())
    assert list(mounted.all()) == [second, first]


@pytest.mark.parametrize("mode", [0o644, 0o602, 0o604])
def test_one_that_is_open_to_everybody_encrypts_nothing(keys: EncryptionKeys, mode: int) -> None:
    keys.make()
    keys.writes_by.chmod(mode)
    with pytest.raises(NoEncryptionKey, match=rf"{keys.writes_by} is open to every user"):
        keys.encrypts()
    keys.make()
    assert keys.encrypts()


@pytest.mark.parametrize("name", ["encryption.key", "encryption/a.key", "encryption-a.key"])
@pytest.mark.parametrize("content", [b"", b"\xff" * 32, b"ab" * 31, b"ab" * 33, b"AB" * 32])
def test_a_file_that_is_no_key_is_named(keys: EncryptionKeys, name: str, content: bytes) -> None:
    path = keys.folder / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(NoEncryptionKey, match=f"{path} is no key"):
        keys.all()
