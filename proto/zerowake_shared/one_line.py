"""What a program says when it ends because of its user's mistake: one line on standard error, and exit code 1.

An error may come wrapped: whatever runs in task groups raises groups of errors, each of them maybe a group again. What is inside counts.
Whatever is no mistake of the user's is a bug, and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

EXIT_CODE = 1


@contextlib.contextmanager
def errors_in_one_line(program: str, *known: type[Exception]) -> Iterator[None]:
    """Around all that a program does. `known`: errors whose text is for users; those of the system, and bad values, always are.

    Raises:
        SystemExit: it failed, and has said why.
    """
    ours: tuple[type[Exception], ...] = (OSError, ValueError, *known)
    try:
        yield
    except Exception as error:
        causes = list(_causes(error))
        if not all(isinstance(cause, ours) for cause in causes):
            raise
        for line in dict.fromkeys(map(described, causes)):
            print(f"{program}: {line}", file=sys.stderr)
    else:
        return
    raise SystemExit(EXIT_CODE)


def described(error: Exception) -> str:
    """The error in one line: an OSError of the system's begins with the file that it is about."""
    if isinstance(error, OSError) and error.strerror:
        files = [str(each) for each in (error.filename, error.filename2) if each is not None]
        text = f"{' and '.join(files)}: {error.strerror}" if files else error.strerror
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


def _causes(error: Exception) -> Iterator[Exception]:
    if isinstance(error, ExceptionGroup):
        for each in error.exceptions:
            yield from _causes(each)
    else:
        yield error
