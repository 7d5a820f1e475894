"""The C parts, built with sanitizers, under the tests that use them: `python -m tests.sanitized`.

First all of them with AddressSanitizer and UndefinedBehaviorSanitizer, then those that threads run with ThreadSanitizer. What is built is
what the wheel has (`deploy/build_hook.py`), from the same files, but linked dynamically: the sanitizers do not go with a static C library.
It lies in a package of the same name, which is found first. A program that does what it must not aborts, and the test that needed it fails,
with the sanitizer's words in its output. The libraries are loaded into Python, which has to be started with the sanitizer's own before all
others (`worlds/sanitizer_first.py`); what else it starts is not, but for what a test preloads renewal.c into.
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

from tests.worlds.renewing import INSTEAD

ROOT = Path(__file__).parents[1]
PLACE, THREADS_PLACE = ROOT / ".cache/sanitized", ROOT / ".cache/sanitized-threads"
SANITIZER = "ZEROWAKE_TEST_SANITIZER"  # in the environment: the library that comes first
PAGE_FILL, RENEWAL = ROOT / "restore_agent/pages/page_fill.c", ROOT / "restore_agent/workload/renewal.c"
LIBRARY = ("-shared", "-fPIC", "-pthread")
PROGRAM = ("-fsanitize=address,undefined", "-static-libasan", "-static-libubsan")
ADDRESSES = ("-fsanitize=address,undefined", *LIBRARY)
THREADS = ("-fsanitize=thread", *LIBRARY)
BUILDS = {
    "page_fill": ADDRESSES,
    # It is preloaded into whatever an engine starts, where AddressSanitizer would have to come first.
    "renewal": ("-fsanitize=undefined", "-static-libubsan", *LIBRARY),
    # It runs on the files of a tenant's image, which may have no C library; as a program of this machine test_sanitized.py has it.
    "placeholder": ("-fsanitize=undefined", "-static"),
}
TESTS = (
    *("native", "fill", "sandbox", "sandboxes", "placeholder", "joining", "container", "overlay", "restore"),
    *("renewal", "renewal_at_start", "renewal_preloaded", "identity"),
)
OF_THREADS = (PAGE_FILL, RENEWAL)
THREADS_TESTS = ("native", "fill", "renewal_preloaded")
# What a short program leaves unfreed at its end is nobody's loss, and Python's own is not ours to mend.
_OF_ADDRESSES = "detect_leaks=0:abort_on_error=1"
OPTIONS = {"ASAN_OPTIONS": _OF_ADDRESSES, "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1"}
# In the programs, as well: the agent gives `join` an environment of its own, and a search for leaks hangs in a container's pid namespace.
_BUILT_IN = f'const char *__asan_default_options(void);\nconst char *__asan_default_options(void) {{ return "{_OF_ADDRESSES}"; }}\n'
# What a process with threads forks starts one, as renewal.c does.
THREADS_OPTIONS = {"TSAN_OPTIONS": "halt_on_error=1:abort_on_error=1:die_after_fork=0"}
_RANDOM_BITS = 28  # of an address


def compiler() -> str | None:
    """One that has the sanitizers; None: there is none."""
    found = shutil.which("gcc")
    return found if found and all(Path(runtime(found, name)).is_absolute() for name in ("asan", "tsan")) else None


def runtime(gcc: str, name: str) -> str:
    """The library of a sanitizer, to be loaded before all others; a mere name: there is none."""
    return subprocess.run([gcc, f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True).stdout.strip()


def build(gcc: str, place: Path = PLACE) -> None:
    """Makes the package in that folder, and beside it `placeholder` and `renewal.so` with both sanitizers.

    Raises: CalledProcessError: the compiler's words are on stderr.
    """
    package, options = _package(place), place / "options.c"
    options.write_text(_BUILT_IN)
    program = (*PROGRAM, str(options))
    for source in sorted((ROOT / "restore_agent").rglob("*.c")):
        target = package / getattr(zerowake_native, source.stem.upper()).name
        compile_(gcc, source, target, BUILDS.get(source.stem, program))
    compile_(gcc, ROOT / "restore_agent/places/placeholder.c", place / "placeholder", program)
    compile_(gcc, RENEWAL, place / "renewal.so", ADDRESSES)


def build_for_threads(gcc: str, place: Path = THREADS_PLACE) -> None:
    """Makes the package in that folder, with ThreadSanitizer where threads run, and otherwise as it is installed; and beside it
    `renewal.so`.

    Raises: CalledProcessError: the compiler's words are on stderr.
    """
    package = _package(place)
    shutil.copytree(Path(zerowake_native.__file__).parent, package, dirs_exist_ok=True)
    for source in OF_THREADS:
        compile_(gcc, source, package / getattr(zerowake_native, source.stem.upper()).name, THREADS)
    shutil.copy(package / zerowake_native.RENEWAL.name, place / "renewal.so")


def compile_(gcc: str, source: Path, target: Path, how: Sequence[str]) -> None:
    """As the wheel is compiled, but `how`. Raises CalledProcessError."""
    flags = re.findall(r'"(-[^"]+)"', re.search(r"^CFLAGS = \((.*)\)$", (ROOT / "deploy/build_hook.py").read_text(), re.MULTILINE)[1])  # type: ignore[index]
    wanted = [gcc, *flags, *how, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1", "-o", str(target), str(source)]
    subprocess.run(wanted, check=True)


def _package(place: Path) -> Path:
    package = place / "zerowake_native"
    package.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(zerowake_native.__file__).with_name("__init__.py"), package)
    shutil.copy(ROOT / "tests/worlds/sanitizer_first.py", place / "sitecustomize.py")
    return package


def environment(gcc: str, place: Path = PLACE) -> dict[str, str]:
    """Of a Python that uses the package of `build`."""
    return _environment(place, runtime(gcc, "asan"), OPTIONS)


def environment_for_threads(gcc: str, place: Path = THREADS_PLACE) -> dict[str, str]:
    """Of a Python that uses the package of `build_for_threads`."""
    return _environment(place, runtime(gcc, "tsan"), THREADS_OPTIONS)


def _environment(place: Path, first: str, options: dict[str, str]) -> dict[str, str]:
    own = {"PYTHONPATH": str(place), SANITIZER: first, "LD_PRELOAD": first, INSTEAD: f"{first}:{place / 'renewal.so'}"}
    return os.environ | options | own


def command(*asked: str) -> list[str]:
    """pytest, in one of those environments. What a sanitizer says as it ends pytest itself must not be captured, and gone with it."""
    return [sys.executable, "-m", "pytest", "-q", "-r", "s", "--capture=sys", "-p", "tests.worlds.sanitized_package", *asked]


def command_for_threads(*asked: str) -> list[str]:
    """The same, where addresses are such as gcc's ThreadSanitizer before 14 can do with."""
    random_bits = int(Path("/proc/sys/vm/mmap_rnd_bits").read_text())
    return [*(["setarch", "--addr-no-randomize"] if random_bits > _RANDOM_BITS else []), *command(*asked)]


def files(names: Sequence[str]) -> list[str]:
    """Of tests."""
    return [f"tests/restore_agent/test_{name}.py" for name in names]


def main() -> int:
    gcc = compiler()
    if gcc is None:
        sys.exit("gcc with its sanitizers is needed (Debian, Ubuntu: apt-get install gcc libc6-dev)")
    build(gcc)
    build_for_threads(gcc)
    asked = sys.argv[1:]
    runs = (
        subprocess.run(command(*(asked or files(TESTS))), env=environment(gcc), check=False, cwd=ROOT),
        subprocess.run(command_for_threads(*(asked or files(THREADS_TESTS))), env=environment_for_threads(gcc), check=False, cwd=ROOT),
    )
    return max(run.returncode for run in runs)


if __name__ == "__main__":
    sys.exit(main())
