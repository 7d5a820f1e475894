"""Actions under way, to be asked for those of one model or one node without a walk over all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from scaler.plan.actions import Action


class UnderWay(tuple[Action, ...]):
    """Actions in the order in which they began."""

    _by_model: dict[str, list[Action]] | None
    _by_node: dict[str, list[Action]] | None

    def __new__(cls, actions: Iterable[Action] = ()) -> UnderWay:
        made = super().__new__(cls, actions)
        made._by_model = made._by_node = None
        return made

    @classmethod
    def of(cls, actions: Iterable[Action]) -> UnderWay:
        """These actions; the same object where it is one."""
        return actions if isinstance(actions, cls) else cls(actions)

    def of_model(self, model: str) -> Sequence[Action]:
        if self._by_model is None:
            self._by_model = {}
            for action in self:
                self._by_model.setdefault(action.model, []).append(action)
        return self._by_model.get(model, ())

    def at(self, node: str) -> Sequence[Action]:
        """Those that the agent of this address carries out; of an empty one, those that Kubernetes does."""
        if self._by_node is None:
            self._by_node = {}
            for action in self:
                self._by_node.setdefault(getattr(action, "node", ""), []).append(action)
        return self._by_node.get(node, ())

    def __contains__(self, action: object) -> bool:
        return action in self.at(getattr(action, "node", ""))
