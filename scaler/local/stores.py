"""The snapshots of one machine's models, and the store that `zerowake.yaml` names for them.

For each model, from the start on: a snapshot on this machine that fits is used; else the store's is fetched, if it was taken of the same
engine (command, variables, folder), fits this machine and is signed by a key that counts here; else one is taken, and pushed. Replicas wait
for the look and the fetch, and for nothing else: while a snapshot is taken, requests are answered by an engine that is started cold, and a
store that is away is tried again, less and less often, as long as this runs. One that has left this machine's disk, where there was no room
for another, is fetched again by the next start.

What is in the store and not trusted here is left alone: this machine may lack a key that all others have. Rejected: to overwrite it, which
would take the snapshot away from those.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Mapping

from scaler.books.snapshot_name import SnapshotName
from scaler.fleet.agent import Agent, AgentError, HasNone
from scaler.fleet.messages import Kept
from scaler.fleet.nodes import Nodes
from scaler.local.config import ModelSection
from scaler.local.look import Look
from scaler.local.replica_maker import engine_of
from scaler.plan.rungs import Rung
from zerowake_shared.background import kept
from zerowake_shared.backoff import Backoff
from zerowake_shared.clock import SYSTEM_CLOCK, Clock
from zerowake_shared.engine_identity import engine_identity

log = logging.getLogger(__name__)

_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 30.0, 3600.0  # of taking one: each starts the engine
_FIRST_PUSH_SECONDS, _LAST_PUSH_SECONDS = 5.0, 600.0
_LOOK_SECONDS = 15.0  # that requests wait for a store that does not answer


class Stores:
    """Of the models that have a snapshot. `looks`: by model, what their starts wait for."""

    def __init__(
        self,
        url: str,
        sections: Mapping[str, ModelSection],
        nodes: Nodes,
        address: str,
        looks: Mapping[str, Look],
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """`url`: the store's; `address`: this machine's agent's, which `nodes` follows."""
        self._url = url
        self._sections = sections
        self._nodes = nodes
        self._address = address
        self._looks = looks
        self._clock = clock
        self._one_at_a_time = asyncio.Lock()  # taking them: each starts an engine beside those that serve

    async def keep(self) -> None:
        """Until every model has its snapshot here and in the store."""
        async with asyncio.TaskGroup() as group:
            for model in self._looks:
                group.create_task(kept(functools.partial(self._keep, model), f"snapshot of {model}", log))

    async def _keep(self, model: str) -> None:
        backoff = Backoff(_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS)
        try:
            while not await self._is_here(model) and not await self._is_fetched(model):
                self._looks[model].done.set()
                if self._sections[model].command and await self._is_taken(model):
                    break
                await asyncio.sleep(backoff.next())
        finally:
            self._looks[model].done.set()
        await self._push(model)
        self._looks[model].bring = functools.partial(self._bring, model)
        log.info("%s: its snapshot is here and in %s", model, self._url)

    async def _bring(self, model: str) -> None:
        """Here again, where the agent has let it go for others that came: the store has it. What fails is logged."""
        agent = await self._agent()
        if self._name(model) not in agent.residencies:
            await self._is_fetched(model)

    async def _is_here(self, model: str) -> bool:
        try:
            return not await self._why_not(model, "")
        except HasNone:
            return False
        except AgentError as error:
            log.warning("the snapshot of %s on this machine cannot be used: %s", model, error)
            return False

    async def _is_fetched(self, model: str) -> bool:
        agent, name = await self._agent(), self._name(model)
        try:
            async with asyncio.timeout(_LOOK_SECONDS):
                there = await agent.find(name, self._url)
            found = there.stored
            differs = self._differs(model, there)
            if why := differs or there.unfit:
                log.warning("%s has a snapshot of %s that is not for this machine: %s", self._url, model, why)
                if not differs:
                    await self._bring_second_best(agent, name, found.digest)
                return False
            size, began = found.image_bytes + found.weights_bytes, self._clock.now()
            log.info("%s: fetching %.1f MB from %s; requests wait for it", model, size / 1e6, self._url)
            complained = functools.partial(log.warning, "%s: %s", model)
            await agent.stage(name, found.digest, Rung.DISK, stores=[self._url], complained=complained, urgent=True)
        except HasNone:
            log.info("%s has no snapshot of %s yet", self._url, model)
            return False
        except TimeoutError:
            log.warning("%s does not answer: no snapshot of %s is fetched", self._url, model)
            return False
        except AgentError as error:
            log.warning("no snapshot of %s is fetched: %s", model, error)
            return False
        self._looks[model].bring = functools.partial(self._bring, model)
        seconds = self._clock.now() - began
        log.info("%s: %.1f MB have come from %s in %.1f s", model, size / 1e6, self._url, seconds)
        return True

    async def _bring_second_best(self, agent: Agent, name: SnapshotName, digest: str) -> None:
        """Of a snapshot of the same command that does not fit: its engine is started cold, and finds what others have compiled. The agent
        says what came."""
        with contextlib.suppress(AgentError):  # it refuses the snapshot, in the words that were logged
            await agent.stage(name, digest, Rung.DISK, stores=[self._url], urgent=True)

    async def _is_taken(self, model: str) -> bool:
        section, agent = self._sections[model], await self._agent()
        async with self._one_at_a_time:
            log.info("%s: an engine is started to take a snapshot of it; requests are answered by others meanwhile", model)
            began = self._clock.now()
            try:
                await agent.take(model, self._name(model), engine_of(section), section.canary, section.names, _identity(section))
            except AgentError as error:
                log.warning("no snapshot of %s could be taken, so it is started cold: %s", model, error)
                return False
            log.info("%s: its snapshot was taken in %.1f s", model, self._clock.now() - began)
            return True

    async def _push(self, model: str) -> None:
        backoff = Backoff(_FIRST_PUSH_SECONDS, _LAST_PUSH_SECONDS)
        while True:
            agent = await self._agent()
            try:
                if await self._is_in_store(model):
                    return
                seconds = await agent.push(self._name(model), "", self._url)
            except AgentError as error:
                pause = backoff.next()
                log.warning("the snapshot of %s is not in %s: %s; it is tried again in %.0f s", model, self._url, error, pause)
                await asyncio.sleep(pause)
            else:
                log.info("%s: its snapshot was put into %s in %.1f s", model, self._url, seconds)
                return

    async def _is_in_store(self, model: str) -> bool:
        """Or another one that fits: of two machines that have both taken one, the first one's stays. Raises AgentError."""
        try:
            return not await self._why_not(model, self._url)
        except HasNone:
            return False

    async def _why_not(self, model: str, store: str) -> str:
        """Why what the store (empty: this machine) has is not this model's here; empty: it is. Raises AgentError."""
        found = await (await self._agent()).find(self._name(model), store)
        return self._differs(model, found) or found.unfit

    def _differs(self, model: str, found: Kept) -> str:
        """Why it is another engine's; empty: it is not."""
        section = self._sections[model]
        if section.command and found.template != _identity(section):
            return "it was taken of another command, other variables (env) or in another folder (directory)"
        return ""

    async def _agent(self) -> Agent:
        """Once it is heard. An agent that is started again has the same address."""
        agent = self._nodes.agent(self._address)
        assert agent is not None
        await agent.synced.wait()
        return agent

    def _name(self, model: str) -> SnapshotName:
        name = self._sections[model].snapshot_name
        assert name is not None
        return name


def _identity(section: ModelSection) -> str:
    return engine_identity(section.command, section.env, str(section.directory.resolve()))
