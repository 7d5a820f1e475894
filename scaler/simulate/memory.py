"""The memory of all nodes, as bins: each GPU is one, each node's host memory is one. In a bin stand the weights of models that are idle.

What a running model needs of a GPU is taken from its bin, and idle weights leave at once when it has to be; they go to another bin of the
same node where they are worth more than what stands there, else they are dropped. A model's idle bytes stand in one place: a second copy
could serve no second request, since there is one replica. Which of two are worth more is the policy's to say (policies.py), by a number for
each model.
"""

from __future__ import annotations

from collections.abc import Sequence

NOWHERE = -1


class Memory:
    """sizes: bytes of each model's weights in a GPU's pool; host_sizes: the same in host memory. gpu_bytes, host_bytes: of one GPU, of one
    node's images. pool: whether idle weights stay on GPUs. by_bytes: whether a policy's numbers are worth a byte, to be added up; else they
    are an order.
    """

    def __init__(
        self,
        nodes: int,
        gpus: int,
        gpu_bytes: float,
        host_bytes: float,
        sizes: Sequence[float],
        host_sizes: Sequence[float],
        *,
        pool: bool,
        by_bytes: bool,
    ) -> None:
        self.nodes, self.gpus = nodes, gpus
        self._sizes, self._host_sizes = sizes, host_sizes
        self._by_bytes = by_bytes
        self._first_host = nodes * gpus
        self.free: list[float] = [gpu_bytes] * self._first_host + [host_bytes] * nodes  # not used by anybody
        self.open: list[float] = list(self.free)  # not used by running models
        self.members: list[dict[int, None]] = [{} for _ in self.free]
        self.where = [NOWHERE] * len(sizes)
        self._bins = [[*(self.gpus_of(node) if pool else ()), self._first_host + node] for node in range(nodes)]
        self._worst_first: list[tuple[Sequence[float], list[tuple[float, int]]] | None] = [None] * len(self.free)

    def node_of(self, bin_: int) -> int:
        return bin_ // self.gpus if bin_ < self._first_host else bin_ - self._first_host

    def on_gpu(self, model: int) -> bool:
        return NOWHERE < self.where[model] < self._first_host

    def gpus_of(self, node: int) -> range:
        return range(node * self.gpus, (node + 1) * self.gpus)

    def bins_of(self, node: int) -> Sequence[int]:
        """Those in which idle weights may stand."""
        return self._bins[node]

    def size_in(self, model: int, bin_: int) -> float:
        return self._sizes[model] if bin_ < self._first_host else self._host_sizes[model]

    def put(self, model: int, bin_: int) -> None:
        self.where[model] = bin_
        self.members[bin_][model] = None
        self._worst_first[bin_] = None
        self.free[bin_] -= self.size_in(model, bin_)

    def drop(self, model: int) -> None:
        bin_ = self.where[model]
        self.where[model] = NOWHERE
        del self.members[bin_][model]
        self._worst_first[bin_] = None
        self.free[bin_] += self.size_in(model, bin_)

    def room_for(self, needed: float, node: int, preferred: int = NOWHERE) -> int:
        """The GPU of the node on which a model is run: the preferred one, else where most is free. NOWHERE: on none."""
        if preferred != NOWHERE and self.open[preferred] >= needed:
            return preferred
        best, has = NOWHERE, -1.0
        for gpu in self.gpus_of(node):
            if self.open[gpu] >= needed and self.free[gpu] > has:
                best, has = gpu, self.free[gpu]
        return best

    def take(self, needed: float, gpu: int, worth: Sequence[float]) -> list[int]:
        """Gives so many bytes of the GPU to a running model. Returns the models that had to leave, from the worst on."""
        left = []
        if self.free[gpu] < needed:
            for model in sorted(self.members[gpu], key=worth.__getitem__):
                self.drop(model)
                left.append(model)
                if self.free[gpu] >= needed:
                    break
        self.free[gpu] -= needed
        self.open[gpu] -= needed
        return left

    def give_back(self, needed: float, gpu: int) -> None:
        self.free[gpu] += needed
        self.open[gpu] += needed

    def least_in(self, model: int, node: int, worth: Sequence[float]) -> float:
        """What the least of the node's idle models is worth; below all numbers where there is room without it."""
        least = float("inf")
        for bin_ in self.bins_of(node):
            if self.free[bin_] >= self.size_in(model, bin_):
                return -float("inf")
            least = min(least, min(map(worth.__getitem__, self.members[bin_]), default=least))
        return least

    def place(self, model: int, node: int, worth: Sequence[float], margin: float = 1.0) -> tuple[int, list[int]]:
        """The bin of the node in which the model should stand, and who has to leave for it; (NOWHERE, []): it is not worth that.

        Where there is room, in the bin that it fills best; else where least is lost, which has to be less than what the model is worth,
        divided by the margin.
        """
        best, least = NOWHERE, float("inf")
        for bin_ in self.bins_of(node):
            over = self.free[bin_] - self.size_in(model, bin_)
            if 0 <= over < least:
                best, least = bin_, over
        if best != NOWHERE:
            return best, []
        out: list[int] = []
        lowest, bound = float("inf"), worth[model] / margin
        for bin_ in self.bins_of(node):
            size = self.size_in(model, bin_)
            if self.open[bin_] < size:
                continue
            lost, leaving, free = 0.0, [], self.free[bin_]
            for number, other in self._from_worst(bin_, worth):
                if number >= bound:
                    break
                leaving.append(other)
                lost = lost + worth[other] * self.size_in(other, bin_) if self._by_bytes else worth[other]
                free += self.size_in(other, bin_)
                if free >= size:
                    if lost < lowest and (not self._by_bytes or lost < bound * size):
                        best, out, lowest = bin_, leaving, lost
                    break
        return best, out

    def _from_worst(self, bin_: int, worth: Sequence[float]) -> list[tuple[float, int]]:
        """What each of the bin's idle models is worth, rising. Kept until the bin changes, or the list: a list is never changed itself,
        while an array may be.
        """
        known = self._worst_first[bin_]
        if known is not None and known[0] is worth:
            return known[1]
        found = sorted((worth[other], other) for other in self.members[bin_])
        if isinstance(worth, list):
            self._worst_first[bin_] = (worth, found)
        return found
