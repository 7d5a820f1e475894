"""Tables on standard output, as every command prints them.

What they say comes from elsewhere, an engine's last words among it: nothing of it is taken for markup (`[rank0]` would vanish, and `[/x]`
be an error). On a terminal a table is as wide as that; in a pipe or a file nothing is cut off, for a program reads it there.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

_WIDE = 100_000  # columns: more than any line


def console() -> Console:
    """Of standard output."""
    found = Console(markup=False, highlight=False, emoji=False)
    if not found.is_terminal:
        found.width = _WIDE
    return found


def table(*columns: str) -> Table:
    """With these headings, and no lines."""
    return Table(*columns, box=None, pad_edge=False)
