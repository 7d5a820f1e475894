"""What a model may be called: one rule, for every place where a name is declared.

A name stands in JSON, in a header, in a path and in a trigger's metadata, and has to be the same in all of them. So it is text that can be
seen whole: no control characters, no space at either end (HTTP takes those off a header's value), no other kind of space. Slashes, colons
and letters of any script are fine.
"""

from __future__ import annotations

LONGEST = 512  # characters


class BadModelName(ValueError):
    """A model cannot be called so; the message says why."""


def check_model_name(name: str) -> str:
    """The name as it is. Raises: BadModelName."""
    if why := flaw(name):
        raise BadModelName(f"a model cannot be called {name[:LONGEST]!r}: {why}")
    return name


def flaw(name: str) -> str:
    """Why a model cannot be called so; empty: it can."""
    if not name:
        return "the name is empty"
    if name != name.strip():
        return "the name begins or ends with a space"
    if not name.isprintable():
        bad = next(each for each in name if not each.isprintable())
        return f"the name has a character that cannot be seen, {bad!a}"
    if len(name) > LONGEST:
        return f"the name has more than {LONGEST} characters"
    return ""
