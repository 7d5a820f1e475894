"""The fair queue against a plain model of its rule."""

from collections import defaultdict

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from scaler.books.fairness import FairQueue, Priority

TENANTS = st.sampled_from("abc")
PRIORITIES = st.sampled_from(list(Priority))


class FairQueueMachine(RuleBasedStateMachine):
    """Everything that is served comes from the best class, from the tenant whose turn it is, in the tenant's own order."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: FairQueue[int] = FairQueue()
        self.rings: dict[Priority, list[str]] = defaultdict(list)
        self.lines: dict[tuple[Priority, str], list[int]] = defaultdict(list)
        self.next = 0

    @rule(tenant=TENANTS, priority=PRIORITIES, first=st.booleans())
    def push(self, tenant: str, priority: Priority, first: bool) -> None:
        self.next += 1
        self.queue.push(self.next, tenant, priority, first=first)
        ring, line = self.rings[priority], self.lines[priority, tenant]
        if first and tenant in ring:
            ring.remove(tenant)
        if tenant not in ring:
            ring.insert(0 if first else len(ring), tenant)
        line.insert(0 if first else len(line), self.next)

    @precondition(lambda self: len(self.queue))
    @rule()
    def pop(self) -> None:
        priority = min(priority for priority, ring in self.rings.items() if ring)
        tenant = self.rings[priority].pop(0)
        assert self.queue.pop() == self.lines[priority, tenant].pop(0)
        if self.lines[priority, tenant]:
            self.rings[priority].append(tenant)

    @precondition(lambda self: len(self.queue))
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        (priority, tenant), item = data.draw(st.sampled_from([(key, item) for key, line in self.lines.items() for item in line]))
        self.queue.remove(item, tenant, priority)
        self.lines[priority, tenant].remove(item)
        if not self.lines[priority, tenant]:
            self.rings[priority].remove(tenant)

    @invariant()
    def same_size(self) -> None:
        assert len(self.queue) == sum(map(len, self.lines.values()))


TestFairQueue = FairQueueMachine.TestCase


def test_what_is_not_there() -> None:
    queue: FairQueue[int] = FairQueue()
    with pytest.raises(IndexError, match="the queue is empty"):
        queue.pop()
    with pytest.raises(KeyError):
        queue.remove(1, "a", Priority.LOW)


def test_a_crowd_delays_another_tenant_by_one_request() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(1000):
        queue.push(f"crowd {i}", "crowd", Priority.NORMAL)
    queue.push("single", "single", Priority.NORMAL)
    assert [queue.pop(), queue.pop()] == ["crowd 0", "single"]
