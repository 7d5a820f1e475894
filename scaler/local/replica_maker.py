"""Replicas of this machine, made and ended by its restore agent, where Kubernetes would make pods.

The replica that ends gets no new requests and first finishes what it has, however long that takes, unless the model has a limit. What a
start took goes into the activation that waits for it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType

from scaler.books.activation import Activations
from scaler.fleet.agent import Agent, AgentError, AgentUnreachable, Engine, HasNone
from scaler.fleet.nodes import Nodes
from scaler.gateway.dispatcher import Dispatcher
from scaler.local.config import ModelSection
from scaler.local.look import Look
from scaler.plan.actions import End, Start
from zerowake_shared.phases import Phase

_AGAIN_SECONDS = 1.0  # before one that could not be ended is asked to end once more

log = logging.getLogger(__name__)


class LocalReplicas:
    """Implements `ReplicaMaker` for the models of one file."""

    def __init__(
        self,
        sections: Mapping[str, ModelSection],
        nodes: Nodes,
        dispatcher: Dispatcher,
        activations: Activations,
        looks: Mapping[str, Look] = MappingProxyType({}),
    ) -> None:
        """`looks`: by model, what is waited for before one is started: its snapshot may be on its way here."""
        self._sections = sections
        self._nodes = nodes
        self._dispatcher = dispatcher
        self._activations = activations
        self._looks = looks

    async def start(self, action: Start) -> Callable[[], None]:
        """Restores, or starts, a replica; returns when it is ready, with what makes it known. Raises AgentError."""
        if look := self._looks.get(action.model):
            await look.is_over()
        agent = self._nodes.agent(action.node)
        if agent is None:
            raise AgentUnreachable("the restore agent is not connected any more")
        section = self._sections[action.model]
        activation = self._activations.current(action.model)
        if activation:
            activation.mark(Phase.SCHEDULED)
        cold = engine_of(section) if section.command else None
        answer = await agent.restore(action.model, section.snapshot_name, cold, activation)
        if answer.fallback_reason:
            log.warning("%s was started cold (%s): %s", action.model, answer.fallback_reason, answer.fallback_detail)
        return functools.partial(self._nodes.learn, action.node, answer.replica)  # the stream will say so too, maybe later

    async def end(self, action: End) -> None:
        """Returns when the replica has finished what it had and has ended. Cancelled before that, it takes requests again."""
        draining = asyncio.create_task(self._dispatcher.drain(action.replica), name=f"draining {action.replica}")
        try:
            limit = self._sections[action.model].max_drain_seconds
            await asyncio.wait([draining], timeout=limit)
            if not draining.done():
                left = self._dispatcher.in_flight(action.replica)
                log.warning("replica %s is ended with %d requests: max_drain_seconds (%g) is over", action.replica, left, limit)
            await self._release(action)
        finally:
            draining.cancel()
            await asyncio.wait([draining])

    async def _release(self, action: End) -> None:
        agent = self._nodes.agent(action.node)
        if agent is None:
            return
        try:
            if action.parked_seconds is not None and await _parked(agent, action, action.parked_seconds):
                pass
            elif action.standby_seconds is not None:
                await agent.stand_by(action.replica, action.standby_seconds)
            else:
                await agent.release(action.replica)
        except HasNone:
            return  # it has ended by itself
        except AgentError as error:
            if not isinstance(error, AgentUnreachable):  # else it has ended with its agent, or that is back soon
                log.warning("replica %s could not be ended: %s", action.replica, error)
            await asyncio.sleep(_AGAIN_SECONDS)  # where it is still wanted, it is asked for anew as soon as this returns
            return
        self._nodes.ended(action.node, action.replica)


async def _parked(agent: Agent, action: End, seconds: float) -> bool:
    """Whether it is parked. One that cannot be goes on, so that it can be kept as a standby, or end. Raises HasNone, AgentUnreachable."""
    try:
        await agent.park(action.replica, seconds, action.standby_seconds)
    except (HasNone, AgentUnreachable):
        raise
    except AgentError as error:
        log.warning("replica %s of %s could not be parked: %s", action.replica, action.model, error)
        return False
    return True


def engine_of(section: ModelSection) -> Engine:
    """How it is started where nothing is restored."""
    return Engine(
        command=section.command,
        env=section.engine_env,
        directory=str(section.directory),
        shared=tuple(map(str, section.shared)),
        port=section.port or 0,
        health_path=section.health,
        ready_seconds=section.ready_seconds,
    )
