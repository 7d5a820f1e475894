"""The file system of a sandbox: the machine's, under a writable layer of the replica's own.

Everything that an engine changes lands in the layer, wherever it lies: replicas of one snapshot meet in no folder, and restores neither,
for which CRIU makes files beside those of the image. The layer is an overlay over each file system of the machine that can be written
(mounts of their own, as /tmp or /home often are, need one each); what it holds at a dump travels with the snapshot (overlay.py). Not under
it are what is no folder of files (/dev, /sys), what the sandbox has of its own (/proc, /run, /dev/shm), what cannot be written anyway, and
what shall be the machine's: the shared folders.

The layers lie beside the snapshots, on disk: an engine may write gigabytes. On a file system that cannot hold the upper half of an overlay
they lie in the agent's memory. They are `volatile`, which nobody needs to outlive the replica: without that the end of each would wait for
the whole disk to be written.

Where the machine's own root is an overlay (the agent is in somebody's container), CRIU cannot dump a program that is mapped through a
second one: the kernel names a mount for it that nobody can see. There the layer lies over /tmp and /var, which hold no programs, and over
the mounts; what engines write elsewhere they share, and the log says so.

Rejected: a layer over some folders only wherever one is (an engine writes where it likes), and copies of files at a restore (a cache of
gigabytes would be copied).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from restore_agent.places import mount_table, overlay
from restore_agent.places.laid_out_changes import Changes
from restore_agent.places.mount_table import Mount
from restore_agent.places.overlay import ROOT, RUN, SHM, Mounts
from restore_agent.places.place import PlaceError
from restore_agent.places.shared_folders import resolved
from zerowake_shared.discard import discard

HOLDERS = frozenset({"ext4", "ext3", "xfs", "btrfs", "f2fs", "tmpfs", "zfs", "bcachefs"})  # of the upper half of an overlay
_HANDLED = HOLDERS | {"squashfs", "erofs", "vfat"}  # files of these can be watched (inotify) through an overlay, and CRIU finds them again
_KERNELS_OWN = frozenset(
    {"autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs", "efivarfs", "fusectl", "hugetlbfs"}
    | {"mqueue", "nfsd", "nsfs", "proc", "pstore", "ramfs", "rpc_pipefs", "securityfs", "selinuxfs", "sysfs", "tracefs"}
)
_WHOLE = tuple(map(PurePosixPath, ("dev", "sys")))  # with all that is mounted in them
_BOOT = PurePosixPath("boot")  # no engine writes there, and each overlay costs a restore a third of a millisecond
# The file systems of others' containers: there are hundreds, and no engine of this machine looks into them.
_CONTAINERS = tuple(map(PurePosixPath, ("var/lib/docker", "var/lib/containerd", "var/lib/containers", "var/lib/kubelet")))
_FLAGS = {"nosuid": 2, "nodev": 4, "noexec": 8}  # of mount(2)
_MACHINE = Path("/")
_WITHOUT_PROGRAMS = ("tmp", "var")  # of an overlay
_NAMED = 3  # files of a layer that are named where there are more


@dataclass(frozen=True)
class _Over:
    """An overlay to be made: where, by which flags and options, and how its upper half must look."""

    point: PurePosixPath
    flags: int
    options: str
    mode: int
    owner: tuple[int, int]


Step = tuple[str, str, str]  # of sandbox-init


class Layer:
    """Of one replica. `make` it, and `remove` it when its sandbox has ended. All of it blocks on the disk."""

    def __init__(self, folder: Path, mounts: Mounts, arguments: Sequence[str]) -> None:
        self.arguments = arguments  # of sandbox-init: the root, and the steps
        self.since = time.time()  # what the engine has written before this is in its snapshot
        self.mounts = mounts
        self._folder = folder
        self._changes: Changes | None = None  # that were put into it

    @classmethod
    def make(cls, folder: Path, shared: Sequence[str], memory: Path | None = None) -> Layer:
        """A layer of its own.

        Args:
            folder: where layers lie.
            shared: folders that stay the machine's.
            memory: where the agent's own file system in memory is mounted, if it is: no replica sees that.

        Raises:
            PlaceError: no space, or a folder that cannot be shared.
        """
        own = folder / secrets.token_hex(6)
        arguments, uppers, points = [str(own / "root")], dict[PurePosixPath, Path](), set[PurePosixPath]()
        bound = resolved(shared)
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            agents = os.path.realpath(memory) if memory else ""
            plan = _plan(Path("/proc/self/mountinfo").read_text(), os.path.realpath(folder), bound, agents)
            (own / "root").mkdir(parents=True)
            for number, each in enumerate(plan):
                if isinstance(each, _Over):
                    upper, work = own / f"{number}", own / f"{number}.work"
                    work.mkdir()
                    upper.mkdir()
                    os.chown(upper, *each.owner)
                    upper.chmod(each.mode)  # of the folder that is mounted over
                    uppers[each.point] = upper
                    layers = f"upperdir={_escaped(str(upper))},workdir={_escaped(str(work))}"
                    arguments += ["overlay", str(each.point), f"{each.flags}:{each.options},{layers}"]
                else:
                    points.add(PurePosixPath(each[1]))
                    arguments += each
        except OSError as error:
            discard(own)
            raise PlaceError(no_room(folder, error)) from error
        return cls(own, Mounts(uppers, frozenset(points), (SHM, RUN)), arguments)

    def archive(self, root: Path, opened: Collection[str] | None) -> bytes:
        """What the engine has changed; empty: nothing. `opened`: as overlay.archive has it. Raises PlaceError: it cannot travel with a
        snapshot."""
        try:
            advice = "name that folder with --shared (`shared:` in zerowake.yaml): it is the machine's then"
            return overlay.archive(self.mounts, Path("/"), root, advice, opened)
        except overlay.OverlayError as error:
            raise PlaceError(str(error)) from None

    def lay_out(self, source: Path, root: Path) -> None:
        """What CRIU needs of it. Raises PlaceError."""
        self._changes = Changes(source, root, (*self.mounts.uppers, *self.mounts.whole))
        self._put(self._changes.put_first)

    def complete(self) -> None:
        """The rest. Raises PlaceError."""
        if self._changes:
            self._put(self._changes.put_rest)
        self.since = time.time()

    def _put(self, put: Callable[[], None]) -> None:
        try:
            put()
        except overlay.OverlayError as error:
            cause = error.__cause__
            raise PlaceError(no_room(self._folder.parent, cause) if isinstance(cause, OSError) else str(error)) from None

    def leave(self, point: str) -> None:
        """No overlay was mounted there."""
        name = PurePosixPath(point)
        uppers = {each: upper for each, upper in self.mounts.uppers.items() if each != name}
        self.mounts = Mounts(uppers, self.mounts.points | {name}, self.mounts.whole)

    def has_changed(self, path: Path) -> bool:
        return self.mounts.has_changed(path, Path("/"))

    def written(self) -> str:
        """The files that the engine has written since it was started or restored, in words; empty: none."""
        found = []
        for point, upper in sorted(self.mounts.uppers.items()):
            for folder, folders, files in os.walk(upper):
                folders[:] = sorted(set(folders) - {"__pycache__"})
                for path in sorted(Path(folder, name) for name in files):
                    at = path.lstat()
                    if stat.S_ISREG(at.st_mode) and at.st_size and at.st_mtime >= self.since:
                        found.append((f"/{point / path.relative_to(upper)}", at.st_size))
        if not found:
            return ""
        listed = ", ".join(name for name, _ in found[:_NAMED]) + (f" and {len(found) - _NAMED} more" if len(found) > _NAMED else "")
        return f"{listed} ({_size(sum(size for _, size in found))})"

    def remove(self) -> None:
        """What Python has compiled of the machine's modules goes to the machine: each cold start would compile it again otherwise."""
        for point, upper in self.mounts.uppers.items():
            with contextlib.suppress(OSError):  # it is a cache
                for folder in upper.rglob("__pycache__"):
                    with contextlib.suppress(OSError):
                        _hand_back(folder, _MACHINE / point / folder.relative_to(upper))
        discard(self._folder)


def _hand_back(cache: Path, to: Path) -> None:
    """Bytecode of modules that are the machine's, where it has none."""
    for compiled in cache.glob("*.pyc"):
        module, target = f"{compiled.name.partition('.')[0]}.py", to / compiled.name
        if compiled.is_symlink() or target.exists() or not (to.parent / module).is_file() or (cache.parent / module).exists():
            continue
        to.mkdir(exist_ok=True)
        fresh = to / f".{compiled.name}.{secrets.token_hex(4)}"
        shutil.copy2(compiled, fresh)
        at = compiled.stat()
        os.chown(fresh, at.st_uid, at.st_gid)
        fresh.replace(target)


def no_room(folder: Path, error: OSError) -> str:
    """What to say where a layer cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space is left in {folder}, where replicas keep what they write: make room, or move the state folder (`state:`)"
    return f"a replica's own layer cannot be made in {folder}: {error.strerror or error}"


def holder(state: Path, memory: Path) -> tuple[Path, str]:
    """The folder for layers, and why it is not the usual one."""
    for mount in reversed(mount_table.visible(mount_table.read())):
        if PurePosixPath(os.path.realpath(state)).is_relative_to(mount.point):
            if mount.kind in HOLDERS:
                break
            return memory / "layers", f"{state} lies on {mount.kind}, which can hold no layer of a replica: what engines write is in memory"
    return state / "layers", ""


def unlayered() -> str:
    """What of the machine no layer is laid over although it can be written, in a sentence; empty: nothing."""
    if mount_table.visible(mount_table.read())[0].kind != "overlay":
        return ""
    folders = " and ".join(f"/{name}" for name in _WITHOUT_PROGRAMS)
    return f"the machine's root is an overlay: replicas have layers over {folders} and over mounts, and share what they write elsewhere"


@functools.lru_cache(maxsize=64)
def _plan(table: str, layers: str, shared: tuple[str, ...], memory: str) -> tuple[_Over | Step, ...]:
    """The steps of a sandbox. `table`: the machine's mounts; while it is the same, so is the plan."""
    mounts = mount_table.visible(mount_table.parse(table))
    bound = [PurePosixPath(path).relative_to("/") for path in shared]
    hidden = PurePosixPath(layers).relative_to("/")
    unseen = [mount.point.relative_to("/") for mount in mounts if mount.point == PurePosixPath(memory)]
    apart = (PurePosixPath("proc"), RUN, *_WHOLE, *_CONTAINERS, *bound, hidden, *unseen)
    holder = next(mount for mount in reversed(mounts) if PurePosixPath(layers).is_relative_to(mount.point))
    plan: list[_Over | Step] = []
    device = Path(layers).stat().st_dev
    for mount in mounts:
        point = mount.point.relative_to("/")
        if any(point.is_relative_to(each) for each in apart):
            continue
        is_bare = mount.kind == "overlay" or (point != ROOT and (mount.kind in _KERNELS_OWN or not mount.writable))
        if is_bare or point.is_relative_to(_BOOT) or not Path(mount.point).is_dir():
            plan.append(("single", str(point), "-"))
        else:
            plan.append(_over(mount, mount.point, holder.kind, device))
        if mount.kind == "overlay" and point == ROOT:
            taken = {each.point for each in mounts}
            folders = [mount.point / name for name in _WITHOUT_PROGRAMS]
            plan += [_over(mount, path, holder.kind, device) for path in folders if path not in taken and Path(path).is_dir()]
    plan += [("proc", "proc", "-"), *(("bind", str(point), "-") for point in _WHOLE if (_MACHINE / point).is_dir())]
    plan += [("tmpfs", str(SHM), "mode=1777"), ("tmpfs", str(RUN), "mode=755")]
    plan += [("bind", str(point), "-") for point in sorted(bound)]
    if not any(hidden.is_relative_to(each) for each in (RUN, SHM, *unseen)):
        # Seen through the layer itself, its own folder would be a loop; and what others wrote is no business of this replica's.
        plan.append(("tmpfs", str(hidden), "mode=555,size=4k"))
    return tuple(plan)


def _over(mount: Mount, point: PurePosixPath, holder: str, device: int) -> _Over:
    """Over a mount, or over a folder `point` of it. `holder`: the kind of file system that layers lie on, `device`: its number."""
    at = Path(point).stat()
    handles = "on" if mount.kind in _HANDLED and holder in _HANDLED else "off"
    options = {
        "lowerdir": _escaped(str(point)),
        "index": handles,
        "nfs_export": handles,
        # One device for all files of it: CRIU compares what it hears of a file in two ways. On one file system that is so by itself.
        "xino": "off" if at.st_dev == device else "on",
        "redirect_dir": "off",  # neither is carried (overlay.py)
        "metacopy": "off",
    }
    written = ",".join(f"{key}={value}" for key, value in options.items())
    flags = sum(number for flag, number in _FLAGS.items() if flag in mount.flags)
    return _Over(point.relative_to("/"), flags, f"volatile,{written}", stat.S_IMODE(at.st_mode), (at.st_uid, at.st_gid))


def _escaped(path: str) -> str:
    """As overlayfs reads it in its options."""
    return re.sub(r"([\\:,])", r"\\\1", path)


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size} bytes"
