"""Every parser of what others send, over some hundred inputs that are nearly real: the same ones each time.

`python -m tests.fuzz NAME --seconds S` goes on from there, guided by what the code covers.
"""

from __future__ import annotations

import os
import random
import time

import pytest

from tests.fuzz.parser import check, little_memory, mutated
from tests.fuzz.parsers import PARSERS

INPUTS = 400
SECONDS = 1.5


@pytest.mark.parametrize("name", sorted(PARSERS))
def test_whatever_is_sent_is_read_or_refused(name: str) -> None:
    parser = PARSERS[name]
    if name == "changes" and os.geteuid():
        pytest.skip("needs root: a place has a file system of its own")
    for sample in parser.samples:
        parser.parse(sample)
    chance = random.Random(name)
    begun = time.process_time()
    with little_memory():
        for _ in range(INPUTS):
            if time.process_time() - begun > SECONDS:
                break
            data = mutated(chance.choice(parser.seeds), chance, parser.seeds)
            try:
                check(parser, data)
            except Exception as error:
                error.add_note(f"{name}: {data[:2000]!r}")
                raise
