"""What the adapters and gpumem's client import of torch, in the torch that each released engine is made for."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from restore_agent.workload.fitting import Imported, Module, Sources
from tests.engines.releases import Release, releases

ROOT = Path(__file__).parents[2]
SHARED = (
    "restore_agent/workload/context_memory.py",
    "restore_agent/workload/lent_memory.py",
    "restore_agent/workload/lent_weights.py",
    "gpumem/client/torch.py",
)
OF_VLLM = ("restore_agent/workload/vllm/worker.py", *SHARED)
OF_SGLANG = ("restore_agent/workload/sglang/scheduler.py", *SHARED)
# Used where they are, with no import of their own; those of the module in C by what is said of it.
ATTRIBUTES = (
    ("torch.cuda", "CUDAGraph"),
    ("torch.cuda", "MemPool"),
    ("torch.cuda", "empty_cache"),
    ("torch.cuda", "memory_reserved"),
    ("torch.cuda", "synchronize"),
)
IN_C = ("_cuda_clearCublasWorkspaces", "_cuda_customAllocator")


@cache
def of_version(version: str) -> Release:
    return next(each for each in releases("torch", since=version, parts=3) if str(each.version) == version)


def torch_of(release: Release) -> Release:
    (described,) = [file for file in release.files if file.endswith(".dist-info/METADATA")]
    pinned = re.search(r"^Requires-Dist: torch==([\d.]+)$", release.text(described), re.MULTILINE)
    assert pinned, f"{release} names no torch"
    return of_version(pinned[1])


@pytest.mark.parametrize("file", OF_VLLM)
def test_what_is_imported_of_vllm_s_torch_is_there(vllm: Release, file: str) -> None:
    check(torch_of(vllm), file)


@pytest.mark.parametrize("file", OF_SGLANG)
def test_what_is_imported_of_sglang_s_torch_is_there(sglang: Release, file: str) -> None:
    check(torch_of(sglang), file)


def check(torch: Release, file: str) -> None:
    sources = Sources(torch.read, package="torch")
    imported = [each for each in Module(file, (ROOT / file).read_text(), is_package=False).names.values() if isinstance(each, Imported)]
    wanted = [(each.module, each.name) for each in imported if each.module.partition(".")[0] == "torch"]
    assert wanted
    assert [f"{torch} has no {module}.{name}" for module, name in (*wanted, *ATTRIBUTES) if sources.find(module, name) is None] == []


def test_what_the_module_in_c_of_vllm_s_torch_has(vllm: Release) -> None:
    check_in_c(torch_of(vllm))


def test_what_the_module_in_c_of_sglang_s_torch_has(sglang: Release) -> None:
    check_in_c(torch_of(sglang))


def check_in_c(torch: Release) -> None:
    said = torch.text("torch/_C/__init__.pyi")
    assert [name for name in IN_C if f"def {name}(" not in said] == [], torch
