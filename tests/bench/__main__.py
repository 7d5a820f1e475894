"""Runs the benchmarks of this package and prints one table: `python -m tests.bench [NAME…]`, all of them without a name.

Each runs in a process of its own, one after the other, so that none measures what another left in memory. A run of all of them is kept
in `results/`, beside the machine's specs and the command that made it; one that failed is named and makes the exit status 1.
"""

import json
import os
import pkgutil
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console

from tests import bench
from tests.bench.figures import Figure, measure, table

RESULTS = Path(__file__).parent / "results"


def benchmarks() -> list[str]:
    """The names of the modules here that can be measured."""
    names = [found.name for found in pkgutil.iter_modules(bench.__path__) if not found.name.startswith("_")]
    return [name for name in names if hasattr(import_module(f"{bench.__name__}.{name}"), "main")]


def unavailable(name: str) -> str:
    """Why the benchmark has nothing to measure here; empty: it has."""
    says: Callable[[], str] = getattr(import_module(f"{bench.__name__}.{name}"), "unavailable", lambda: "")
    return says()


def specs() -> dict[str, object]:
    """The machine, as far as it bears on a figure."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")), platform.machine())
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "transparent_hugepage": Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip(),
    }


def keep(figures: list[Figure], path: Path | None = None, command: str = "make bench", more: Mapping[str, object] | None = None) -> Path:
    """Writes a run to `results/`, under its time unless a path is given, and returns the file."""
    now = datetime.now(UTC)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=RESULTS.parent)
    run = {
        "command": command,
        "when": now.isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "machine": specs(),
        "figures": [asdict(figure) | {"met": figure.met} for figure in figures],
        **(more or {}),
    }
    RESULTS.mkdir(exist_ok=True)
    path = path or RESULTS / f"{now:%Y-%m-%dT%H%M%SZ}.json"
    path.write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n")
    return path


def main() -> int:
    console = Console()
    known = benchmarks()
    wanted = sys.argv[1:]
    if unknown := [name for name in wanted if name not in known]:
        console.print(f"no benchmark named {', '.join(unknown)}; there are: {', '.join(known)}")
        return 2
    if whole := not wanted:
        for name in known:
            if reason := unavailable(name):
                console.print(f"{name} is left out: {reason}")
            else:
                wanted.append(name)
    figures: list[Figure] = []
    failed = []
    with ProcessPoolExecutor(max_workers=1, max_tasks_per_child=1, mp_context=get_context("spawn")) as pool:
        for name in wanted:
            console.print(f"measuring {name} …")
            try:
                figures += pool.submit(measure, name).result()
            except Exception as error:
                failed.append(name)
                console.print(f"[red]{name} failed:[/] {error!r}")
    console.print(table(figures))
    if whole and not failed:
        console.print(f"kept in {keep(figures)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
