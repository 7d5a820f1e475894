"""What a user writes of demand that others tell (push.py)."""

from __future__ import annotations

from typing import Literal

from scaler.sources.source import Declaration

PATH = "/demand"


class PushDeclaration(Declaration):
    """by: who tells, as it says itself."""

    type: Literal["push"]
    by: str = ""

    @property
    def says(self) -> str:
        return f"what {self.by or 'others'} post to {PATH}"
