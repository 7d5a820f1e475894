"""On which GPUs of this node a suspended process tree wakes.

It may wake on any GPUs of the model that it was suspended on, one for one. Those that hold its weights come first (weights read over NVLink
are a third as fast), then the ones it had, then those with the most free memory: so replicas stay together while they fit and spread when
they do not. One that has several GPUs wakes on such as reach each other in the same way: its ranks chose how they talk by that. The first
choice that leads to a whole one is taken; there are few GPUs, so that trying them in turn takes no time.

In a pod there is nothing to choose: it wakes on the GPUs that the kubelet gave to the pod. The first in CUDA's order takes the place of
what was the first, and so on, so that what its processes know as GPU 0 is GPU 0 to every process that they start.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from restore_agent.errors import AgentError, ErrorKind

HEADROOM = 64 << 20  # bytes of a GPU beside what the checkpoint gave back: a resume that runs out strands its process


class NoGpuMemory(AgentError):
    """No GPU of the node has the memory that a resume needs; nothing was begun. `lacking`: bytes, by UUID of the GPUs that could serve."""

    kind = ErrorKind.EXHAUSTED
    reason = "no-gpu-memory"

    def __init__(self, message: str, lacking: Mapping[str, int]) -> None:
        super().__init__(message)
        self.lacking = lacking


class OtherLinks(AgentError):
    """The GPUs here do not reach each other as those of the suspend did; nothing was begun."""

    reason = "incompatible"


Link = Callable[[str, str], str]  # how two GPUs reach each other; empty: not known


def keep_order(
    needed: Mapping[str, int],
    before: Sequence[str],
    given: Sequence[str],
    free: Mapping[str, int],
    barred: Collection[str] = (),
    link: Link = lambda one, other: "",
    why_there: str = "which this pod was given",
) -> dict[str, str]:
    """Pairs the GPUs of the suspend with those of a pod, in their order.

    Args:
        needed, free, barred, link: as for `choose_gpus`.
        before, given: UUIDs in CUDA's order, equally many.
        why_there: in words, behind the name of one of them.

    Raises:
        NoGpuMemory: one of them has too little.
        OtherLinks.
    """
    pairs = dict(zip(before, given, strict=True))
    for one, other in itertools.combinations(needed, 2):
        if link(one, other) not in ("", link(pairs[one], pairs[other])):
            given_links = _links([pairs[old] for old in needed], link)
            raise OtherLinks(f"its GPUs reach each other by {_links(list(needed), link)}, and those of this pod by {given_links}")
    lacking = {}
    for old, size in needed.items():
        new = pairs[old]
        if (room := 0 if new in barred else free[new]) < size + HEADROOM:
            lacking[new] = size + HEADROOM - room
    if lacking:
        short = ", ".join(f"{size >> 20} MiB more of {new}" for new, size in lacking.items())
        raise NoGpuMemory(f"resuming needs {short}, {why_there}; end what uses it, or give the pool less", lacking)
    return pairs


def choose_gpus(
    needed: Mapping[str, int],
    before: Sequence[str],
    here: Sequence[str],
    free: Mapping[str, int],
    resident: Mapping[str, Collection[str]],
    barred: Collection[str] = (),
    link: Link = lambda one, other: "",
) -> dict[str, str]:
    """Pairs each GPU of the suspend with one of this node.

    Args:
        needed: bytes of each GPU that was used, by its UUID then.
        before, here: UUIDs of all GPUs of the driver, then and now, equally many.
        free: bytes of each GPU here.
        resident: GPUs here that hold the weights of a used one, all that there are of it.
        barred: GPUs here that are for none of the used ones.
        link: of GPUs then, and of GPUs now.

    Raises:
        NoGpuMemory: one of them finds no GPU.
        OtherLinks: each would find one.
    """
    wanted = sorted(needed.items(), key=lambda each: -each[1])
    there = [new for new in here if new not in barred]

    def liked(old: str, size: int) -> list[str]:
        roomy = [new for new in there if free[new] >= size + HEADROOM]
        return sorted(roomy, key=lambda new: (new in resident.get(old, ()), new == old, free[new]), reverse=True)

    choices = [(old, liked(old, size)) for old, size in wanted]
    pairs = next(_whole({}, choices, link), None)
    if pairs is None:
        if next(_whole({}, choices, lambda one, other: ""), None) is not None:
            raise OtherLinks(
                f"its {len(wanted)} GPUs reach each other by {_links(list(needed), link)}, and no {len(wanted)} with room do here"
            )
        raise _short(wanted, choices, there, free)
    # The unused ones are paired as well: each with itself where it is here and left over.
    rest = [new for new in here if new not in pairs.values()]
    for old in before:
        if old not in pairs:
            pairs[old] = old if old in rest else rest[-1]
            rest.remove(pairs[old])
    return pairs


def _whole(pairs: dict[str, str], choices: Sequence[tuple[str, Sequence[str]]], link: Link) -> Iterator[dict[str, str]]:
    """Each way to give every old one a new one, the most liked first."""
    if not choices:
        yield dict(pairs)
        return
    (old, liked), *rest = choices
    for new in liked:
        if new not in pairs.values() and all(link(old, each) in ("", link(new, pairs[each])) for each in pairs):
            yield from _whole({**pairs, old: new}, rest, link)


def _short(
    wanted: Sequence[tuple[str, int]], choices: Sequence[tuple[str, Sequence[str]]], there: Sequence[str], free: Mapping[str, int]
) -> NoGpuMemory:
    """Of the first that finds nothing, where those before it have what they like most."""
    taken: list[str] = []
    for (_, needed), (_, liked) in zip(wanted, choices, strict=True):
        size, candidates = needed + HEADROOM, [new for new in there if new not in taken]
        found = next((new for new in liked if new not in taken), None)
        if found is None:
            break
        taken.append(found)
    most = max((free[new] for new in candidates), default=0)
    return NoGpuMemory(
        f"resuming needs {size >> 20} MiB of a GPU and {most >> 20} MiB are free at most; end a replica, or give the pool less",
        {new: size - free[new] for new in candidates},
    )


def _links(gpus: Sequence[str], link: Link) -> str:
    return " and ".join(sorted({link(*pair) or "ways unknown" for pair in itertools.combinations(gpus, 2)}))
