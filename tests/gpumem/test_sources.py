"""A request to fill: each file travels once, and none stays open for a request that was never made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from zerowake_proto import gpumem_pb2 as pb

from gpumem.wire.sources import Source, close_files, fill_request
from tests.worlds.processes import descriptors


def test_a_file_is_sent_once_however_many_sources_lie_in_it(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"1")
    other.write_bytes(b"2")
    sources = [Source(one, 100, 0, 2), Source(other, 0, 2, 1), Source(one, 7, 3, 4)]
    request, files = fill_request(pb.Layout(size=9), sources, "host", pinned=True)
    assert [os.pread(fd, 1, 0) for fd in files] == [b"1", b"2"]
    assert [(s.file, s.offset, s.first_chunk, s.chunks) for s in request.fill.sources] == [(0, 100, 0, 2), (1, 0, 2, 1), (0, 7, 3, 4)]
    assert (request.fill.device, request.fill.pinned, pb.Layout.FromString(request.fill.layout).size) == ("host", True, 9)
    close_files(files)


def test_a_serialized_layout_goes_as_it_is() -> None:
    request, _ = fill_request(b"whatever its id was made of", [], "", pinned=False)
    assert request.fill.layout == b"whatever its id was made of"


@pytest.mark.usefixtures("no_garbage")
def test_a_file_that_is_missing_leaves_none_open(tmp_path: Path) -> None:
    before = descriptors(os.getpid())
    (tmp_path / "one").touch()
    with pytest.raises(FileNotFoundError, match="missing"):
        fill_request(pb.Layout(), [Source(tmp_path / "one", 0, 0, 1), Source(tmp_path / "missing", 0, 1, 1)], "", pinned=False)
    assert len(descriptors(os.getpid())) == len(before)
