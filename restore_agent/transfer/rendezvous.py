"""Who of a fleet reads which chunk from where it comes from: rendezvous hashing (Thaler and Ravishankar, 1998).

Each chunk ranks the members by the hash of its name and theirs. The first is the one that reads it, the others take it from that one. All
members find the same ranks without a word among them. Where a member goes, only its own chunks get another reader: the next in their rank.
Rejected: giving chunks out in turn (whoever is told of another set of members would give out all of them otherwise), and a coordinator,
which would have to be there and to be asked.
"""

from __future__ import annotations

from collections.abc import Iterable

from blake3 import blake3


def ranked(chunk_hash: str, members: Iterable[str]) -> list[str]:
    """The members, the one that reads the chunk first."""
    return sorted(set(members), key=lambda member: blake3(f"{chunk_hash} {member}".encode()).digest())
