"""zerowake, comparing every page of each replica that it restores with the image: `python -m tests.worlds.compared agent --state …`

Anything that `zerowake` can do. A page that differs fails the restore; what was compared goes to stderr.
"""

from __future__ import annotations

import asyncio
import sys

from restore_agent.pages.fill import FillError
from restore_agent.places.place import Place
from restore_agent.sequences.phases import Phases
from restore_agent.sequences.restore import Restorer
from restore_agent.sequences.staged import Staged
from scaler.programs.cli import main
from tests.worlds.comparison import Different, compare

_fill = Restorer._fill


async def _fill_and_compare(self: Restorer, staged: Staged, place: Place, phases: Phases) -> None:
    await _fill(self, staged, place, phases)
    arena = await asyncio.shield(staged.arena)
    try:
        found = await asyncio.to_thread(compare, arena, staged.directory / "images", place.host_pids())
    except Different as error:
        raise FillError(str(error)) from None
    print(f"compared {found.filled} filled, {found.kept} kept, {found.zeros} zeros", file=sys.stderr, flush=True)


if __name__ == "__main__":
    Restorer._fill = _fill_and_compare  # type: ignore[method-assign]
    main()
