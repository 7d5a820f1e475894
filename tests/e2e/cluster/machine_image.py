"""An engine's image, made of what a machine has installed: its Python with its packages, in the places where they are there.

For machines that reach no registry, and have the engine's Python all the same. The image knows nothing of zerowake. What belongs to the
machine's GPU driver is left out of it, as it is in images that people make.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.cluster.archive import PATH, image_archive

PACKAGES = "/opt/engine-packages"  # in the image
LEFT_OUT = ("usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale", "usr/src", "usr/lib/modules", "usr/lib/firmware")
# The toolkit of CUDA is gigabytes, of which an installed torch brings its own; of what it takes from there all the same, `mapped` tells.
TOOLKIT = "usr/local/cuda"
SYSTEM = ("bin", "sbin", "lib", "lib32", "lib64", "usr")
SETTINGS = ("passwd", "group", "nsswitch.conf", "ld.so.conf", "ld.so.conf.d", "ld.so.cache", "alternatives", "ssl/certs", "debian_version")
EMPTY = {"tmp": 0o1777, "var/tmp": 0o1777, "run": 0o755, "root": 0o700, "home": 0o755, "proc": 0o755, "sys": 0o755, "dev": 0o755}
_ASKS = """
import json, os, sys
for name in json.loads(sys.argv[1]):
    __import__(name)
mapped = {line.split(None, 5)[5].strip() for line in open("/proc/self/maps") if "/" in line}
folders = [sys.prefix, sys.base_prefix, *filter(None, sys.path)]
print(json.dumps([[each for each in folders if os.path.isdir(each)], sorted(each for each in mapped if os.path.isfile(each))]))
"""


@dataclass(frozen=True)
class Installed:
    """A Python of a machine, and what an image made of it starts."""

    python: str  # its path on the machine
    program: str  # the name of a program of the image, which is the first word of its entrypoint
    says: str  # what that program does, in Python
    arguments: tuple[str, ...] = ()  # the rest of the entrypoint
    packages: Path | None = None  # a folder that is on PYTHONPATH in the image
    imports: tuple[str, ...] = ()  # whose shared libraries are taken along, wherever they lie
    env: Mapping[str, str] = field(default_factory=dict)
    machine: Path = Path("/")  # the machine's root


def write_machine_image(installed: Installed, image: str, archive: Path, driver: Collection[Path] = ()) -> None:
    """`driver`: files of the GPU driver, by their paths on the machine. Raises: RuntimeError, what that Python does not import."""
    folders, mapped = _asked(installed)
    env = {"PATH": f"{Path(installed.python).parent}:{PATH}", **installed.env}
    if installed.packages:
        env["PYTHONPATH"] = PACKAGES
    left_out = {str(path).lstrip("/") for path in driver}

    def kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        unwanted = member.name in LEFT_OUT or member.name in left_out or member.name.startswith(TOOLKIT)
        return None if unwanted else member

    with image_archive(image, archive, [f"/usr/local/bin/{installed.program}", *installed.arguments], env) as layer:
        for name, mode in EMPTY.items():
            _add_folder(layer, name, mode)
        there: list[Path] = []
        for folder in (*(Path("/", each) for each in SYSTEM), *folders):
            _add(layer, installed.machine, folder, there, kept)
        for setting in SETTINGS:
            if (source := installed.machine / "etc" / setting).exists():
                layer.add(source, f"etc/{setting}")
        for library in mapped:
            name = str(library).lstrip("/")
            there_already = any(library.is_relative_to(each) for each in there) and not name.startswith(TOOLKIT)
            if not there_already and name not in left_out:
                layer.add(installed.machine / name, name)
        if installed.packages:
            layer.add(installed.packages, PACKAGES.lstrip("/"), filter=kept)
        script = f"#!{installed.python}\n{installed.says}\n".encode()
        member = tarfile.TarInfo(f"usr/local/bin/{installed.program}")
        member.size, member.mode = len(script), 0o755
        layer.addfile(member, io.BytesIO(script))


def on_machine(machine: Path, *command: str, env: Mapping[str, str] | None = None) -> str:
    """What a program of the machine prints. Raises: RuntimeError, what it said instead."""
    inside = [] if machine == Path("/") else ["chroot", str(machine)]
    known = {key: os.environ[key] for key in ("LD_LIBRARY_PATH", "HOME") if key in os.environ}
    where = {"PATH": PATH, **known, **(env or {})}
    done = subprocess.run([*inside, *command], capture_output=True, text=True, check=False, env=where)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)[:200]}` failed on the machine: {(done.stdout + done.stderr).strip()[-2000:]}")
    return done.stdout


def _asked(installed: Installed) -> tuple[list[Path], list[Path]]:
    """Folders that the Python is made of and imports from, and the files that it maps with the modules that are named."""
    packages = None  # as the machine sees them
    if installed.packages and installed.imports:
        packages = Path("/", installed.packages.resolve().relative_to(installed.machine.resolve()))
    env = {"PYTHONPATH": str(packages)} if packages else {}
    said = on_machine(installed.machine, installed.python, "-c", _ASKS, json.dumps(installed.imports), env=env)
    folders, mapped = ([Path(each) for each in found] for found in json.loads(said.splitlines()[-1]))

    def others(paths: list[Path]) -> list[Path]:
        return [path for path in paths if not (packages and path.is_relative_to(packages))]

    return others(folders), others(mapped)


def _add(layer: tarfile.TarFile, machine: Path, folder: Path, there: list[Path], kept: object) -> None:
    """With the links that lead to it; nothing twice."""
    source = machine / folder.relative_to("/")
    if any(folder.is_relative_to(each) for each in there) or not (source.exists() or source.is_symlink()):
        return
    there.append(folder)
    layer.add(source, str(folder).lstrip("/"), filter=kept)  # type: ignore[arg-type]
    if source.is_symlink():
        target = Path(os.path.normpath(folder.parent / source.readlink()))
        _add(layer, machine, target, there, kept)


def _add_folder(layer: tarfile.TarFile, name: str, mode: int) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.mode = tarfile.DIRTYPE, mode
    layer.addfile(member)
