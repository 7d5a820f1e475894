"""A model's replicas on this machine, as its autoscaler sees them: what a Deployment is to KEDA."""

from __future__ import annotations

from scaler.fleet.planner import Planner


class Deployment:
    """One model's wish for replicas."""

    def __init__(self, model: str, planner: Planner, replicas: int) -> None:
        self._model = model
        self._planner = planner
        self._wish = replicas

    def replicas(self) -> int:
        """The wish: as with a Deployment, what lives follows it."""
        return self._wish

    async def scale(self, replicas: int) -> None:
        self._wish = replicas
        self._planner.want(self._model, replicas)
