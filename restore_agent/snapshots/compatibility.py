"""Whether a snapshot fits this node: found before anything is moved, and said in words. CRIU itself would restore a process over a changed
library or a changed model file of the same size without complaint."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from restore_agent.errors import AgentError
from restore_agent.snapshots.file_hashes import FileHashes
from restore_agent.snapshots.manifest import Fits, GpuRecord, MappedFile

_NODE = Path("/")


class Incompatible(AgentError):
    """The snapshot does not fit this node."""

    reason = "incompatible"


def node_fits(
    criu_version: str, mapped: Iterable[Path], gpus: GpuRecord | None, root: Path = _NODE, hashes: FileHashes | None = None
) -> Fits:
    """What a snapshot taken here, now, of processes that map these files of `root` and hold these GPUs, needs.

    Hashes the files, but for those whose `hashes` are known already.
    """
    known = hashes or FileHashes()
    files = tuple(_mapped_file(root, path, known) for path in sorted(mapped))
    known.keep()
    return Fits(
        architecture=platform.machine(),
        kernel=platform.release(),
        cpu_features=tuple(sorted(_cpu_features())),
        criu=criu_version,
        mapped_files=files,
        gpus=gpus,
    )


def check_fits(fits: Fits, criu_version: str, gpus: GpuRecord | None, *, in_pod: bool = False, hashes: FileHashes | None = None) -> None:
    """Raises Incompatible with everything that differs.

    Args:
        gpus: this node's.
        in_pod: it is restored into pods. Files and GPUs are then theirs (`check_files`, `check_gpus`): the node only has to have such GPUs.
        hashes: of files, as far as the node knows them.
    """
    problems = []
    if fits.architecture != platform.machine():
        problems.append(f"it is for {fits.architecture}, this node is {platform.machine()}")
    if _minor(fits.kernel) != _minor(platform.release()):
        problems.append(f"it was taken on kernel {fits.kernel}, this node runs {platform.release()}")
    if missing := set(fits.cpu_features) - _cpu_features():
        problems.append(f"this node's CPU lacks {', '.join(sorted(missing))}")
    if _minor(fits.criu) > _minor(criu_version):
        problems.append(f"it was taken with CRIU {fits.criu}, this node has {criu_version}")
    # Any GPUs of the same models will do: a restore says which takes which one's place.
    if fits.gpus is not None and (gpus is None or fits.gpus.driver != gpus.driver or not _has_models(gpus, fits.gpus, alone=not in_pod)):
        ours = f"{', '.join(gpus.names)} under driver {gpus.driver}" if gpus else "none"
        problems.append(f"it was taken on {', '.join(fits.gpus.names)} under driver {fits.gpus.driver}, this node has {ours}")
    if not in_pod:
        problems += _differences(fits, _NODE, hashes or FileHashes())
    _refuse(problems, "take the snapshot again here")


def check_gpus(needed: GpuRecord | None, given: GpuRecord) -> None:
    """The GPUs that a pod was given, in CUDA's order. Raises Incompatible: they are others than a snapshot's processes hold."""
    if needed is not None and needed.names != given.names:
        advice = "ask for the same GPUs in both pods' templates, or take the snapshot again"
        raise Incompatible(f"it was taken on {counted(needed.names)}, and this pod was given {counted(given.names)}; {advice}")


def counted(models: Sequence[str]) -> str:
    """Models of GPUs in words, as `2 × NVIDIA H100`."""
    return " and ".join(f"{number} × {model}" for model, number in Counter(models).items()) or "no GPU"


def _has_models(here: GpuRecord, needed: GpuRecord, *, alone: bool) -> bool:
    return here.names == needed.names if alone else Counter(needed.names) <= Counter(here.names)


def check_files(fits: Fits, root: Path, hashes: FileHashes) -> None:
    """The files that its processes map, in a container's file system. Raises Incompatible."""
    _refuse(_differences(fits, root, hashes), "start it from the image, and with the volumes, that the snapshot was taken with")


def _refuse(problems: Sequence[str], advice: str) -> None:
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise Incompatible("; ".join(problems[:3]) + f"{more}; {advice}")


def mapped_files(root: Path, host_pids: Iterable[int], outlives: Path = _NODE) -> set[Path]:
    """Files that these processes map or hold open for reading, of those that outlive them.

    Args:
        root: the processes' own file system.
        outlives: the file system that is left when they have ended: the node's, or a container's own.
    """
    found: set[str] = set()
    for pid in host_pids:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            name = line[line.index("/") :] if "/" in line else ""
            if name and not name.endswith(" (deleted)"):
                found.add(name)
        for link in Path(f"/proc/{pid}/fd").iterdir():
            name = str(link.readlink())
            access = int(Path(f"/proc/{pid}/fdinfo/{link.name}").read_text().split("flags:")[1].split()[0], 8) & os.O_ACCMODE
            if name.startswith("/") and access == os.O_RDONLY and not name.endswith(" (deleted)"):
                found.add(name)
    private = ("/dev/", "/proc/", "/run/", "/sys/")
    kept = (name for name in found if not name.startswith(private))
    return {Path(name) for name in kept if _within(outlives, name).is_file() and _within(root, name).exists()}


def used_files(host_pids: Iterable[int]) -> set[Path]:
    """Paths, as these processes see them, of whatever has a name that they map, hold open or stand in."""
    found: set[str] = set()
    for pid in host_pids:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if "/" in line:
                found.add(line[line.index("/") :])
        for link in [*Path(f"/proc/{pid}/fd").iterdir(), Path(f"/proc/{pid}/cwd")]:
            with contextlib.suppress(FileNotFoundError):
                found.add(str(link.readlink()))
    return {Path(name) for name in found if name.startswith("/") and not name.endswith(" (deleted)")}


def _within(root: Path, path: Path | str) -> Path:
    return root / str(path).lstrip("/")


def _mapped_file(root: Path, path: Path, hashes: FileHashes) -> MappedFile:
    size, found = hashes.of(root, path)
    return MappedFile(path=str(path), size=size, hash=found)


def _differences(fits: Fits, root: Path, hashes: FileHashes) -> list[str]:
    found = [problem for mapped in fits.mapped_files if (problem := _difference(mapped, root, hashes))]
    hashes.keep()
    return found


def _difference(mapped: MappedFile, root: Path, hashes: FileHashes) -> str | None:
    try:
        if hashes.match(root, mapped.path, mapped.size, mapped.hash):
            return None
    except (FileNotFoundError, NotADirectoryError) as error:  # any other is of the moment, and says nothing of the file
        return f"{mapped.path}, which its processes use, cannot be read: {error.strerror}"
    return f"{mapped.path}, which its processes use, has changed"


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.partition("-")[0].split(".")[:2])


@functools.cache
def _cpu_features() -> frozenset[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()
