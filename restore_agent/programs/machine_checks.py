"""What `zerowake doctor` finds of the machine itself: rights, kernel, huge pages, cgroups, memory, clock. Nothing of it is changed."""

from __future__ import annotations

import ctypes
import os
import platform
import pwd
import re
from collections.abc import Sequence
from pathlib import Path

from restore_agent.drivers.meminfo import available_memory, total_memory
from restore_agent.places.cgroups import OutOfSight, cgroup_files
from restore_agent.places.processes import status
from restore_agent.sequences.memory_budget import SPARE_BYTES
from zerowake_shared.checkup import Check, Finding, Subject, fails, ok, told, warning
from zerowake_shared.huge_pages import SWITCHES, setting_of

# By their numbers in linux/capability.h. What CRIU and the sandboxes do with each, the chart's agent.yaml says.
_NEEDED = {
    "CHOWN": 0,
    "DAC_OVERRIDE": 1,
    "FOWNER": 3,
    "KILL": 5,
    "SETGID": 6,
    "SETUID": 7,
    "SETPCAP": 8,
    "NET_ADMIN": 12,
    "SYS_CHROOT": 18,
    "SYS_PTRACE": 19,
    "SYS_ADMIN": 21,
    "MKNOD": 27,
}
_SYS_RESOURCE = 24
_HUGE = (  # switch of the kernel's, whose memory, settings that are as good as it gets: the best is named first
    ("enabled", "restored memory", ("always",)),
    ("shmem_enabled", "gpumem's memory of the host", ("advise", "always", "within_size", "force")),
)
_NEWEST_CALL = (5, 14)  # MADV_POPULATE_WRITE, by which memory is held ready
_LITTLE_SHARE = 20  # under a twentieth of the memory available, standbys go
_LITTLE_SHM = 64 << 20  # bytes
_SHM = Path("/dev/shm")
_UNSYNCHRONISED = 0x40  # STA_UNSYNC of linux/timex.h


def size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 30 else f"{count / 2**20:.0f} MiB"


def rights(_: Subject) -> Sequence[Finding]:
    """Root, and the capabilities that not every root has."""
    if (user := os.geteuid()) != 0:
        try:
            name = pwd.getpwuid(user).pw_name
        except KeyError:
            name = str(user)
        return [fails(f"runs as user {name}: engines are started cold, and nothing is taken or restored", "run zerowake as root (sudo)")]
    has = int(status(os.getpid())["CapEff"], 16)
    if missing := [name for name, number in _NEEDED.items() if not has >> number & 1]:
        remedy = "in a container: run it privileged, or with these (--cap-add); else start it outside"
        return [fails(f"root without CAP_{', CAP_'.join(missing)}", remedy)]
    if not has >> _SYS_RESOURCE & 1:
        found = "root without CAP_SYS_RESOURCE: no snapshot is taken of an engine that runs as another user than root"
        return [warning(found, "give zerowake that capability, or run engines as root")]
    return [ok("root, with every capability that is needed")]


def kernel(_: Subject) -> Sequence[Finding]:
    """Its version."""
    release = platform.release()
    found = re.match(r"(\d+)\.(\d+)", release)
    if found and (int(found[1]), int(found[2])) < _NEWEST_CALL:
        return [warning(f"Linux {release}: no memory is held ready for the next restore, which is slower", "use 5.14 or later")]
    return [ok(f"Linux {release} on {platform.machine()}, {os.cpu_count()} cores")]


def huge_pages(_: Subject) -> Sequence[Finding]:
    """Whether restored memory, and what gpumem lends of the host's, can be made of huge pages."""
    found = []
    for name, of, good in _HUGE:
        switch = SWITCHES / name
        now = setting_of(switch)
        if not now:
            found.append(warning(f"{of}: this kernel has none, so a restore is slower", "use a kernel with CONFIG_TRANSPARENT_HUGEPAGE"))
        elif now in good:
            found.append(ok(f"{of}: {now}"))
        elif os.access(switch, os.W_OK):
            found.append(ok(f"{of}: {now}, and switched on for as long as it takes"))
        else:
            found.append(warning(f"{of}: {now}, which cannot be changed from here, so it is slower", f"as root: echo {good[0]} > {switch}"))
    return found


def cgroups(_: Subject) -> Sequence[Finding]:
    """Which version, and what bounds this process's memory there."""
    if not Path("/sys/fs/cgroup").is_dir():
        return [fails("none are mounted at /sys/fs/cgroup", "mount them there")]
    version = "v2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "v1"
    try:
        folders = [file.parent for file in cgroup_files(os.getpid())]
    except OutOfSight as error:
        return [told(error)]
    limits = [limit for folder in folders for name in ("memory.max", "memory.limit_in_bytes") if (limit := _number(folder / name))]
    total = total_memory()
    if limits and min(limits) < total:
        found = f"{version}; this process and what it starts have {size(min(limits))} of this machine's {size(total)}"
        return [warning(f"{found}: images that are staged count towards that", "raise the limit, or set --memory of the agent below it")]
    return [ok(f"{version}, without a limit of memory")]


def _number(file: Path) -> int:
    """0: there is none, or no limit."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # `max`
        return 0


def memory(_: Subject) -> Sequence[Finding]:
    """What is free, here and in /dev/shm."""
    total, free = total_memory(), available_memory()
    little = free < max(SPARE_BYTES, total // _LITTLE_SHARE)
    text = f"{size(free)} of {size(total)} available"
    found = [fails(f"{text}: nothing is staged, and standbys go", "end what takes it") if little else ok(text)]
    try:
        shm = os.statvfs(_SHM)
    except OSError:
        return [*found, warning("no /dev/shm, which torch and vLLM need", f"mount -t tmpfs tmpfs {_SHM}")]
    free = shm.f_bavail * shm.f_frsize
    text = f"/dev/shm: {size(free)} of {size(shm.f_blocks * shm.f_frsize)} free"
    bigger = f"{text}, which is little for torch and vLLM", f"mount -o remount,size=50% {_SHM}; of a container: --shm-size"
    return [*found, warning(*bigger) if free < _LITTLE_SHM else ok(text)]


def clock(_: Subject) -> Sequence[Finding]:
    """Whether something keeps it right: stores refuse requests of a wrong one, and certificates end by it."""
    state = ctypes.create_string_buffer(512)  # struct timex; nothing is set where its first field is 0
    if ctypes.CDLL(None, use_errno=True).adjtimex(state) < 0:
        return [warning(f"the kernel does not say whether it is kept right: {os.strerror(ctypes.get_errno())}")]
    # struct timex { unsigned modes; long offset, freq, maxerror, esterror; int status; … }
    if int.from_bytes(state.raw[40:44], "little") & _UNSYNCHRONISED:
        return [
            warning("nothing on this machine says that it keeps it right (NTP)", "run chrony or systemd-timesyncd, here or on the host")
        ]
    return [ok("kept right (NTP)")]


CHECKS = (
    Check("rights", rights),
    Check("kernel", kernel),
    Check("huge pages", huge_pages),
    Check("cgroups", cgroups),
    Check("memory", memory),
    Check("clock", clock),
)
