"""What the kernel takes for a program that is started: a mistake here would otherwise be an exit code without a reason, minutes later."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

_LONGEST = 128 * 1024 - 1  # bytes of one argument or variable (MAX_ARG_STRLEN, with the NUL at its end)
_RESERVE = 64 * 1024  # what we add ourselves


def flaw_of_command(command: Sequence[str]) -> str:
    """Why nothing can be started by it; empty: something may."""
    if command and not command[0].strip():
        return "the program's name is empty"
    for number, word in enumerate(command):
        if why := _no_text(word):
            return f"word {number + 1} {why}"
        if (size := len(os.fsencode(word))) > _LONGEST:
            return f"word {number + 1} has {size} bytes, and the kernel takes {_LONGEST} at most: pass it in a file"
    return ""


def _no_text(word: str) -> str:
    if "\0" in word:
        return "has a NUL character"
    try:
        word.encode()
    except UnicodeEncodeError:  # bytes of a command line that Python has carried along
        return "is no text in UTF-8"
    return ""


def flaw_of_environment(env: Mapping[str, str], command: Sequence[str] = ()) -> str:
    """Why no program can be started in it; empty: one can. `command`: what is started, since both share one bound."""
    for key, value in env.items():
        if not key or "=" in key or _no_text(key):
            return f"{key!r} cannot be the name of a variable"
        if why := _no_text(value):
            return f"{key} {why}"
        if (size := len(os.fsencode(f"{key}={value}"))) > _LONGEST:
            return f"{key} has {size} bytes, and the kernel takes {_LONGEST} at most: put it into a file, and its path here"
    total = sum(len(os.fsencode(word)) + 9 for word in command) + sum(len(os.fsencode(f"{key}={value}")) + 9 for key, value in env.items())
    most = os.sysconf("SC_ARG_MAX") - _RESERVE
    return (
        f"variables and command have {total} bytes, and the kernel takes {most} at most: put some of it into a file" if total > most else ""
    )
