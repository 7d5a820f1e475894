"""Overlay changes between two real overlays of one image: what was written comes, what was removed goes, and nothing else is touched."""

from __future__ import annotations

import io
import os
import shutil
import socket
import stat
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest
import zerowake_native

from restore_agent.places import overlay
from restore_agent.places.laid_out_changes import Changes
from restore_agent.places.overlay import ROOT, SHM, Mounts, OverlayError, archive, is_small

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for mounts")


class Root:
    """An overlay mount."""

    def __init__(self, folder: Path, image: Path) -> None:
        self.upper, self.path = folder / "upper", folder / "root"
        for part in ("upper", "work", "root"):
            (folder / part).mkdir(parents=True)
        layers = f"lowerdir={image},upperdir={self.upper},workdir={folder / 'work'}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, str(self.path)], check=True)
        self.mounts = Mounts({ROOT: self.upper}, frozenset())

    def archive(self) -> bytes:
        return archive(self.mounts, Path("/"), self.path)


@pytest.fixture
def roots(tmp_path: Path) -> Iterator[Callable[[], Root]]:
    """Makes roots of one image; on a tmpfs, since an upper layer must not lie on an overlay."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], check=True)
    image = tmp_path / "image"
    for folder in ("etc/old", "dev/shm", "run", "data"):
        (image / folder).mkdir(parents=True)
    for name in ("etc/kept", "etc/removed", "etc/changed", "etc/old/one", "etc/old/two"):
        (image / name).write_text(f"{name} of the image")
    made: list[Root] = []

    def make() -> Root:
        made.append(Root(tmp_path / str(len(made)), image))
        return made[-1]

    yield make
    for root in made:
        subprocess.run(["umount", "--recursive", str(root.path)], check=True)
    subprocess.run(["umount", str(tmp_path)], check=True)


def change(root: Path) -> None:
    """As an engine might."""
    (root / "etc/removed").unlink()
    (root / "etc/changed").write_text("changed")
    (root / "etc/changed").chmod(0o640)
    for name in ("one", "two"):
        (root / "etc/old" / name).unlink()
    (root / "etc/old").rmdir()
    (root / "etc/old").mkdir()  # opaque
    (root / "etc/old/new").write_text("new")
    (root / "var/cache").mkdir(parents=True)
    (root / "var/cache/file").write_bytes(os.urandom(1 << 20))
    os.chown(root / "var/cache/file", 1000, 1001)
    os.utime(root / "var/cache/file", (1, 2))
    os.setxattr(root / "var/cache/file", "user.note", "ä".encode())
    (root / "var/link").symlink_to("/etc/kept")
    (root / "var/hard").hardlink_to(root / "var/cache/file")
    (root / "var/.wh.kept").write_text("a file like any other")
    os.mkfifo(root / "var/pipe", 0o600)
    (root / "dev/shm/sem.x").write_text("shared")
    (root / "var/__pycache__").mkdir()
    (root / "var/__pycache__/x.pyc").write_bytes(b"left out")


def told(root: Path) -> dict[str, object]:
    """Everything that a process could see of it."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        at = path.lstat()
        content = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        notes = {key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False) if "user" in key}
        found[str(path.relative_to(root))] = (stat.S_IFMT(at.st_mode), stat.S_IMODE(at.st_mode), at.st_uid, at.st_gid, content, notes)
    return {name: value for name, value in found.items() if "__pycache__" not in name}


def saved(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "changes.tar"
    path.write_bytes(data)
    return path


def test_the_other_root_becomes_the_same(roots: Callable[[], Root], tmp_path: Path) -> None:
    one, two = roots(), roots()
    change(one.path)
    assert stat.S_ISCHR((one.upper / "etc/removed").lstat().st_mode)
    Changes(saved(tmp_path, one.archive()), two.path).put_first()
    assert told(two.path) == told(one.path)
    assert (two.path / "var/cache/file").stat().st_mtime == 2
    assert (two.path / "var/hard").stat().st_ino == (two.path / "var/cache/file").stat().st_ino
    gone = (two.upper / "etc/removed").lstat()
    assert stat.S_ISCHR(gone.st_mode)
    assert gone.st_rdev == 0, "overlayfs made a whiteout of its own"
    assert not (two.path / "var/__pycache__").exists()
    assert os.getxattr(two.upper / "etc/old", "trusted.overlay.opaque") == b"y"


def test_nothing_changed_is_nothing_carried(roots: Callable[[], Root]) -> None:
    assert roots().archive() == b""


def test_what_was_added_can_be_taken_away_again(roots: Callable[[], Root], tmp_path: Path) -> None:
    one, two = roots(), roots()
    (one.path / "new/deep").mkdir(parents=True)
    (one.path / "new/deep/file").write_text("new")
    before = told(two.path)
    changes = Changes(saved(tmp_path, one.archive()), two.path)
    changes.put_first()
    assert told(two.path) != before
    changes.undo()
    assert told(two.path) == before


def test_what_criu_opens_comes_first_and_then_the_rest(roots: Callable[[], Root], tmp_path: Path) -> None:
    one, two = roots(), roots()
    change(one.path)
    (one.path / "var/opened").write_text("by CRIU")
    (one.path / "var/later").write_text("by nobody, unless it compiles again")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(one.path / "var/a-socket"))
        changes = Changes(saved(tmp_path, archive(one.mounts, Path("/"), one.path, opened={"var/opened"})), two.path)
    (one.path / "var/a-socket").unlink()
    changes.put_first()
    first = told(two.path)
    assert "var/opened" in first
    assert "var/hard" in first, "a file of two names is no plain one"
    assert "etc/removed" not in first
    assert "var/later" not in first
    changes.put_rest()
    assert told(two.path) == told(one.path)
    changes.undo()
    assert not {"var/opened", "var/later"} & told(two.path).keys()


def test_a_folder_of_the_image_is_not_copied_for_what_is_left_out(roots: Callable[[], Root], tmp_path: Path) -> None:
    """A package that was imported is full of bytecode, and hundreds of them are: each would be made again at each restore."""
    one, two = roots(), roots()
    for folder in ("etc/old/__pycache__", "etc/__pycache__", "data/__pycache__"):
        (one.path / folder).mkdir()
        (one.path / folder / "x.pyc").write_bytes(b"left out")
    (one.path / "etc/new").write_text("new")
    with tarfile.open(saved(tmp_path, one.archive())) as tar:
        assert tar.getnames() == ["etc", "etc/new"]
    before = (two.path / "etc").stat()
    (two.path / "etc/own").write_text("of the other")
    Changes(saved(tmp_path, one.archive()), two.path).put_first()
    assert (two.path / "etc/new").read_text() == "new"
    assert (two.path / "etc").stat().st_mode == before.st_mode


def test_what_is_mounted_stays_out(roots: Callable[[], Root]) -> None:
    one = roots()
    one.mounts = Mounts({ROOT: one.upper}, frozenset({PurePosixPath("data"), PurePosixPath("etc/hosts")}))
    (one.path / "etc/hosts").touch()
    (one.path / "data/secret").write_text("of a volume")
    (one.path / "run/zerowake/control").mkdir(parents=True)
    assert one.archive() == b""


def test_a_folder_that_is_a_volume_here_is_left_alone(roots: Callable[[], Root], tmp_path: Path) -> None:
    one, two = roots(), roots()
    (one.path / "data/file").write_text("of the container")
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(two.path / "data")], check=True)
    with pytest.raises(OverlayError, match="in a volume here"):
        Changes(saved(tmp_path, one.archive()), two.path).put_first()
    assert list((two.path / "data").iterdir()) == []


@pytest.mark.parametrize("name", ["../escaped", "/etc/escaped", "a/../../escaped"])
def test_a_forged_archive_stays_inside(roots: Callable[[], Root], tmp_path: Path, name: str) -> None:
    two = roots()
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        entry = tarfile.TarInfo(name)
        entry.size = 1
        tar.addfile(entry, io.BytesIO(b"x"))
    with pytest.raises(OverlayError, match="names a file"):
        Changes(saved(tmp_path, data.getvalue()), two.path).put_first()
    assert not (two.path.parent / "escaped").exists()


def test_limits_name_the_folder_that_is_too_large(roots: Callable[[], Root], monkeypatch: pytest.MonkeyPatch) -> None:
    one = roots()
    monkeypatch.setattr(overlay, "MAX_BYTES", 1 << 20)
    (one.path / "root/.cache").mkdir(parents=True)
    (one.path / "root/.cache/model").write_bytes(bytes(2 << 20))
    with pytest.raises(OverlayError, match=r"2 MiB of it into /root/\.cache; have it in the image"):
        one.archive()


def test_holes_take_no_room(roots: Callable[[], Root], tmp_path: Path) -> None:
    one, two = roots(), roots()
    parts = {0: b"first", 300 << 20: b"last"}
    with (one.path / "dev/shm/ring").open("wb") as file:
        for start, content in parts.items():
            file.seek(start)
            file.write(content)
        file.truncate(640 << 20)
    (one.path / "dev/shm/hole").touch()
    os.truncate(one.path / "dev/shm/hole", 640 << 20)
    carried = one.archive()
    assert len(carried) < 1 << 20
    Changes(saved(tmp_path, carried), two.path).put_first()
    for name in ("ring", "hole"):
        looks = (two.path / "dev/shm" / name).stat()
        assert looks.st_size == 640 << 20
        assert looks.st_blocks * 512 < 1 << 20
    with (two.path / "dev/shm/ring").open("rb") as file:
        for start, content in parts.items():
            assert os.pread(file.fileno(), len(content), start) == content
    assert is_small(two.path, Mounts({}, frozenset()), SHM)


def test_a_device_is_refused(roots: Callable[[], Root]) -> None:
    one = roots()
    os.mknod(one.path / "etc/disk", stat.S_IFBLK | 0o600, os.makedev(7, 0))
    with pytest.raises(OverlayError, match="made a device, /etc/disk"):
        one.archive()


def test_a_root_that_is_no_overlay_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OverlayError, match="overlayfs snapshotter"):
        archive(Mounts({}, frozenset()), Path("/"), tmp_path)


def test_mounts_are_read_as_the_kernel_writes_them(roots: Callable[[], Root], tmp_path: Path) -> None:
    """Of a process whose root is an overlay; its upper layer's path has what the kernel escapes."""
    root = Root(tmp_path / "a b", tmp_path / "image")
    shutil.copy(zerowake_native.PLACEHOLDER, root.path / "waits")
    script = (
        f"mount --make-rprivate / && cd '{root.path}' && mkdir -p old proc && mount -t proc proc proc && pivot_root . old "
        "&& exec /waits -- true"
    )
    process = subprocess.Popen(["unshare", "-m", "sh", "-c", script])
    try:
        while Path(f"/proc/{process.pid}/exe").readlink().name != "waits":
            time.sleep(0.01)  # until it is where it belongs
        found = Mounts.of(process.pid)
    finally:
        process.kill()
        process.wait()
        subprocess.run(["umount", str(root.path)], check=True)
    assert found.uppers == {ROOT: root.upper}
    assert PurePosixPath("old/proc") in found.points
