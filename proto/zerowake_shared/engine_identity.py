"""By what an engine of one machine is known to be started as it was before: a snapshot of another one is no snapshot of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence


def engine_identity(command: Sequence[str], env: Mapping[str, str], directory: str) -> str:
    """A hash, hex. All three as their owner gave them: without what a preset adds, and what is passed on from the machine's environment.

    Of its files nothing is in it: those that an engine maps or holds open are in the snapshot, by their content.
    """
    said = json.dumps([list(command), dict(sorted(env.items())), directory], separators=(",", ":"))
    return hashlib.sha256(said.encode()).hexdigest()
