"""How much memory a model takes, worked out from its shape: of a GPU, while its snapshot is taken and later, and of the host.

What a snapshot takes most of is the moment at which the weights are there twice: as vLLM has loaded them, and in the region that they are
published into. Later a model takes its weights once, and each engine that is awake a KV cache, graphs, and the sampler's tables.
"""

from __future__ import annotations

from dataclasses import dataclass

from restore_agent.engine.presets import CACHE_BYTES
from tests.bench.gpu.run import Room
from tests.worlds.model_shapes import Shape

GIB = 1 << 30
GRAPHS = 768 << 20  # bytes of scratch that vLLM's graphs took: 644 MiB, in steps of 256
SEQUENCES = 1024  # that vLLM serves at once, unless told, on a GPU of 70 GiB and more
CONTEXT = 1700 << 20  # bytes beside gpumem's pool that an engine holds, parked or awake: 1.3 to 1.66 GiB were measured
LOADING = 1 << 30  # bytes that come and go while weights are loaded, and in the profile run
AWAKE = 2  # engines at once: the one that the snapshot is taken of, and the one that proves it
BLOCK = 16  # tokens
TOKENS = 8192  # of the longest request


@dataclass(frozen=True)
class Needs:
    """Bytes. `gpu` is what the GPU has to have while the snapshot is taken, `host` what the machine has for weights alone."""

    weights: int
    sampler: int
    cache: int

    @property
    def awake(self) -> int:
        """Of scratch, of one engine."""
        return self.cache + GRAPHS + self.sampler

    @property
    def pool(self) -> int:
        return self.weights + AWAKE * self.awake

    @property
    def gpu(self) -> int:
        """Loaded weights and one engine beside the pool; the one that proves comes when they are gone."""
        return self.pool + self.weights + LOADING + CONTEXT

    @property
    def files(self) -> int:
        """As they are downloaded, and as they are published."""
        return 2 * self.weights

    @property
    def host(self) -> int:
        """The arena, beside the files where those lie in memory."""
        return self.weights


def needs(shape: Shape, cache: int = CACHE_BYTES, sequences: int = SEQUENCES) -> Needs:
    return Needs(shape.bytes, tables(shape.vocabulary, sequences), cache)


def tables(vocabulary: int, sequences: int = SEQUENCES) -> int:
    """Bytes that vLLM's sampler counts words in: 4 for each word and sequence, and a bit."""
    return 4 * sequences * (vocabulary + -(-vocabulary // 32))


def room(shape: Shape, cache: int = CACHE_BYTES) -> Room:
    """What gpumem is to hold for one model, in whole GiB."""
    wanted = needs(shape, cache)
    return Room(-(-wanted.pool // GIB) + 1, -(-wanted.host // GIB) + 2)


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
