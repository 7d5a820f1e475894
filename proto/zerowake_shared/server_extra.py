"""zerowake installs beside any engine, so without its programs' dependencies: a program that is started there says what to install."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

INSTALL = "pip install '.[server]' in a checkout of zerowake, or 'WHEEL[server]' from its wheel"
_OURS = ("gpumem", "restore_agent", "scaler", "zerowake_native", "zerowake_proto", "zerowake_shared")


@contextlib.contextmanager
def needed_by(program: str) -> Iterator[None]:
    """Around a program's imports. Ends the process with one line on stderr and exit code 1 where one is missing that the extra brings."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in _OURS:
            raise
        sys.exit(f"{program}: {missing} is not installed, which zerowake's extra `server` brings: {INSTALL}")
