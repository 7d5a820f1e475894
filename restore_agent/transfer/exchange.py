"""What this node gives to other agents and takes from them, while a snapshot comes to it and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from restore_agent.errors import AgentError
from restore_agent.transfer.cascade import Cascade
from restore_agent.transfer.offers import Offered, Offers
from restore_agent.transfer.peer import Peers
from restore_agent.transfer.source import Source, TransferError
from restore_agent.transfer.source_states import SourceStates


class NoPeers(AgentError):
    """This agent neither serves other agents nor reads from them."""

    def __init__(self) -> None:
        super().__init__("this agent reads nothing from others: it was started without --peers HOST:PORT and --tls FOLDER")


@dataclass(frozen=True, slots=True)
class OtherAgent:
    """One that serves a snapshot. complete: it has all of it; else it is fetching it, too."""

    node: str
    address: str  # HOST:PORT
    complete: bool


class Exchange:
    """Of one node."""

    def __init__(self, here: str, offers: Offers, peers: Peers, port: int) -> None:
        """`here`: the node's name. `port`: where it serves others."""
        self._here = here
        self._offers = offers
        self._peers = peers
        self.port = port

    def fleet(self, namespace: str, digest: str, others: Sequence[OtherAgent], origins: Sequence[Source], states: SourceStates) -> Fleet:
        """All who have a snapshot, or are fetching it. `states`: hears what agents give. Raises ValueError: an address is none."""
        others = [other for other in others if other.node != self._here]
        members = {other.node: self._to(other, namespace, digest, states) for other in others if not other.complete}
        holders = {other.node: self._to(other, namespace, digest, states)(0.0) for other in others if other.complete}
        return Fleet(self._here, self._offers, members, holders, origins)

    def _to(self, other: OtherAgent, namespace: str, digest: str, states: SourceStates) -> Callable[[float], Source]:
        def peer(patience: float) -> Source:
            return states.measured(self._peers.peer(other.address, namespace, digest, patience), "agent")

        peer(0.0)  # its address is looked at now
        return peer


class Fleet:
    """Where one snapshot is taken from, and to whom it is given as it comes."""

    def __init__(
        self,
        here: str,
        offers: Offers,
        members: dict[str, Callable[[float], Source]],
        holders: dict[str, Source],
        origins: Sequence[Source],
    ) -> None:
        self._here = here
        self._offers = offers
        self._members = members
        self._holders = holders
        self._origins = origins

    @property
    def sources(self) -> list[Source]:
        """For what is small and read first."""
        return [*self._holders.values(), *self._origins, *(member(0.0) for member in self._members.values())]

    def bringing(self, moved: Callable[[int], None], left: Callable[[Source, TransferError], None]) -> Cascade:
        """For its chunks. `moved`, `left`: as Fetch has them."""
        return Cascade(self._here, self._members, self._holders, self._origins, moved=moved, left=left)

    def offering(self, coming: Offered) -> AbstractContextManager[None]:
        """It is offered until the block ends."""
        return self._offers.on_its_way(coming)
