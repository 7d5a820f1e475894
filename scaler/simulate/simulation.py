"""One policy over one trace: scale-ups, where they find their bytes, and what moves, event by event under virtual time.

    begin   a model comes to have demand: a node is chosen, its bytes are read from where they stand, it runs from then on
    quiet   its last request has ended (the forecast hears of it)
    end     KEDA's cooldown is over: its bytes stay where the policy says
    look    every few seconds: what the policy wishes to be fetched ahead is begun where the disk has nothing to do and room is found

Of the product it runs: the estimate of seconds (scaler/plan/estimate.py), what a byte is worth (scaler/plan/worth.py) and the forecast. It
models: the ledger and KEDA (episodes.py), the agents' ladders and memory (memory.py), and the nodes' work: a disk reads one thing after the
other, requests before what is fetched ahead, which is put off by them; copies between the GPUs of a node, and from a GPU to host memory,
take no time of anybody's. A replica runs on one GPU. One that finds no room on any GPU waits until one has. Rejected: the asyncio programs
themselves under a virtual loop, as tests do: a scale-up takes them milliseconds, and here there are a million.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from scaler.simulate.episodes import Episodes
from scaler.simulate.memory import NOWHERE, Memory
from scaler.simulate.policies import Policy
from scaler.simulate.rungs import Rungs

_NODES_LOOKED_AT = 12
_LOOK_SECONDS, _QUIET_LOOK_SECONDS = 10.0, 60.0  # the latter where nothing has happened since
_QUIET, _END, _LOOK = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Cluster:
    """gpu_bytes: of one GPU. host_bytes: of one node, for the weights of models that do not run. running_bytes: what a running model takes
    of a GPU beside its weights. disk_copies: how many nodes have a model on disk; None: all.
    """

    nodes: int
    gpus: int
    gpu_bytes: float
    host_bytes: float
    running_bytes: float
    free_gpus: bool
    disk_copies: int | None = None


@dataclass
class Result:
    """Of each episode, in order: seconds to the first byte beyond the engine's own, and the rung (an index of rungs.NAMES). Bytes by
    where they went; wasted: fetched ahead, and never asked for.
    """

    seconds: list[float] = field(default_factory=list)
    rung: list[int] = field(default_factory=list)
    moved: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("loaded", "ahead", "copied", "wasted"), 0.0))
    most_in_gpus: float = 0.0
    idle_byte_seconds: float = 0.0


class Simulation:
    """sizes: bytes of each model's weights. `run` may be called once."""

    def __init__(self, cluster: Cluster, rungs: Rungs, sizes: list[float], found: Episodes, policy: Policy, seed: int) -> None:
        self._cluster, self._rungs, self._sizes, self._policy = cluster, rungs, sizes, policy
        self._episodes = found
        self._random = Random(seed)
        self._memory = Memory(
            cluster.nodes,
            cluster.gpus,
            cluster.gpu_bytes,
            cluster.host_bytes,
            [size + rungs.parked_bytes for size in sizes],
            sizes,
            pool=cluster.free_gpus and policy.on_gpus,
            by_bytes=policy.by_bytes,
        )
        self._busy_until = [0.0] * cluster.nodes  # each disk, with what is waited for
        self._ahead: list[tuple[int, float]] = [(NOWHERE, 0.0)] * cluster.nodes  # on its way ahead of need, and when it is there
        self._coming: dict[int, tuple[int, float]] = {}  # the same by model: its node
        self._unused: set[int] = set()  # fetched ahead, not asked for since
        self._running: dict[int, int] = {}  # model: its GPU
        self._waiting: deque[tuple[int, float]] = deque()
        self._events: list[tuple[float, int, int, int]] = []
        self._looked, self._changed = -float("inf"), True
        self.result = Result()

    def run(self, told: Callable[[int, int], None] = lambda done, of: None) -> Result:
        """`told` hears of how many scale-ups have begun, of how many, a thousand at a time."""
        found = self._episodes
        count = len(found.begin)
        self.result.seconds, self.result.rung = [0.0] * count, [0] * count
        begins, models = found.begin.tolist(), found.model.tolist()
        quiets, ends = found.quiet.tolist(), found.end.tolist()
        self._following = found.next.tolist()
        events = self._events
        if type(self._policy).wishes is not Policy.wishes:
            heapq.heappush(events, (0.0, _LOOK, 0, 0))
        for index in range(count):
            if index % 1000 == 0:
                told(index, count)
            at = begins[index]
            while events and events[0][0] <= at:
                self._happen(*heapq.heappop(events))
            model = models[index]
            self._policy.began(model, at)
            if not self._begin(index, model, at, at):
                self._waiting.append((index, at))
            heapq.heappush(events, (quiets[index], _QUIET, model, index))
            heapq.heappush(events, (ends[index], _END, model, index))
        while self._waiting and events:
            self._happen(*heapq.heappop(events))
        self.result.moved["wasted"] += sum(self._sizes[model] for model in self._unused)
        return self.result

    def _happen(self, at: float, what: int, model: int, index: int) -> None:
        self._changed |= what == _END
        if what == _END:
            self._end(index, model, at)
        elif what == _QUIET:
            self._policy.quiet(model, at)
        else:
            for ahead, there in self._ahead:
                if ahead != NOWHERE and there <= at:
                    self._arrive(ahead, at)
            if self._changed or at - self._looked >= _QUIET_LOOK_SECONDS:
                self._looked, self._changed = at, False
                self._look(at)
            heapq.heappush(self._events, (at + _LOOK_SECONDS, _LOOK, 0, 0))

    # A scale-up.

    def _begin(self, index: int, model: int, asked: float, at: float) -> bool:
        memory, policy = self._memory, self._policy
        if model in self._coming and self._coming[model][1] <= at:
            self._arrive(model, at)
        bin_ = memory.where[model]
        if bin_ != NOWHERE and not policy.is_kept(model, at):
            self._drop(model)
            bin_ = NOWHERE
        needed = self._sizes[model] + self._cluster.running_bytes
        stands = memory.node_of(bin_) if bin_ != NOWHERE else NOWHERE
        if bin_ == NOWHERE and model in self._coming:
            stands = self._coming[model][0]
        node, gpu = self._chosen(model, stands, needed, at)
        if gpu == NOWHERE:
            return False
        rung, took = self._brought(model, node, stands, at)
        self.result.rung[index] = rung
        self.result.seconds[index] = at - asked + took
        self._unused.discard(model)
        if bin_ != NOWHERE and not (policy.keeps_running and stands == node):
            memory.drop(model)
        left = memory.take(needed, gpu, policy.worth_of(at)) if memory.free[gpu] < needed else memory.take(needed, gpu, ())
        self._running[model] = gpu
        for other in left:
            self._keep(other, node, at)
        if policy.keeps_running and memory.where[model] == NOWHERE:
            self._keep(model, node, at)
        return True

    def _brought(self, model: int, node: int, stands: int, at: float) -> tuple[int, float]:
        """From which rung, and in how many seconds, a model is served on the node. stands: the node where its bytes are, or will be."""
        memory, rungs, size = self._memory, self._rungs, self._sizes[model]
        if stands == node and memory.where[model] == NOWHERE:  # fetched ahead, and not there yet
            self._ahead[node] = (NOWHERE, 0.0)
            return rungs.disk, rungs.seconds_after(self._coming.pop(model)[1] - at, size)
        if stands == node:
            rung = rungs.gpu if memory.on_gpu(model) else rungs.host
            return rung, rungs.seconds(rung, size)
        if memory.where[model] != NOWHERE:
            self.result.moved["copied"] += size
            return rungs.peer, rungs.seconds(rungs.peer, size)
        rung = rungs.disk if self._is_on_disk(model, node) else rungs.remote
        wait, reading = self._queue(node, at), rungs.reading(rung, size)
        self._busy_until[node] = max(at, self._busy_until[node]) + reading
        self._put_off(node, reading)
        self.result.moved["loaded"] += size
        return rung, wait + rungs.seconds(rung, size)

    def _chosen(self, model: int, stands: int, needed: float, at: float) -> tuple[int, int]:
        """Node and GPU: where the bytes are if it has room, else the node whose disk is free first, and of these the one where they can
        stay at the least loss.
        """
        memory = self._memory
        if stands != NOWHERE and self._policy.looks_where_bytes_are:
            on = memory.where[model]
            gpu = memory.room_for(needed, stands, on if on != NOWHERE and memory.on_gpu(model) else NOWHERE)
            if gpu != NOWHERE:
                return stands, gpu
        best, key, worth = (NOWHERE, NOWHERE), (float("inf"), 0.0, 0.0), self._policy.worth_of(at)
        for nodes in self._candidates(model):
            for node in nodes:
                gpu = memory.room_for(needed, node)
                if gpu == NOWHERE:
                    continue
                if not self._policy.looks_where_bytes_are:
                    return node, gpu
                if (found := (self._queue(node, at), memory.least_in(model, node, worth), -memory.free[gpu])) < key:
                    best, key = (node, gpu), found
            if best[0] != NOWHERE:
                break
        return best

    def _candidates(self, model: int) -> Iterator[list[int]]:
        nodes = self._cluster.nodes
        if self._cluster.disk_copies and self._policy.looks_where_bytes_are:
            yield self._holders(model)
        if nodes > _NODES_LOOKED_AT:
            yield self._random.sample(range(nodes), _NODES_LOOKED_AT)
            yield list(range(nodes))
        else:
            every = list(range(nodes))
            if not self._policy.looks_where_bytes_are:
                self._random.shuffle(every)
            yield every

    def _holders(self, model: int) -> list[int]:
        copies, nodes = self._cluster.disk_copies or 0, self._cluster.nodes
        return [(model * 7919 + number * (nodes // max(1, copies) or 1)) % nodes for number in range(copies)]

    def _is_on_disk(self, model: int, node: int) -> bool:
        return self._cluster.disk_copies is None or node in self._holders(model)

    def _queue(self, node: int, at: float) -> float:
        return max(0.0, self._busy_until[node] - at)

    def _put_off(self, node: int, seconds: float) -> None:
        """What is fetched ahead there waits for what is asked for."""
        model, there = self._ahead[node]
        if model != NOWHERE:
            self._ahead[node] = (model, there + seconds)
            self._coming[model] = (node, there + seconds)

    # Its end.

    def _end(self, index: int, model: int, at: float) -> None:
        gpu = self._running.pop(model, NOWHERE)
        if gpu == NOWHERE:  # it has waited for a GPU longer than it was needed
            self._waiting = deque(each for each in self._waiting if each[0] != index)
            self.result.seconds[index] = at - float(self._episodes.begin[index])
            self.result.rung[index] = self._rungs.disk
            return
        memory, policy = self._memory, self._policy
        memory.give_back(self._sizes[model] + self._cluster.running_bytes, gpu)
        policy.ended(model, at, self._following[index])
        if policy.keeps and memory.where[model] == NOWHERE:
            if self._cluster.free_gpus and policy.on_gpus:
                memory.put(model, gpu)
            else:
                self._keep(model, memory.node_of(gpu), at)
        while self._waiting:
            first, asked = self._waiting[0]
            if not self._begin(first, int(self._episodes.model[first]), asked, at):
                break
            self._waiting.popleft()

    def _keep(self, model: int, node: int, at: float, margin: float = 1.0) -> bool:
        """Where it is worth it. What leaves for it is dropped."""
        if not self._policy.keeps:
            return False
        bin_, out = self._memory.place(model, node, self._policy.worth_of(at), margin)
        if bin_ == NOWHERE:
            self._gone(model)
            return False
        for other in out:
            self._drop(other)
        self._memory.put(model, bin_)
        self.result.moved["copied"] += self._sizes[model]
        return True

    def _drop(self, model: int) -> None:
        self._memory.drop(model)
        self._gone(model)

    def _gone(self, model: int) -> None:
        self._policy.left(model)
        if model in self._unused:
            self._unused.remove(model)
            self.result.moved["wasted"] += self._sizes[model]

    # Ahead of need.

    def _look(self, at: float) -> None:
        free = [node for node, (model, _) in enumerate(self._ahead) if model == NOWHERE and self._busy_until[node] <= at]
        if not free:
            return
        idle = free if len(free) <= _NODES_LOOKED_AT else sorted(self._random.sample(free, _NODES_LOOKED_AT))
        memory, worth, margin = self._memory, self._policy.worth_of(at), self._policy.margin
        bins = [bin_ for node in idle for bin_ in memory.bins_of(node)]
        room = max(memory.free[bin_] for bin_ in bins)
        lowest = min((worth[other] for bin_ in bins for other in memory.members[bin_]), default=float("inf"))
        tried = 0
        for model in self._policy.wishes(at):
            if memory.where[model] != NOWHERE or model in self._running or model in self._coming:
                continue
            if self._sizes[model] <= room or worth[model] > lowest * margin:
                node = self._room_ahead(model, idle, worth)
                if node != NOWHERE:
                    there = at + self._rungs.reading(self._rungs.disk, self._sizes[model])
                    self._ahead[node] = (model, there)
                    self._coming[model] = (node, there)
                    self._unused.add(model)
                    self.result.moved["ahead"] += self._sizes[model]
                    idle.remove(node)
            tried += 1
            if not idle or tried >= self._policy.looks_at:
                return

    def _room_ahead(self, model: int, idle: list[int], worth: Sequence[float]) -> int:
        memory = self._memory
        best, least = NOWHERE, float("inf")
        for node in idle:
            bin_, out = memory.place(model, node, worth, self._policy.margin)
            if bin_ != NOWHERE and (lost := sum(worth[other] for other in out)) < least:
                best, least = node, lost
                if not out:
                    break
        return best

    def _arrive(self, model: int, at: float) -> None:
        self._changed = True
        node, _ = self._coming.pop(model)
        self._ahead[node] = (NOWHERE, 0.0)
        if self._keep(model, node, at):
            self.result.moved["copied"] -= self._sizes[model]
