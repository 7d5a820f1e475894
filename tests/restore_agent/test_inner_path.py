"""Links that a tenant has put into its file system: followed as its own processes follow them, and never out of it."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path, PurePosixPath

import pytest

from restore_agent.places.inner_path import InnerPath
from tests.worlds.processes import descriptors


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """With `/etc/hosts` of its own, beside which lies something that is not its own."""
    (tmp_path / "outside").write_text("the node's")
    (tmp_path / "root/etc").mkdir(parents=True)
    (tmp_path / "root/etc/hosts").write_text("its own")
    (tmp_path / "root/a/b").mkdir(parents=True)
    return tmp_path / "root"


def read(root: Path, path: str) -> tuple[str, str]:
    """Where it is, and what is there."""
    with InnerPath.found(root, PurePosixPath(path)) as found, found.reading() as fd:
        return str(found.path), os.read(fd, 100).decode()


@pytest.mark.parametrize(
    ("at", "leads"),
    [
        ("a/b/link", "../../etc/hosts"),
        ("a/b/link", "/etc/hosts"),
        ("a/b/link", "//etc/./hosts"),
        ("a/b/link", "../../../../../../../../etc/hosts"),
        ("a/b/link", "/../etc/hosts"),
    ],
)
def test_a_link_is_followed_as_inside(root: Path, at: str, leads: str) -> None:
    (root / at).symlink_to(leads)
    assert read(root, f"/{at}") == ("/etc/hosts", "its own")


def test_so_are_links_on_the_way_and_links_to_links(root: Path) -> None:
    (root / "one").symlink_to("a")
    (root / "a/two").symlink_to("/one/b/..")
    (root / "a/three").symlink_to("two/../etc")
    assert read(root, "/one/two/three/hosts") == ("/etc/hosts", "its own")


@pytest.mark.parametrize("leads", ["../../../outside", "/../outside", "../../outside"])
def test_nothing_leads_out(root: Path, leads: str) -> None:
    (root / "a/link").symlink_to(leads)
    with pytest.raises(FileNotFoundError):
        read(root, "/a/link")
    with pytest.raises(FileNotFoundError):
        read(root, f"/a/{leads}")


def test_a_link_of_the_kernel_s_is_the_text_that_it_shows(root: Path, tmp_path: Path) -> None:
    """Followed by the kernel it would lead to whatever a process holds."""
    with (tmp_path / "outside").open() as held:
        (root / "a/link").symlink_to(f"/proc/self/fd/{held.fileno()}")
        with pytest.raises(FileNotFoundError):
            read(root, "/a/link")


def test_links_that_lead_round_in_a_circle_end(root: Path) -> None:
    (root / "a/one").symlink_to("two")
    (root / "a/two").symlink_to("one")
    with pytest.raises(OSError, match="Too many levels") as refused:
        read(root, "/a/one")
    assert refused.value.errno == errno.ELOOP


def test_what_was_found_is_held_whatever_takes_its_place(root: Path) -> None:
    (root / "a/b/link").symlink_to("../../etc/hosts")
    with InnerPath.found(root, PurePosixPath("/a/b/link")) as found:
        (root / "etc/hosts").rename(root / "etc/before")
        (root / "etc/hosts").symlink_to("/../outside")
        with found.reading() as fd:
            assert os.read(fd, 100) == b"its own"
    with InnerPath.found(root, PurePosixPath("/a")) as folder:
        (root / "a").rename(root / "moved")
        (root / "a").symlink_to("/etc")
        assert folder.names() == ["b"]
        (root / "moved/b/link").rename(root / "moved/link")
        folder.remove("link")
        assert not (root / "moved/link").is_symlink() and (root / "etc/before").exists()


def test_a_pipe_keeps_nobody_waiting(root: Path) -> None:
    os.mkfifo(root / "a/pipe")
    with pytest.raises(OSError, match="it is no file"):
        read(root, "/a/pipe")


def test_nothing_stays_open(root: Path) -> None:
    gc.collect()
    before = descriptors(os.getpid())
    with pytest.raises(FileNotFoundError):
        read(root, "/a/b/c/d")
    with pytest.raises(NotADirectoryError):
        read(root, "/etc/hosts/x")
    read(root, "/a/../etc/hosts")
    assert descriptors(os.getpid()) == before


def test_two_mounts_are_two_and_one_is_one(root: Path) -> None:
    with (
        InnerPath.found(root, PurePosixPath("/a/b")) as one,
        InnerPath.found(root, PurePosixPath("/etc/hosts")) as other,
        InnerPath.found(Path("/proc/self"), PurePosixPath("/status")) as proc,
    ):
        assert one.mount == other.mount != proc.mount
