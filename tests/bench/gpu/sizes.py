"""How much memory a model takes, worked out from its shape: of a GPU, while its snapshot is taken and later, and of the host.

What a snapshot takes most of is the moment at which the weights are there twice: as vLLM has loaded them, and in the region that they are
published into. Later a model takes its weights once, and each engine that is awake a KV cache, graphs, and the sampler's tables. What does
not fit is said before the first of few minutes on a GPU is spent on it.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from restore_agent.workload.vllm.kv_cache import usual_bytes
from tests.worlds.model_shapes import Shape

GIB = 1 << 30
GRAPHS = 768 << 20  # bytes of scratch that vLLM's graphs took: 644 MiB, in steps of 256
SEQUENCES = 1024  # that vLLM serves at once, unless told, on a GPU of 70 GiB and more
CONTEXT = 1700 << 20  # bytes beside gpumem's pool that an engine holds, parked or awake: 1.3 to 1.66 GiB were measured
LOADING = 1 << 30  # bytes that come and go while weights are loaded, and in the profile run
AWAKE = 2  # engines at once: the one that the snapshot is taken of, and the one that proves it
BLOCK = 16  # tokens
TOKENS = 8192  # of the longest request, unless told
IMAGE = 5 << 29  # bytes: 2.53 GB were measured
OWN = ("/dev/shm", "/run")  # a sandbox has these to itself
PROCESS = 5 << 30  # bytes of the host that an engine takes: 2.4 GB were measured, and as many for its staged image


@dataclass(frozen=True)
class Room:
    """GiB that gpumem holds: of each GPU, and of the host."""

    reserve: int
    arena: int


@dataclass(frozen=True)
class Needs:
    """Bytes, of each GPU where nothing else is said. `least`: of KV cache, without which vLLM refuses to start."""

    weights: int
    sampler: int
    cache: int
    least: int
    ranks: int = 1
    engines: int = AWAKE  # that are awake at once
    loaded: int = 0  # bytes of weights that are there twice at once; 0: all of them
    contexts: int = 1  # engines, awake or parked

    @property
    def awake(self) -> int:
        """Of scratch, of one engine."""
        return self.cache + GRAPHS + self.sampler

    @property
    def pool(self) -> int:
        return self.weights + self.engines * self.awake

    @property
    def gpu(self) -> int:
        """The pool, and beside it weights that are being loaded, and their engines (the proof comes later); or all that wait."""
        captured = self.engines // AWAKE
        return self.pool + max((self.loaded or self.weights) + captured * (LOADING + CONTEXT), self.contexts * CONTEXT)

    @property
    def whole(self) -> int:
        """Of the host: the weights of all GPUs."""
        return self.weights * self.ranks

    @property
    def files(self) -> tuple[int, int]:
        """Bytes of models as they are downloaded, and of what zerowake keeps of them."""
        return self.loaded or self.whole, self.whole + IMAGE * self.contexts

    def room(self) -> Room:
        return Room(_gib(self.pool) + 1, _gib(self.whole) + 2)


def needs(shape: Shape, options: Sequence[str] = ()) -> Needs:
    """Of a model that vLLM serves with these options."""
    ranks = _said(options, "--tensor-parallel-size", 1)
    least = cache_for(shape, _said(options, "--max-model-len", TOKENS)) // ranks
    cache, sequences = _said(options, "--kv-cache-memory-bytes", usual_bytes(least)), _said(options, "--max-num-seqs", SEQUENCES)
    return Needs(shape.bytes // ranks, tables(shape.vocabulary, sequences), cache, least, ranks)


def together(all_of_them: Sequence[Needs], at_once: int) -> Needs:
    """Of many models that are parked on one GPU, so many of which are captured at once."""
    largest = sorted((each.weights for each in all_of_them), reverse=True)[:at_once]
    return Needs(
        weights=sum(each.weights for each in all_of_them),
        sampler=max(each.sampler for each in all_of_them),
        cache=max(each.cache for each in all_of_them),
        least=max(each.least for each in all_of_them),
        engines=AWAKE * at_once,
        loaded=sum(largest),
        contexts=len(all_of_them),
    )


def refusal(wanted: Needs, gpu: int, models: Path, work: Path) -> str:
    """Why a model cannot be benched here; empty: it can. `gpu`: bytes of the smallest GPU. The folders exist."""
    if wanted.cache < wanted.least:
        return f"its KV cache of {_gib(wanted.cache)} GiB has no room for one request: {_gib(wanted.least)} GiB, by --kv-cache-memory-bytes"
    if wanted.gpu > gpu:
        return f"its snapshot takes {_gib(wanted.gpu)} GiB of a GPU that has {gpu // GIB}: the weights are there twice for a moment"
    for folder in (models, work):
        if any(folder.resolve().is_relative_to(each) for each in OWN):
            own = " and ".join(OWN)
            return f"{folder} is not seen by an engine, whose {own} are its own: mount -t tmpfs tmpfs FOLDER makes another in memory"
    in_memory = wanted.whole + PROCESS * (wanted.contexts + 1)  # the arena, and processes
    places: dict[int, tuple[Path, int]] = {}
    for folder, size in zip((models, work), wanted.files, strict=True):
        device = folder.stat().st_dev
        places[device] = folder, max(0, size - _there(folder, but=models)) + places.get(device, (folder, 0))[1]
        in_memory += size if _is_memory(folder) else 0
    for folder, size in places.values():
        if size > (free := shutil.disk_usage(folder).free):
            return f"its files take {_gib(size)} GiB below {folder}, where {free // GIB} are free: --models names another folder for models"
    if in_memory > (there := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        return f"it takes {_gib(in_memory)} GiB of the host's memory, of {there // GIB}"
    return ""


def tables(vocabulary: int, sequences: int = SEQUENCES) -> int:
    """Bytes that vLLM's sampler counts words in: 4 for each word and sequence, and a bit."""
    return 4 * sequences * (vocabulary + -(-vocabulary // 32))


def cache_for(shape: Shape, tokens: int = TOKENS) -> int:
    """Bytes of KV cache without which vLLM refuses to start: those of one request of the longest kind, in whole blocks.

    A state space's state has one size whatever the length, and vLLM makes its pages as large as those of attention, or larger.
    """
    config = shape.config
    blocks = -(-tokens // BLOCK) + 1  # one of them is nobody's
    attention: int = 2 * 2 * config["num_key_value_heads"] * shape.head * BLOCK * blocks * shape.layers
    return attention + state_of(shape) * shape.layers * 2


def state_of(shape: Shape) -> int:
    """Bytes of one layer's state of one sequence; 0: it has none. Both parts are of 16 bits, as vLLM keeps them for a model of bfloat16."""
    config = shape.config
    if "mamba_d_ssm" not in config:
        return 0
    width = config["mamba_d_ssm"] + 2 * config["mamba_n_groups"] * config["mamba_d_state"]
    heads = config["mamba_n_heads"] * config["mamba_d_head"] * config["mamba_d_state"]
    return int(2 * (width * (config["mamba_d_conv"] - 1) + heads))


def _said(options: Sequence[str], name: str, otherwise: int) -> int:
    """The last that is said counts, as it does for vLLM."""
    found = otherwise
    for word, following in itertools.pairwise([*options, ""]):
        option, equals, value = word.partition("=")
        if option == name:
            found = int(value if equals else following)
    return found


def _gib(size: int) -> int:
    return -(-size // GIB)


def _there(folder: Path, but: Path) -> int:
    """Bytes of files that a command before has left, as it was told to; without those of a folder within."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files if folder == but or not path.is_relative_to(but))


def _is_memory(folder: Path) -> bool:
    """Whether its files lie in memory."""
    mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [(len(place), kind) for _, place, kind in mounts if folder.resolve().is_relative_to(place)]
    return max(inside)[1] in ("tmpfs", "ramfs")
