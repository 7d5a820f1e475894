"""Whether CRIU works on this node, found out by using it, as an agent starts.

That is asked once: without CRIU everything is started cold for as long as the agent lives. So what the machine has too little of for a
moment (descriptors, processes, room on its disk) is waited for.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from restore_agent.drivers.criu import Criu, CriuError
from restore_agent.places.place import PlaceError
from restore_agent.places.sandboxes import Sandboxes
from zerowake_shared.backoff import Backoff
from zerowake_shared.lack import passes

_TRIES = 6
_FIRST_PAUSE, _LAST_PAUSE = 0.2, 5.0
_LOG = logging.getLogger("zerowake.agent")


async def working_criu(sandboxes: Sandboxes, log: Path) -> Criu | CriuError:
    """The program, or why there is none that works. `log`: where what it says goes."""
    backoff, tries = Backoff(_FIRST_PAUSE, _LAST_PAUSE), _TRIES
    while True:
        tries -= 1
        try:
            if os.geteuid() != 0:
                raise CriuError("restoring needs root, for CRIU and namespaces; start the agent with sudo")
            criu = await asyncio.to_thread(Criu.find)
            criu.log = log
            async with await sandboxes.create() as sandbox:
                await criu.probe(sandbox, sandboxes.kdat)
            return criu
        except (CriuError, PlaceError) as error:
            if not tries or not passes(error.__cause__):
                _LOG.warning("engines are started cold: %s", error)
                return CriuError(str(error))
            _LOG.warning("CRIU cannot be tried yet: %s", error)
        await asyncio.sleep(backoff.next())
