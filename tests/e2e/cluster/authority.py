"""The cluster's certificates and the kubeconfigs that carry them, as files, made anew at each start: they are worth nothing afterwards."""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Sequence
from pathlib import Path

from tests.worlds import certificates

_LIFETIME = datetime.timedelta(days=30)


class Authority:
    """One authority; what it issues is written into its folder as NAME.crt and NAME.key, its own pair as AUTHORITY.crt and .key."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._authority = certificates.Authority(name, _LIFETIME)
        self.certificate, _ = self._authority.own.write(folder, name)

    def issue(self, file: str, name: str, groups: Sequence[str] = (), hosts: Sequence[str] = ()) -> None:
        """For a client called `name` in `groups`, and for a server that answers to `hosts`."""
        self._authority.issue(name, groups, hosts).write(self._folder, file)

    def kubeconfig(self, path: Path, server: str, name: str, groups: Sequence[str] = ()) -> Path:
        """For the client called `name`. The pair is inside, so the file works wherever it is copied."""
        pair = self._authority.issue(name, groups, ())
        user = {"client-certificate-data": _base64(pair.certificate), "client-key-data": _base64(pair.key)}
        cluster = {"server": server, "certificate-authority-data": _base64(self._authority.certificate)}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "zerowake", "cluster": cluster}],
            "users": [{"name": name, "user": user}],
            "contexts": [{"name": "zerowake", "context": {"cluster": "zerowake", "user": name}}],
            "current-context": "zerowake",
        }
        path.write_text(json.dumps(content, indent=1))
        path.chmod(0o600)
        return path


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
