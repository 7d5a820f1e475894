"""The image of the tests' containers: this machine's Python and a few programs, with the libraries they need, and the tests' server.

It is copied, not shown by an overlay of the machine's own root, for two reasons. An overlay shows nothing of what is mounted below its
layers, such as a checkout on a mount of its own. And where the root is an overlay itself, as inside a container, the kernel tells CRIU of
files that are mapped through the second one by a mount that no process can see.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.worlds.agent import ENGINE

PYTHON = Path(sys.executable).resolve()  # the virtual environment's is a link to it
SERVER, MAPPED = Path("/srv/hashing_engine.py"), Path("/srv/weights.bin")  # the tests' server, and the file that it maps

_PROGRAMS = ("sh", "cat", "cp", "ln", "mkdir", "mv", "rm", "sleep")
_FOLDERS = ("dev", "etc", "proc", "run", "srv", "sys", "tmp", "var/cache", "var/tmp")
_LEFT_OUT = shutil.ignore_patterns("site-packages", "dist-packages", "test", "idlelib", "ensurepip", "lib2to3", "tkinter", "config-*")


def write_image(image: Path) -> None:
    """Some 60 MB. `image`: an empty folder on a file system that can be a layer of an overlay, which an overlay cannot."""
    for link in Path("/").iterdir():
        if link.is_symlink() and link.name in {"bin", "sbin", "lib", "lib32", "lib64", "libx32"}:  # where /usr has all of them
            (image / link.name).symlink_to(link.readlink())
    for folder in _FOLDERS:
        (image / folder).mkdir(parents=True)
    library = Path(sysconfig.get_path("stdlib"))
    shutil.copytree(library, _inside(image, library), symlinks=True, ignore=_LEFT_OUT)
    programs = [PYTHON, *(Path(found) for name in _PROGRAMS if (found := shutil.which(name)))]
    for file in {*programs, *_libraries([*programs, *(library / "lib-dynload").glob("*.so")])}:
        shutil.copy2(file, _inside(image, file))
    (image / "etc/issue").write_text("a machine of the tests\n")
    shutil.copy2(ENGINE, _inside(image, SERVER))
    _inside(image, MAPPED).write_bytes(random.Random(11).randbytes(1 << 20))


def _inside(image: Path, path: Path) -> Path:
    """Where a path of the machine's lies in the image; the folder is there."""
    folder = image / path.parent.resolve().relative_to("/")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / path.name


def _libraries(files: Iterable[Path]) -> Iterator[Path]:
    """All that the dynamic linker would load for them, by the names that they ask for, and the linker."""
    listed = subprocess.run(["ldd", *map(os.fspath, files)], capture_output=True, text=True, check=False).stdout
    for path in sorted(set(re.findall(r"^\s.*?(/\S+) \(0x", listed, flags=re.MULTILINE))):
        yield Path(path)
