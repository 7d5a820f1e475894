"""How a program is asked to stop."""

import asyncio
import os
import signal

from scaler.programs.stopping import stopped_by


async def test_the_first_signal_of_them_stops_and_does_nothing_else() -> None:
    stop = stopped_by(signal.SIGUSR1, signal.SIGUSR2)
    assert not stop.is_set()
    os.kill(os.getpid(), signal.SIGUSR2)
    await asyncio.wait_for(stop.wait(), 5)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        asyncio.get_running_loop().remove_signal_handler(number)
