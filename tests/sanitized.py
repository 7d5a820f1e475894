"""The C parts, built with AddressSanitizer and UndefinedBehaviorSanitizer, under the tests that use them: `python -m tests.sanitized`.

What is built is what the wheel has (`deploy/build_hook.py`), from the same files, but linked dynamically: AddressSanitizer does not go with
a static C library. It lies in a package of the same name, which is found first. A program that does what it must not aborts, and the test
that needed it fails, with the sanitizer's words in its output. The library is loaded into Python, which has to be started with the
sanitizer's own library before all others; what Python starts is not.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import zerowake_native

ROOT = Path(__file__).parents[1]
PLACE = ROOT / ".cache/sanitized"
PROGRAM = ("-fsanitize=address,undefined", "-static-libasan", "-static-libubsan")
BUILDS = {
    "page_fill": ("-fsanitize=address,undefined", "-shared", "-fPIC", "-pthread"),
    # It is preloaded into whatever an engine starts, where AddressSanitizer would have to come first.
    "renewal": ("-fsanitize=undefined", "-static-libubsan", "-shared", "-fPIC", "-pthread"),
    # It runs on the files of a tenant's image, which may have no C library; as a program of this machine test_sanitized.py has it.
    "placeholder": ("-fsanitize=undefined", "-static"),
}
TESTS = ("native", "fill", "sandbox", "sandboxes", "placeholder", "joining", "container", "overlay", "restore")
# What a short program leaves unfreed at its end is nobody's loss, and Python's own is not ours to mend.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1"}


def compiler() -> str | None:
    """One that has the sanitizers; None: there is none."""
    found = shutil.which("gcc")
    if found is None:
        return None
    said = subprocess.run([found, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    return found if Path(said).is_absolute() else None


def preloaded(gcc: str) -> str:
    """The sanitizers' library, to be loaded before all others."""
    return subprocess.run([gcc, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()


def build(gcc: str, place: Path = PLACE) -> None:
    """Makes the package in that folder, and beside it `placeholder`, with both sanitizers.

    Raises: CalledProcessError: the compiler's words are on stderr.
    """
    package, installed = place / "zerowake_native", Path(zerowake_native.__file__).parent
    package.mkdir(parents=True, exist_ok=True)
    shutil.copy(installed / "__init__.py", package)
    flags = re.findall(r'"(-[^"]+)"', re.search(r"^CFLAGS = \((.*)\)$", (ROOT / "deploy/build_hook.py").read_text(), re.MULTILINE)[1])  # type: ignore[index]

    def compile_(source: Path, target: Path, how: Sequence[str]) -> None:
        wanted = [gcc, *flags, *how, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1", "-o", str(target), str(source)]
        subprocess.run(wanted, check=True)

    for source in sorted((ROOT / "restore_agent").rglob("*.c")):
        target = package / getattr(zerowake_native, source.stem.upper()).name
        compile_(source, target, BUILDS.get(source.stem, PROGRAM))
    compile_(ROOT / "restore_agent/places/placeholder.c", place / "placeholder", PROGRAM)


def environment(gcc: str, place: Path = PLACE) -> dict[str, str]:
    """Of a Python that uses the package."""
    return os.environ | OPTIONS | {"PYTHONPATH": str(place), "LD_PRELOAD": preloaded(gcc)}


def main() -> int:
    gcc = compiler()
    if gcc is None:
        sys.exit("gcc with its sanitizers is needed (Debian, Ubuntu: apt-get install gcc libc6-dev)")
    build(gcc)
    files = [f"tests/restore_agent/test_{name}.py" for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-r", "s", "-p", "tests.worlds.not_preloaded", *(sys.argv[1:] or files)]
    return subprocess.run(command, env=environment(gcc), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
