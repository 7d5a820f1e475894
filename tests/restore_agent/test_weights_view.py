"""Where the node's weights stand, as a real gpumem says: each region's rung, what has changed since the last look, what is free."""

from pathlib import Path

import pytest

from gpumem.client.control import Control
from restore_agent.drivers.weights_view import WeightsRung, WeightsView
from restore_agent.snapshots.manifest import WeightsRecord
from tests.worlds.gpumem_server import MIB, Weights, make_weights, served, stopped_fill


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return make_weights(tmp_path / "weights.bin", 8 * MIB)


def record(region: bytes) -> WeightsRecord:
    return WeightsRecord(region=region.hex(), size=8 * MIB, parts=())


async def test_it_climbs_and_falls_and_each_change_is_told_once(tmp_path: Path, weights: Weights) -> None:
    with served(tmp_path / "server", reserve=64 * MIB, arena=32 * MIB) as server:
        view, region = WeightsView(server.socket), weights.id.hex()
        assert await view.look() == set()
        assert view.rung([record(weights.id)]) == WeightsRung.DISK
        assert view.free_bytes("host") == view.held_bytes("host") == 64 * MIB
        async with Control.connected(server.socket) as control:
            await control.fill(weights.layout, weights.sources, "", pinned=True)
            assert await view.look() == {region}
            assert view.rung([record(weights.id)]) == WeightsRung.MEMORY
            await control.fill(weights.layout, [], "host")
            assert await view.look() == {region}
            assert view.rung([record(weights.id)]) == WeightsRung.GPU
            assert await view.look() == set()
            assert view.free_bytes("host") < 64 * MIB
            assert view.held_bytes("host") == 64 * MIB, "lent or not"
    assert await view.look() == {region}, "its server has ended"
    assert view.largest_room is None and view.places({}) is None
    assert view.rung([record(weights.id)]) == WeightsRung.DISK


async def test_the_lowest_of_several_counts_and_none_is_absent(tmp_path: Path, weights: Weights) -> None:
    view = WeightsView(tmp_path / "no.sock")
    assert await view.look() == set()
    assert view.rung([]) == WeightsRung.ABSENT
    assert view.held_bytes("host") == 0, "there is no gpumem"
    assert (view.status, view.is_silent) == (None, False)
    (tmp_path / "no.sock").touch()
    await view.look()
    assert view.held_bytes("host") is None, "there is one, and it says nothing"
    assert (view.status, view.is_silent) == (None, True)
    with served(tmp_path / "server", reserve=64 * MIB) as server:
        view = WeightsView(server.socket)
        async with Control.connected(server.socket) as control:
            await control.fill(weights.layout, weights.sources, "host")
        await view.look()
        assert view.rung([record(weights.id), record(b"o" * 32)]) == WeightsRung.DISK


async def test_a_region_of_another_namespace_is_not_there(short_folder: Path, weights: Weights) -> None:
    with served(short_folder / "server", reserve=64 * MIB) as server:
        view = WeightsView(server.socket)
        async with Control.connected(server.socket) as control, Control.connected(Path(await control.tenant("red"))) as red:
            await red.fill(weights.layout, weights.sources, "host")
            assert await view.look() == {weights.id.hex()}
        assert view.rung([record(weights.id)], "red") == WeightsRung.GPU
        assert view.rung([record(weights.id)], "blue") == view.rung([record(weights.id)]) == WeightsRung.DISK


async def test_weights_find_room_on_the_first_device_that_has_it_else_in_the_arena(tmp_path: Path, weights: Weights) -> None:
    with served(tmp_path / "server", reserve=12 * MIB, arena=32 * MIB) as server:
        view = WeightsView(server.socket)
        await view.look()
        assert view.largest_room == 32 * MIB
        assert view.places({"a": (8 * MIB, ()), "b": (8 * MIB, ()), "c": (20 * MIB, ("another",))}) == {"a": "host", "b": "", "c": ""}
        assert view.places({"a": (8 * MIB, ()), "b": (26 * MIB, ()), "c": (8 * MIB, ())}) is None
        assert view.places({"a": (11 * MIB + 1, ("host",))}) == {"a": "host"}, "it takes whole granules"
        async with Control.connected(server.socket) as control:
            await control.fill(weights.layout, weights.sources, "")
        await view.look()
        assert view.largest_room == 24 * MIB


async def test_a_region_that_was_begun_has_its_room(tmp_path: Path, weights: Weights) -> None:
    with served(tmp_path / "server", reserve=8 * MIB) as server:
        view = WeightsView(server.socket)
        async with Control.connected(server.socket) as control:
            async with stopped_fill(server, control, weights) as filling:
                await view.look()
                assert view.places({weights.id.hex(): (8 * MIB, ())}) == {weights.id.hex(): "host"}
                assert view.places({"another": (8 * MIB, ())}) is None
            await filling
