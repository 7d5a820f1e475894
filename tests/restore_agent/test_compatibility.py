"""What a node must have of a snapshot, and what of it is found to be missing before anything is moved."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from restore_agent.snapshots import file_hashes
from restore_agent.snapshots.compatibility import Incompatible, check_files, check_fits, check_gpus, mapped_files, node_fits
from restore_agent.snapshots.file_hashes import FileHashes
from restore_agent.snapshots.manifest import GpuRecord
from tests.worlds.exhausted import descriptors_left
from tests.worlds.snapshots import CRIU, another_kernel

GPUS = GpuRecord(driver="580.1", names=("H100",), uuids=("GPU-a",))
OTHERS = GpuRecord(driver="580.1", names=("H100",), uuids=("GPU-b",))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "library.so"
    path.write_bytes(os.urandom(10_000))
    return path


def test_what_was_taken_here_fits_here() -> None:
    check_fits(node_fits(CRIU, [], None), CRIU, None)
    check_fits(node_fits(CRIU, [], GPUS), CRIU, OTHERS)  # any GPUs of the same models


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"architecture": "sparc"}, "it is for sparc"),
        ({"kernel": another_kernel()}, f"taken on kernel {another_kernel()}"),
        ({"cpu_features": ("amx-of-the-future",)}, "CPU lacks amx-of-the-future"),
        ({"criu": "4.3"}, "taken with CRIU 4.3, this node has 4.2.1"),
        ({"gpus": GPUS}, "taken on H100 under driver 580.1, this node has none"),
    ],
)
def test_what_the_node_lacks_is_said(change: dict[str, object], why: str) -> None:
    with pytest.raises(Incompatible, match=f"{why}.*take the snapshot again here"):
        check_fits(node_fits(CRIU, [], None).model_copy(update=change), CRIU, None)


def test_a_file_that_cannot_be_read_for_a_moment_says_nothing_of_the_snapshot(file: Path) -> None:
    fits = node_fits(CRIU, [file], None)
    with descriptors_left(0), pytest.raises(OSError, match="Too many open files"):
        check_fits(fits, CRIU, None)
    check_fits(fits, CRIU, None)
    file.unlink()
    with pytest.raises(Incompatible, match="cannot be read: No such file"):
        check_fits(fits, CRIU, None)


def test_a_patch_release_is_no_difference() -> None:
    fits = node_fits("4.2.9", [], None)
    major, minor, _ = (fits.kernel + ".0").split(".", 2)
    check_fits(fits.model_copy(update={"kernel": f"{major}.{minor}.999-another"}), "4.2.1", None)


@pytest.mark.parametrize(("driver", "names"), [("590.1", ("H100",)), ("580.1", ("H200",)), ("580.1", ("H100", "H100"))])
def test_another_driver_model_or_number_of_gpus_does_not_fit(driver: str, names: tuple[str, ...]) -> None:
    here = GpuRecord(driver=driver, names=names, uuids=tuple("GPU-x" for _ in names))
    with pytest.raises(Incompatible, match=f"under driver 580.1, this node has .* under driver {driver}"):
        check_fits(node_fits(CRIU, [], GPUS), CRIU, here)


def of(*names: str) -> GpuRecord:
    return GpuRecord(driver="580.1", names=names, uuids=tuple(f"GPU-{number}" for number in range(len(names))))


def test_for_pods_a_node_only_has_to_have_such_gpus() -> None:
    two = node_fits(CRIU, [], of("H100", "H100"))
    check_fits(two, CRIU, of("L4", "H100", "H100", "H100"), in_pod=True)
    for here in (of("H100", "L4"), of("H100"), None):
        with pytest.raises(Incompatible, match=r"taken on H100, H100 under driver 580\.1, this node has"):
            check_fits(two, CRIU, here, in_pod=True)
    with pytest.raises(Incompatible, match=r"this node has H100, H100 under driver 590"):
        check_fits(two, CRIU, of("H100", "H100").model_copy(update={"driver": "590"}), in_pod=True)


def test_a_pod_s_gpus_are_those_that_a_snapshot_was_taken_on_in_number_model_and_order() -> None:
    check_gpus(None, of("H100"))
    check_gpus(of("H100", "L4"), of("H100", "L4"))
    for given, words in (
        (of("L4"), "1 × L4"),
        (of("H100", "H100"), "2 × H100"),
        (of("L4", "H100"), "1 × L4 and 1 × H100"),
        (of(), "no GPU"),
    ):
        with pytest.raises(Incompatible, match=rf"taken on 1 × H100, and this pod was given {words}; ask for the same GPUs"):
            check_gpus(of("H100"), given)


def test_everything_that_differs_is_said_at_once_up_to_three() -> None:
    change = {"architecture": "sparc", "kernel": another_kernel(), "criu": "9.9", "gpus": GPUS}
    with pytest.raises(Incompatible, match=r"sparc.*kernel.*9\.9 *.*\(and 1 more\)"):
        check_fits(node_fits(CRIU, [], None).model_copy(update=change), CRIU, None)


def test_a_mapped_file_of_other_content_is_found_and_one_that_was_rewritten_will_do(file: Path) -> None:
    fits = node_fits(CRIU, [file], None)
    check_fits(fits, CRIU, None)
    content = file.read_bytes()
    file.write_bytes(content)
    check_fits(fits, CRIU, None)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(Incompatible, match=f"{file}, which its processes use, has changed"):
        check_fits(fits, CRIU, None)
    check_fits(fits, CRIU, None, in_pod=True)
    file.unlink()
    with pytest.raises(Incompatible, match="No such file"):
        check_fits(fits, CRIU, None)


def test_files_of_a_container_are_looked_for_in_its_root(file: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    inside = root / "lib" / "library.so"
    inside.parent.mkdir(parents=True)
    inside.write_bytes(file.read_bytes())
    fits = node_fits(CRIU, [Path("/lib/library.so")], None, root)
    assert [mapped.path for mapped in fits.mapped_files] == ["/lib/library.so"]
    check_files(fits, root, FileHashes())
    inside.write_bytes(os.urandom(10_000))
    with pytest.raises(Incompatible, match="start it from the image"):
        check_files(fits, root, FileHashes())


@pytest.fixture
def reader(file: Path) -> Iterator[int]:
    """A process that maps `file`, reads another, writes a third, and has one that was removed."""
    program = f"""
import mmap, sys
from pathlib import Path
with open({str(file)!r}, "rb") as once:
    mapped = mmap.mmap(once.fileno(), 0, prot=mmap.PROT_READ)
read = open({str(file) + ".read"!r}, "rb")
written = open({str(file) + ".written"!r}, "wb")
removed = open({str(file) + ".removed"!r}, "rb")
Path(removed.name).unlink()
print("there", flush=True)
sys.stdin.read()
"""
    for suffix in (".read", ".removed"):
        Path(f"{file}{suffix}").touch()
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    yield process.pid
    process.communicate(timeout=20)


def test_files_that_a_process_maps_or_reads_and_that_outlive_it(reader: int, file: Path) -> None:
    found = mapped_files(Path("/"), [reader])
    assert {path for path in found if path.is_relative_to(file.parent)} == {file, Path(f"{file}.read")}
    assert Path(sys.executable).resolve() in found
    assert not [path for path in found if str(path).startswith(("/dev", "/proc", "/run", "/sys"))]


def test_files_that_the_node_knows_are_not_read_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = FileHashes()
    fits = node_fits(CRIU, [file], None, hashes=hashes)
    monkeypatch.setattr(file_hashes, "_hash", pytest.fail)
    check_fits(fits, CRIU, None, hashes=hashes)
    file.write_bytes(b"?")
    with pytest.raises(Incompatible, match="has changed"):
        check_fits(fits, CRIU, None, hashes=hashes)  # of another size: for that it need not be read
