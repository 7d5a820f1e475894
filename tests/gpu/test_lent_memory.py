"""What an engine's process lets go of and takes back, on the machine's GPU or else the host's memory, where torch is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from gpumem.client.torch import bytes_at  # noqa: E402
from gpumem.hardware.devices import devices  # noqa: E402
from restore_agent.workload import lent_memory  # noqa: E402
from tests.worlds.device import World  # noqa: E402


def test_asleep_nothing_is_held_and_awake_it_is_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, devices()[0])
    monkeypatch.setenv("GPUMEM_SOCKET", str(world.socket))
    with world.server(pool=256 << 20, arena=0):
        lent_memory.client.cache_clear()
        client = lent_memory.client("engine")
        assert lent_memory.client("engine") is client and lent_memory.graph_pool(client) is lent_memory.graph_pool(client)
        free = world.free()
        scratch = client.scratch(4 << 20)
        memory = bytes_at(scratch.address, scratch.size, client.device)
        memory[:] = 7
        assert world.free() < free
        lent_memory.let_go(client)
        assert world.free() == free
        lent_memory.take_back(client, {})
        assert world.free() < free
        assert memory.data_ptr() == scratch.address and not memory.any(), "its content is gone"
        client.close()
    lent_memory.client.cache_clear()
