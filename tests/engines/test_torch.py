"""What the adapter and gpumem's client import of torch, in the torch that each released vLLM is made for."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from restore_agent.workload.vllm.fitting import Imported, Module, Sources
from tests.engines.releases import Release, releases

ROOT = Path(__file__).parents[2]
OURS = ("restore_agent/workload/vllm/worker.py", "gpumem/client/torch.py")
# Used where they are, with no import of their own; those of the module in C by what is said of it.
ATTRIBUTES = (("torch.cuda", "MemPool"), ("torch.cuda", "empty_cache"), ("torch.cuda", "memory_reserved"), ("torch.cuda", "synchronize"))
IN_C = ("_cuda_customAllocator",)


@cache
def of_version(version: str) -> Release:
    return next(each for each in releases("torch", since=version, parts=3) if str(each.version) == version)


def torch_of(release: Release) -> Release:
    (described,) = [file for file in release.files if file.endswith(".dist-info/METADATA")]
    pinned = re.search(r"^Requires-Dist: torch==([\d.]+)$", release.text(described), re.MULTILINE)
    assert pinned, f"{release} names no torch"
    return of_version(pinned[1])


@pytest.mark.parametrize("file", OURS)
def test_what_is_imported_of_torch_is_there(vllm: Release, file: str) -> None:
    torch = torch_of(vllm)
    sources = Sources(torch.read, package="torch")
    imported = [each for each in Module(file, (ROOT / file).read_text(), is_package=False).names.values() if isinstance(each, Imported)]
    wanted = [(each.module, each.name) for each in imported if each.module.partition(".")[0] == "torch"]
    assert any(name for _, name in wanted)
    assert [f"{torch} has no {module}.{name}" for module, name in (*wanted, *ATTRIBUTES) if sources.find(module, name) is None] == []


def test_what_torch_s_module_in_c_has(vllm: Release) -> None:
    torch = torch_of(vllm)
    said = torch.text("torch/_C/__init__.pyi")
    assert [name for name in IN_C if f"def {name}(" not in said] == [], torch
