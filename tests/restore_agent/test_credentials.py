"""Keys and settings out of Amazon's files: which profile, which file, and what is said of a torn one."""

from __future__ import annotations

from pathlib import Path

import pytest

from restore_agent.transfer.credentials import CredentialFiles
from restore_agent.transfer.source import Denied
from tests.worlds.virtual_time import StandingClock

KEYS = """
[default]
aws_access_key_id = a
aws_secret_access_key = b
[team]
aws_access_key_id = c
aws_secret_access_key = d
aws_session_token = e
"""
CONFIG = "[default]\nregion = eu-west-1\n[profile team]\nregion = eu-north-1\nendpoint_url = https://s3.example\n"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text(KEYS)
    (tmp_path / ".aws/config").write_text(CONFIG)
    return tmp_path


def test_the_default_profile_is_taken(home: Path) -> None:
    files = CredentialFiles({"HOME": str(home)}, StandingClock(1000.0))
    assert files.have_keys()
    assert files.settings() == {"region": "eu-west-1"}
    given = files()
    assert (given["access_key_id"], given["secret_access_key"], given["token"]) == ("a", "b", None)
    assert given["expires_at"] is not None and given["expires_at"].timestamp() == 1060.0


def test_a_profile_is_named(home: Path) -> None:
    files = CredentialFiles({"HOME": str(home), "AWS_PROFILE": "team"})
    assert files.settings() == {"region": "eu-north-1", "endpoint_url": "https://s3.example"}
    assert files()["token"] == "e"


def test_files_are_where_the_environment_says(home: Path, tmp_path: Path) -> None:
    (tmp_path / "mounted").write_text("[default]\naws_access_key_id = f\naws_secret_access_key = g\n")
    assert CredentialFiles({"HOME": str(home), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "mounted")})()["access_key_id"] == "f"


def test_the_environment_goes_before_files(home: Path) -> None:
    assert not CredentialFiles({"HOME": str(home), "AWS_ACCESS_KEY_ID": "z"}).have_keys()


def test_without_files_there_are_no_keys(tmp_path: Path) -> None:
    files = CredentialFiles({"HOME": str(tmp_path)})
    assert not files.have_keys()
    assert files.settings() == {}


def test_a_profile_that_is_named_and_has_no_key_is_said_unless_a_role_is_named(home: Path) -> None:
    environment = {"HOME": str(home), "AWS_PROFILE": "nobody"}
    with pytest.raises(Denied, match=r"AWS_PROFILE is nobody, and .*credentials has no aws_access_key_id below \[nobody\]"):
        CredentialFiles(environment).have_keys()
    assert not CredentialFiles(environment | {"AWS_WEB_IDENTITY_TOKEN_FILE": "/token"}).have_keys()


def test_half_a_key_and_a_torn_file_are_said(home: Path) -> None:
    (home / ".aws/credentials").write_text("[default]\naws_access_key_id = a\n")
    with pytest.raises(Denied, match=r"has no aws_secret_access_key below \[default\]"):
        CredentialFiles({"HOME": str(home)})()
    (home / ".aws/credentials").write_text("aws_access_key_id = a\n")
    with pytest.raises(Denied, match=r"\.aws/credentials cannot be read: "):
        CredentialFiles({"HOME": str(home)}).have_keys()
