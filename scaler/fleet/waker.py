"""Has replicas that sleep in their pods woken, as the gateway wants them: by the agents that say that they sleep.

A wake that fails is told to those who wait, and the gateway tries the next replica. One that sleeps on (its GPU has no room, its agent does
not answer) has its turn again, less and less often, for as long as it sleeps; of one that is gone its agent's stream says so, and its
container begins anew. Several gateways may have the same one woken: for its agent that is one wake.
"""

from __future__ import annotations

import asyncio
import functools
import logging

from scaler.books.ledger import Ledger
from scaler.fleet.agent import AgentError
from scaler.fleet.nodes import Nodes
from scaler.gateway.dispatcher import Backend, Dispatcher
from zerowake_shared.background import ended, told
from zerowake_shared.backoff import Backoff

log = logging.getLogger(__name__)

_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 0.2, 10.0


class Waker:
    """Hooks into the dispatcher; `close` gives up what is under way."""

    def __init__(self, ledger: Ledger, nodes: Nodes, dispatcher: Dispatcher) -> None:
        self._ledger = ledger
        self._nodes = nodes
        self._dispatcher = dispatcher
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures: dict[str, Backoff] = {}  # by replica, since its last wake failed
        dispatcher.woken_by(self._begin)

    async def close(self) -> None:
        await ended(self._tasks)

    def _begin(self, backend: Backend) -> None:
        task = asyncio.get_running_loop().create_task(self._wake(backend), name=f"waking {backend.id}")
        told(task, log)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _wake(self, backend: Backend) -> None:
        activation = self._ledger.activations.current(backend.model)
        agent = self._nodes.agent_of(backend.id)
        try:
            if agent is None:
                raise AgentError("no agent speaks of it now")
            replica = await agent.wake(backend.id, activation)
        except AgentError as error:
            why = f"replica {backend.id} sleeps and could not be woken: {error}"
            log.warning("%s", why)
            self._ledger.report_failure(backend.model, why)
            self._dispatcher.wake_failed(backend.id)
        else:
            self._failures.pop(backend.id, None)
            self._nodes.learn(agent.address, replica)
            return
        self._failures = {each: backoff for each, backoff in self._failures.items() if self._dispatcher.has(each)}
        backoff = self._failures.setdefault(backend.id, Backoff(_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS))
        asyncio.get_running_loop().call_later(backoff.next(), functools.partial(self._dispatcher.wake_again, backend.id))
