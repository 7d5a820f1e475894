"""The command line as a user types it."""

import asyncio
import sys


async def zerowake(*arguments: str, code: int = 0) -> str:
    """What it printed; of one that fails with `code`, what it printed about that."""
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "scaler.programs.cli", *arguments], stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == code, err.decode()
    return (out if code == 0 else err).decode()
