"""Fuzzes one parser, guided by what its code covers: `python -m tests.fuzz NAME --seconds 3600`.

libFuzzer (by atheris, which is in the extra `dev`) keeps what reaches new code in `.cache/fuzz/NAME/`, and goes on from there.
An input that breaks a rule ends it, and is written beside it; `python -m tests.fuzz NAME --input FILE` tries that one alone.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

FOUND = Path(".cache/fuzz")


def main() -> None:
    try:
        import atheris  # noqa: PLC0415
    except ImportError:
        sys.exit("atheris is not installed: it has wheels for Linux on x86_64 and some versions of Python; `make test` fuzzes without it")
    with atheris.instrument_imports(include=["restore_agent", "scaler", "gpumem", "zerowake_shared"]):
        from tests.fuzz.parser import LARGEST, Parser, check, little_memory, mutated  # noqa: PLC0415
        from tests.fuzz.parsers import PARSERS  # noqa: PLC0415
    arguments = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzzes a parser of what others send.")
    arguments.add_argument("name", choices=sorted(PARSERS))
    arguments.add_argument("--seconds", type=int, default=60)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--input", type=Path, help="try this one alone")
    asked = arguments.parse_args()
    parser: Parser = PARSERS[asked.name]
    if asked.input:
        check(parser, asked.input.read_bytes())
        return
    corpus = FOUND / parser.name / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(parser.seeds):
        (corpus / f"sample-{number}").write_bytes(sample)

    def changed(data: bytes, most: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if chance.random() < 0.5:
            return bytes(atheris.Mutate(data, most))
        return mutated(data, chance, parser.seeds)[:most]

    libfuzzer = ["fuzz", str(corpus), f"-max_total_time={asked.seconds}", f"-seed={asked.seed}", f"-max_len={LARGEST}", "-timeout=30"]
    libfuzzer += [f"-artifact_prefix={FOUND / parser.name}/", "-rss_limit_mb=4096", "-verbosity=1", "-print_final_stats=1"]
    with little_memory():
        atheris.Setup(libfuzzer, lambda data: check(parser, data), custom_mutator=changed)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
