"""Released wheels on PyPI, read where they lie: the files that are asked for, by ranges, and never a whole wheel of hundreds of MB.

What was read stays in .cache/engines/, by the wheel's name; which releases there are is asked each time. Where PyPI does not answer that is
an error, which says so: what could not be looked at is not fine.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import requests
from packaging.utils import parse_wheel_filename
from packaging.version import Version
from remotezip import RemoteIOError, RemoteZip
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

INDEX = "https://pypi.org/simple"
SERIES = {"vllm": ("0.23", 2), "sglang": ("0.5.17", 3)}  # from which version on, and how many of its numbers make a series
CACHE = Path(__file__).parents[2] / ".cache/engines"
_DIRECTORY = 1 << 20  # bytes; more than the list of files of any of these wheels, so that it comes in one piece
_TIMEOUT = 30.0  # seconds without a byte


class NotReachable(Exception):
    """PyPI does not answer, or not as it should."""


@dataclass(eq=False)
class Release:
    """One released version, by one of its wheels: they differ in what was compiled, not in Python."""

    project: str
    version: Version
    url: str
    kept: Path = CACHE
    _wheel: RemoteZip | None = field(default=None, repr=False)
    _files: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{self.project} {self.version}"

    @property
    def files(self) -> frozenset[str]:
        """The names of all files."""
        if not self._files:
            names = json.loads(self._cached("FILES.json", lambda: json.dumps(self._open().namelist()).encode()))
            self._files = frozenset(names)
        return self._files

    def read(self, path: str) -> str | None:
        """A file's text; None: there is no such file. Raises NotReachable."""
        if path not in self.files:
            return None
        return self._cached(path, lambda: self._open().read(path)).decode()

    def text(self, path: str) -> str:
        """The text of a file that has to be there."""
        content = self.read(path)
        assert content is not None, f"{self} has no {path}"
        return content

    def _cached(self, name: str, fetch: Callable[[], bytes]) -> bytes:
        path = self.kept / Path(self.url).stem / name
        if not path.is_file():
            try:
                content = fetch()
            except (RemoteIOError, requests.RequestException, zipfile.BadZipFile) as error:
                raise NotReachable(f"{name} of {self.url} cannot be read: {error}") from error
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(f".{path.name}.{os.getpid()}")
            fresh.write_bytes(content)
            fresh.replace(path)
        return path.read_bytes()

    def _open(self) -> RemoteZip:
        if self._wheel is None:
            self._wheel = RemoteZip(self.url, initial_buffer_size=_DIRECTORY, session=_session(), timeout=_TIMEOUT)
        return self._wheel


@cache
def released(project: str) -> list[Release]:
    """What is looked at of one of `SERIES`. Raises NotReachable."""
    since, parts = SERIES[project]
    return releases(project, since=since, parts=parts)


def releases(project: str, *, since: str, parts: int, index: str = INDEX) -> list[Release]:
    """The newest release of each series that PyPI has, oldest first; two with the same first `parts` numbers are of one series.

    Raises:
        NotReachable: PyPI does not answer.
    """
    newest: dict[tuple[int, ...], tuple[tuple[Any, ...], str]] = {}
    for file in _listed(project, index):
        if not file["filename"].endswith("x86_64.whl") or file.get("yanked"):
            continue
        _, version, build, _ = parse_wheel_filename(file["filename"])
        if version >= Version(since) and not version.is_prerelease:
            # A wheel that was built again replaces the first; of several Pythons' any will do.
            found = ((version, build, file["filename"]), file["url"])
            newest[version.release[:parts]] = max(newest.get(version.release[:parts], found), found)
    return [Release(project, order[0], url) for _, (order, url) in sorted(newest.items())]


def _listed(project: str, index: str) -> list[dict[str, Any]]:
    try:
        answer = _session().get(f"{index}/{project}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}, timeout=_TIMEOUT)
        answer.raise_for_status()
        files: list[dict[str, Any]] = answer.json()["files"]
    except (requests.RequestException, KeyError, ValueError) as error:
        raise NotReachable(f"which releases of {project} there are cannot be asked of {index}: {error}") from error
    return files


@cache
def _session() -> requests.Session:
    session = requests.Session()
    session.mount("https://", HTTPAdapter(max_retries=Retry(3, backoff_factor=0.5, status_forcelist=[429, 500, 502, 503, 504])))
    return session
