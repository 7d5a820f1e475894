"""Wheels that are read by ranges, from a PyPI of the test's own; and one that does not answer."""

from __future__ import annotations

import io
import json
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.engines.releases import NotReachable, releases

FILLER = 4 << 20  # bytes of a wheel that nobody asks for


class Index(ThreadingHTTPServer):
    """Files by their path, whole or in ranges; `sent` counts the bytes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.sent = 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Index)
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        whole, wanted = len(content), self.headers.get("Range")
        if wanted:
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            first = int(begin) if begin else max(0, whole - int(end))
            content = content[first : int(end) + 1 if begin and end else whole]
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{first + len(content) - 1}/{whole}")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.server.sent += len(content)

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


@pytest.fixture
def index() -> Iterator[Index]:
    server = Index()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def offer(index: Index, *wheels: str, yanked: str = "") -> None:
    listed = []
    for wheel in wheels:
        written = io.BytesIO()
        with zipfile.ZipFile(written, "w") as archive:
            archive.writestr("engine/filler.so", b"x" * FILLER)
            archive.writestr("engine/name.py", wheel)
        index.files[f"/{wheel}"] = written.getvalue()
        listed.append({"filename": wheel, "url": f"{index.url}/{wheel}", "yanked": wheel == yanked})
    index.files["/engine/"] = json.dumps({"files": listed}).encode()


def wheel(version: str, tags: str = "py3-none-manylinux_2_28_x86_64") -> str:
    return f"engine-{version}-{tags}.whl"


def test_the_newest_of_each_series_and_of_each_the_last_build(index: Index) -> None:
    arm = wheel("0.4.0", "py3-none-manylinux_2_28_aarch64")
    offer(
        index, wheel("0.2.9"), wheel("0.3.0"), wheel("0.3.10"), wheel("0.3.2"), wheel("0.3.11"), wheel("0.3.12rc1"), arm,
        wheel("0.10.0"), wheel("0.10.0-2"), yanked=wheel("0.3.11"),
    )  # fmt: skip
    found = releases("engine", since="0.3", parts=2, index=index.url)
    assert [each.url.rpartition("/")[2] for each in found] == [wheel("0.3.10"), wheel("0.10.0-2")]
    assert [str(each) for each in found] == ["engine 0.3.10", "engine 0.10.0"]
    assert [str(each.version) for each in releases("engine", since="0.3", parts=3, index=index.url)] == [
        "0.3.0",
        "0.3.2",
        "0.3.10",
        "0.10.0",
    ]


def test_a_file_is_read_without_the_wheel_and_once(index: Index, tmp_path: Path) -> None:
    offer(index, wheel("1.0"))
    for _ in range(2):
        (found,) = releases("engine", since="1", parts=2, index=index.url)
        found.kept = tmp_path
        assert found.read("engine/name.py") == wheel("1.0")
        assert found.read("engine/other.py") is None
        assert found.files == {"engine/filler.so", "engine/name.py"}
        index.files.pop(f"/{wheel('1.0')}", None)  # what was read is kept
    assert 0 < index.sent < FILLER


def test_where_nothing_answers_the_reason_is_said(index: Index, tmp_path: Path) -> None:
    with pytest.raises(NotReachable, match=r"which releases of engine there are cannot be asked of http.*: 404"):
        releases("engine", since="1", parts=2, index=index.url)
    offer(index, wheel("1.0"))
    (found,) = releases("engine", since="1", parts=2, index=index.url)
    found.kept = tmp_path
    index.files.pop(f"/{wheel('1.0')}")
    with pytest.raises(NotReachable, match=r"FILES\.json of .*engine-1.0.*404"):
        found.read("engine/name.py")
    assert not list(tmp_path.rglob("*.json")), "nothing half is kept"
