"""What all have in common for which a snapshot that is here cannot be used."""

from __future__ import annotations

from restore_agent.errors import AgentError


class Unusable(AgentError):
    """A snapshot on this disk is not one to restore; says why."""
