"""The agent's program but for one thing: of images in memory the one that was used longest ago leaves first, whatever it costs to bring it
back. For ten_nodes.py, which compares the two.
"""

from __future__ import annotations

from restore_agent.snapshots.eviction import Candidate
from restore_agent.snapshots.uses import Uses
from scaler.programs.cli import main


def last_use(self: Uses, digest: str) -> float:
    return self._counts.get(digest, (0.0, 0.0))[1]


if __name__ == "__main__":
    Uses.of = last_use  # type: ignore[method-assign]
    Candidate.worth = property(lambda self: self.uses)  # type: ignore[method-assign, assignment]
    main()
