"""Every parser of what others send, by name."""

from __future__ import annotations

from tests.fuzz import agent, memory, pods, scaling

PARSERS = {parser.name: parser for room in (agent, memory, pods, scaling) for parser in room.parsers()}
