"""The end of a program: when its own code is through, without the interpreter being taken apart around the threads of libraries.

Libraries have threads that run Python for a moment, as obstore's do when they hand in what was asked for. One that waits for the
interpreter while that is taken apart is ended by Python (before 3.14) in a way that aborts the whole process if the thread is Rust's:
the command has done its work, and ends with SIGABRT and a core dump. One in eight short commands on a bucket did.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def ends_at_once(program: str) -> Iterator[None]:
    """Around all that a program does, its imports too: what they register with atexit is run, and nothing after it.

    The exit code is what it would have been. Output that cannot be written any more is an error, as it is elsewhere.
    """
    code = 1

    def end() -> None:
        try:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()
        except OSError as error:
            os.write(2, f"{program}: its last output could not be written: {error}\n".encode())
            os._exit(code or 1)
        os._exit(code)

    atexit.register(end)  # before any other, so that it is the last to be called
    try:
        yield
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
    else:
        code = 0
