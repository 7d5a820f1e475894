"""Credentials and settings in the files that Amazon's own tools read: ~/.aws/credentials and ~/.aws/config.

obstore finds the others by itself: the environment, web identity (IRSA), the endpoints of containers (ECS, EKS) and of machines (IMDS). The
order is Amazon's: the environment, then these files, then roles. Files are read again before a minute is over: a Secret that is mounted
as one changes under a running agent.
"""

from __future__ import annotations

import configparser
import datetime
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from restore_agent.transfer.source import Denied
from zerowake_shared.clock import SYSTEM_CLOCK, Clock

if TYPE_CHECKING:
    from obstore.store import S3Credential

_FRESH = 60.0  # seconds for which what was read is used
_ROLES = ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")


class CredentialFiles:
    """One profile of these files: AWS_PROFILE, or `default`."""

    def __init__(self, environment: Mapping[str, str] = os.environ, clock: Clock = SYSTEM_CLOCK) -> None:
        folder = Path(environment.get("HOME") or "~").expanduser() / ".aws"
        self._credentials = Path(environment.get("AWS_SHARED_CREDENTIALS_FILE") or folder / "credentials")
        self._config = Path(environment.get("AWS_CONFIG_FILE") or folder / "config")
        self._named = environment.get("AWS_PROFILE", "")
        self._profile = self._named or "default"
        self._environment = environment
        self._clock = clock

    def have_keys(self) -> bool:
        """Whether credentials are to be taken from here. Raises Denied: the profile that AWS_PROFILE names has none, or a file is torn."""
        if "AWS_ACCESS_KEY_ID" in self._environment:
            return False
        found = "aws_access_key_id" in self._section()
        if self._named and not found and not any(name in self._environment for name in _ROLES):
            raise Denied(f"AWS_PROFILE is {self._named}, and {self._credentials} has no aws_access_key_id below [{self._named}]")
        return found

    def settings(self) -> dict[str, str]:
        """`region` and `endpoint_url`, as far as the files say them. Raises Denied: a file is torn."""
        section = self._section()
        return {key: section[key] for key in ("region", "endpoint_url") if key in section}

    def __call__(self) -> S3Credential:
        """For obstore, which calls it when the last answer has expired. Raises Denied."""
        section = self._section()
        try:
            return {
                "access_key_id": section["aws_access_key_id"],
                "secret_access_key": section["aws_secret_access_key"],
                "token": section.get("aws_session_token"),
                "expires_at": datetime.datetime.fromtimestamp(self._clock.wall() + _FRESH, datetime.UTC),
            }
        except KeyError as missing:
            raise Denied(f"{self._credentials} has no {missing.args[0]} below [{self._profile}]") from None

    def _section(self) -> dict[str, str]:
        found: dict[str, str] = {}
        in_config = self._profile if self._profile == "default" else f"profile {self._profile}"
        for path, name in ((self._config, in_config), (self._credentials, self._profile)):
            parser = configparser.RawConfigParser()
            try:
                parser.read(path)
            except (configparser.Error, UnicodeDecodeError) as error:
                raise Denied(f"{path} cannot be read: {' '.join(str(error).split())}") from None
            if parser.has_section(name):
                found |= parser.items(name)
        return found
