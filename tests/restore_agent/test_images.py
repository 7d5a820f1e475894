"""CRIU's images, split into pages that are ours to carry and a skeleton that CRIU restores; and what they would let processes do."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from zerowake_proto import criu_pb2

from restore_agent.pages import images
from restore_agent.pages.images import ImageError, rights, skeletons, split
from restore_agent.snapshots.catalog import Catalog
from restore_agent.snapshots.page_runs import PAGE, Pages, read_index
from tests.worlds.images import ANONYMOUS, FILE_PRIVATE, PID, READ, WRITE, scattered, write_image

ADDRESS, ABOVE = 1 << 32, 1 << 33
SIZE = 40 << 20


def taken(folder: Path) -> list[Pages]:
    """What `split` takes out; each run is copied before the next is asked for."""
    return [Pages(run.pid, run.address, memoryview(bytearray(run.data))) for run in split(folder)]


def noise(pages: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(pages * PAGE)


def test_long_zeros_are_left_out_and_short_ones_are_not(tmp_path: Path) -> None:
    content = scattered(SIZE)
    write_image(tmp_path, {ADDRESS: (content, READ | WRITE, ANONYMOUS)})
    runs = taken(tmp_path)
    assert sum(run.length for run in runs) < 0.8 * SIZE
    rebuilt, end = bytearray(SIZE), 0
    for run in runs:
        assert run.pid == PID
        at = run.address - ADDRESS
        assert bytes(run.data[-PAGE:]) != bytes(PAGE), "a run does not end in zeros"
        assert at == end or at - end >= PAGE
        rebuilt[at : at + run.length] = run.data
        end = at + run.length
    assert bytes(rebuilt) == content
    inside = [run for run in runs if any(not any(run.data[i : i + PAGE]) for i in range(PAGE, run.length - PAGE, PAGE))]
    assert inside, "short runs of zeros stay"


def test_zeros_of_a_private_file_mapping_stay_since_a_gap_would_show_the_file(tmp_path: Path) -> None:
    content = noise(2) + bytes(100 * PAGE) + noise(1, 2)
    write_image(tmp_path, {ADDRESS: (content, READ | WRITE, FILE_PRIVATE)})
    assert b"".join(bytes(run.data) for run in taken(tmp_path)) == content


def test_what_cannot_be_written_is_left_to_criu(tmp_path: Path) -> None:
    """And split again it has nothing of ours any more."""
    kept, ours = noise(300, 1), noise(300, 2)
    write_image(tmp_path, {ADDRESS: (kept, READ, ANONYMOUS), ABOVE: (ours, READ | WRITE, ANONYMOUS)})
    runs = taken(tmp_path)
    assert {run.address // ABOVE for run in runs} == {1}
    assert b"".join(bytes(run.data) for run in runs) == ours
    (skeleton,) = skeletons(tmp_path)
    assert b"".join(bytes(run.data) for run in skeleton.kept) == kept
    assert skeleton.anonymous == [(ABOVE, ABOVE + len(ours))]
    assert (tmp_path / "pages-1.img").read_bytes() == kept
    assert taken(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (f"pagemap-{PID}.img", "torn at byte"),
        (f"mm-{PID}.img", "torn at byte"),
        ("pages-1.img", "the dump is torn"),
    ],
)
def test_a_torn_file_is_named(tmp_path: Path, file: str, words: str) -> None:
    write_image(tmp_path, {ADDRESS: (noise(10), READ | WRITE, ANONYMOUS)})
    os.truncate(tmp_path / file, (tmp_path / file).stat().st_size - 1)
    with pytest.raises(ImageError, match=f"{file}.*{words}"):
        taken(tmp_path)


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    write_image(tmp_path, {ADDRESS: (noise(1), READ | WRITE, ANONYMOUS)})
    (tmp_path / f"mm-{PID}.img").write_bytes((tmp_path / f"pagemap-{PID}.img").read_bytes())
    with pytest.raises(ImageError, match=rf"mm-{PID}\.img does not begin as an image of its kind"):
        taken(tmp_path)


def test_what_was_only_read_of_a_mapped_file_is_not_in_the_image(captured: Path) -> None:
    """The server maps a file of 1 MiB privately, reads all of it and writes two pages; its child has the same mapping."""
    snapshot = Catalog(captured).get("default", "small")
    runs = read_index((snapshot.directory / "pages.index").read_bytes())
    found = []
    for mm in (snapshot.directory / "images").glob("mm-*.img"):
        (raw,) = images.read_image(mm, images._MM)
        for vma in criu_pb2.Mm.FromString(raw).vmas:
            if vma.status & images._FILE_PRIVATE and vma.prot == 3 and vma.end - vma.start == 1 << 20:
                inside = [run for run in runs if f"mm-{run.pid}" == mm.stem and vma.start <= run.address < vma.end]
                found.append(sum(run.length for run in inside))
    assert found == [2 * PAGE, 2 * PAGE]


def test_rights_of_an_image_are_those_of_its_processes(captured: Path) -> None:
    found = rights(Catalog(captured).get("default", "small").directory / "images")
    assert found.users == {0}
    assert found.filtered, "a sandbox starts its engine under a filter"
    assert found.beyond(found) == []


def test_rights_that_another_does_not_have_are_told_in_words() -> None:
    weak = images.Rights(frozenset({1000}), frozenset({1000}), 0, True, True)
    strong = images.Rights(frozenset({0}), frozenset({0, 5}), 1 << 6 | 1 << 7 | 1 << 21, False, False)
    assert weak.beyond(strong) == []
    assert strong.beyond(weak) == [
        "capabilities 6, 7, 21",
        "users 0",
        "groups 0, 5",
        "gaining rights (no no_new_privs)",
        "every system call (no seccomp filter)",
    ]


def timer(**fields: int) -> criu_pb2.File:
    usual = {"settime_flags": 0, "ticks": 0, "vsec": 0, "vnsec": 0, "isec": 0, "insec": 0}
    return criu_pb2.File(tfd=criu_pb2.Timer(**(usual | fields)))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"ticks": 3, "isec": 2, "insec": 5}, {"ticks": 3, "isec": 2, "insec": 5, "vsec": 2, "vnsec": 5}),  # periodic, has expired
        ({"settime_flags": 1, "vsec": 9, "vnsec": 7}, {"vsec": 9, "vnsec": 7}),  # set to a moment, 9 s from now
        ({"settime_flags": 1}, {}),  # set to none
        ({"ticks": 1}, {"ticks": 1}),  # once, has expired
        ({"vsec": 1, "isec": 1}, {"vsec": 1, "isec": 1}),
        ({"isec": 1}, {"isec": 1}),  # stopped
        ({"settime_flags": 3, "vsec": 9}, {"settime_flags": 3, "vsec": 9}),  # it wants to hear of the clock being set
    ],
)
def test_timers_are_written_so_that_they_go_on(tmp_path: Path, before: dict[str, int], after: dict[str, int]) -> None:
    other = b"\x08\x01\x10\x07\x92\x01\x02\x08\x09"  # a file of another kind, with fields that are not read
    images.write_image(tmp_path / "files.img", images.FILES, [other, timer(**before).SerializeToString()])
    images.mend_timers(tmp_path)
    kept, mended = images.read_image(tmp_path / "files.img", images.FILES)
    assert kept == other
    assert criu_pb2.File.FromString(mended) == timer(**after)


def test_what_criu_opens_is_known_by_name_unless_paths_are_watched(tmp_path: Path) -> None:
    files = [criu_pb2.File(reg=criu_pb2.RegularFile(name=name)) for name in (b"/usr/lib/one.so", b"/tmp/\xff")]
    files.append(criu_pb2.File(isk=criu_pb2.InetSocket()))
    images.write_open_files(tmp_path, files)
    assert images.opened(tmp_path) == {"usr/lib/one.so", "tmp/\udcff"}
    for watch in (criu_pb2.File(ify=b""), criu_pb2.File(ffy=b"")):
        images.write_open_files(tmp_path, [*files, watch])
        assert images.opened(tmp_path) is None
