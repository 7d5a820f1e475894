"""What `zerowake doctor` finds of what the agent works with: CRIU, GPUs, the state folder, its disk, keys and snapshots, the store."""

from __future__ import annotations

import contextlib
import importlib.metadata
import mmap
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from restore_agent.drivers.criu import Criu, CriuError
from restore_agent.drivers.cuda import Cuda, CudaError
from restore_agent.errors import AgentError
from restore_agent.places.place import PlaceError
from restore_agent.places.sandbox import Sandbox
from restore_agent.programs import machine_checks
from restore_agent.programs.machine_checks import size
from restore_agent.snapshots.catalog import Catalog, Unreadable, keys_of
from restore_agent.snapshots.compatibility import check_fits
from restore_agent.snapshots.encryption_keys import EncryptionKeys
from restore_agent.snapshots.keyring import Keyring
from restore_agent.transfer.layout import NAMES
from restore_agent.transfer.store_url import opened
from zerowake_shared.checkup import Check, Finding, Subject, beside, fails, ok, told, warning
from zerowake_shared.state_folder import STORE_LOCK, store_holder

_OLDEST_DRIVER = 570  # whose checkpoint calls suspend a process
_SLOW_DISK = 200e6  # bytes a second
_LITTLE_DISK = 1 << 30  # bytes
_MEASURE_SECONDS, _MEASURE_BYTES, _BLOCK = 0.5, 512 << 20, 4 << 20  # of writing, and of reading
_ADAPTERS = ("vllm", "sglang")


async def criu(subject: Subject) -> Sequence[Finding]:
    """Which, what `criu check` says, and whether it works in a sandbox as every restore has one."""
    try:
        found = await beside(Criu.find, "criu --version")
    except CriuError as error:
        return [told(error)]
    version = ok(f"{found.version}, {found.path}")
    if os.geteuid() != 0:
        return [version, warning("whether it works here can be tried by root alone", "sudo zerowake doctor", "tried")]
    try:
        if missing := await beside(found.check, "criu check"):
            return [version, fails(missing, "use a kernel that has what it names; in a container: run it privileged", "criu check")]
        with tempfile.TemporaryDirectory(prefix="doctor-", dir=_scratch(subject.state)) as folder:
            kdat = Path(folder) / "criu.kdat"
            async with await Sandbox.create(kdat) as sandbox:
                await found.probe(sandbox, kdat)
    except (CriuError, PlaceError) as error:
        return [version, told(error, of="tried")]
    return [version, ok("criu check misses nothing, and it works in a sandbox", "tried")]


def _scratch(state: Path) -> Path | None:
    """Where something may be tried out; the agent clears it when it starts. None: wherever temporary files lie."""
    folder = state / "tmp"
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def state_folder(subject: Subject) -> Sequence[Finding]:
    """Whether it is there, whose, on what, and how much there is room for."""
    folder = subject.state
    if not folder.exists():
        parent = next(each for each in folder.parents if each.exists())
        if not os.access(parent, os.W_OK | os.X_OK) or _is_read_only(parent):
            return [fails(f"{folder} is not there, and cannot be made in {parent}", "make it, run as root, or name another by --state")]
        return [ok(f"{folder} is not there yet: it is made at the first start"), _room(parent)]
    if not folder.is_dir():
        return [fails(f"{folder} is no folder", "move it away, or name another by --state")]
    found = []
    about = folder.stat()
    if _is_read_only(folder):
        found.append(fails(f"{folder} is on a file system that is read-only", "mount it for writing, or name another by --state"))
    elif not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        found.append(fails(f"{folder} is user {about.st_uid}'s, and closed to this one", "run as root, or name another by --state"))
    elif about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        found.append(warning(f"{folder} can be written by other users, who could change snapshots", f"chmod go-w {folder}"))
    else:
        holder = store_holder(folder) if (folder / STORE_LOCK).exists() else ""
        found.append(ok(f"{folder}, in use by {holder}" if holder else f"{folder}, in use by nobody"))
    return [*found, _room(folder)]


def _is_read_only(folder: Path) -> bool:
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


def _room(folder: Path) -> Finding:
    about = os.statvfs(folder)
    free = about.f_bavail * about.f_frsize
    text = f"{size(free)} of {size(about.f_blocks * about.f_frsize)} free, on {_file_system(folder)}"
    if free < _LITTLE_DISK:
        return fails(f"{text}: too little for a snapshot", "`zerowake snapshot rm` what nobody needs, or use a larger disk", "room")
    return ok(text, "room")


def _file_system(folder: Path) -> str:
    """The kind of the mount that it lies in."""
    path, best, kind = str(folder.resolve()), "", "?"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        point = fields.split()[4].encode().decode("unicode_escape")
        if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, rest.split()[0]
    return kind


def disk(subject: Subject) -> Sequence[Finding]:
    """How fast the state folder's disk is, past the kernel's cache."""
    folder = next(each for each in (_scratch(subject.state), subject.state, *subject.state.parents) if each and each.is_dir())
    if not os.access(folder, os.W_OK | os.X_OK) or _is_read_only(folder):
        return [warning(f"not measured: {folder} cannot be written from here")]
    about = os.statvfs(folder)
    most = min(_MEASURE_BYTES, about.f_bavail * about.f_frsize // 4) // _BLOCK * _BLOCK
    if not most:
        return [warning(f"not measured: {folder} is full")]
    with tempfile.TemporaryDirectory(prefix="doctor-", dir=folder) as scratch, mmap.mmap(-1, _BLOCK) as block:
        path = Path(scratch) / "measured"
        try:
            with _opened(path, os.O_WRONLY | os.O_CREAT) as file:
                written, wrote = _timed(lambda: os.write(file, block), most)
            with _opened(path, os.O_RDONLY) as file:
                _, read = _timed(lambda: os.readv(file, [block]), written)
        except OSError as error:
            return [warning(f"not measured: {_file_system(folder)} has no direct I/O ({error.strerror})")]
    text = f"reads {read / 1e6:.0f} MB/s and writes {wrote / 1e6:.0f} MB/s past the kernel's cache"
    if read < _SLOW_DISK:
        text += f": {(1 << 30) / read:.0f} s for each GiB that is not in memory"
        return [warning(text, "put the state folder on the fastest disk, or stage: memory")]
    return [ok(text)]


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    file = os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    try:
        yield file
    finally:
        os.close(file)


def _timed(move: Callable[[], int], most: int) -> tuple[int, float]:
    """Moves blocks until they are `most` bytes or the time is over: bytes, and bytes a second."""
    begin, done = time.monotonic(), 0
    while done < most and time.monotonic() - begin < _MEASURE_SECONDS and (moved := move()):
        done += moved
    return done, done / max(time.monotonic() - begin, 1e-6)


def keys(subject: Subject) -> Sequence[Finding]:
    """By which snapshots are signed and stores encrypted, and whose signatures count."""
    folder = keys_of(subject.state, subject.keys)
    keyring = Keyring(folder)
    try:
        if keyring.is_empty():
            if subject.keys:
                remedy = f"bring the fleet's keys there, or `zerowake key make --keys {folder}`"
                return [fails(f"{folder} holds no key, so no snapshot would count", remedy)]
            return [ok("none yet: a pair is made at the first start")]
        signing, trusted, revoked = keyring.signing, keyring.trusted, keyring.revoked
        encryption = EncryptionKeys(folder)
        encrypts = encryption.encrypts()
    except AgentError as error:
        return [told(error)]
    text = f"{len(trusted)} trusted, {len(revoked)} revoked; stores are {'encrypted by ' + encrypts.id if encrypts else 'not encrypted'}"
    if not signing:
        return [warning(f"none signs, so no snapshot can be taken here; {text}", "bring signing.pem, or `zerowake key make`")]
    return [ok(f"{signing} signs; {text}")]


def snapshots(subject: Subject) -> Sequence[Finding]:
    """Those on the disk, and which of them cannot be restored here."""
    if not subject.state.is_dir():
        return [ok("none yet")]
    catalog = Catalog(subject.state, subject.keys)
    try:
        version = Criu.find().version
        gpus = cuda.gpus() if (cuda := Cuda.find()) else None
    except (CriuError, CudaError):
        return [ok(f"{len(catalog.list())}; whether they fit is known once CRIU and the GPUs can be used")]
    unfit, found = [], catalog.list()
    for each in found:
        try:
            if isinstance(each, Unreadable):
                raise each.why
            check_fits(each.manifest.fits, version, gpus)
        except AgentError as error:
            unfit.append(told(error, of=f"{each.namespace}/{each.name}" if isinstance(each, Unreadable) else str(each)))
    return [ok(f"{len(found) - len(unfit)} of {len(found)} can be restored here"), *unfit] if found else [ok("none yet")]


def gpus(_: Subject) -> Sequence[Finding]:
    """Which, their driver, and whether it has the calls that suspend a process."""
    try:
        cuda = Cuda.find()
    except CudaError as error:
        return [told(error)]
    if cuda is None:
        return [ok("no NVIDIA GPU (no /dev/nvidiactl): engines on the CPU are restored all the same")]
    about = cuda.gpus()
    text = f"{', '.join(about.names)} under driver {about.driver}"
    if int(about.driver.partition(".")[0]) < _OLDEST_DRIVER:
        return [fails(f"{text}, which suspends no process", f"use driver {_OLDEST_DRIVER} or later")]
    return [ok(f"{text}, which has the checkpoint calls")]


def engines(_: Subject) -> Sequence[Finding]:
    """Which engines that there are presets for are installed beside this zerowake."""
    found = []
    for name in _ADAPTERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    if server := shutil.which("llama-server"):
        found.append(server)
    none = "none of vLLM, SGLang and llama-server here; any other server, or one of another environment, works as well"
    return [ok(", ".join(found) or none)]


async def store(subject: Subject) -> Sequence[Finding]:
    """Whether it answers, and lets us read."""
    if not subject.store:
        return []
    try:
        async with opened([subject.store], Keyring(keys_of(subject.state, subject.keys))) as (found,):
            names = [each.key async for each in found.objects(NAMES)]
    except AgentError as error:
        return [told(error)]
    return [ok(f"{subject.store} answers: {len(names)} names")]


CHECKS = (
    *machine_checks.CHECKS,
    Check("CRIU", criu, seconds=60),
    Check("GPUs", gpus, seconds=30),
    Check("engines", engines),
    Check("state folder", state_folder),
    Check("disk", disk),
    Check("keys", keys),
    Check("snapshots", snapshots, seconds=30),
    Check("store", store, seconds=30),
)
