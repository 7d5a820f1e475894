"""Where the node's weights stand, as a real gpumem says: each region's rung, what has changed since the last look, what is free."""

from pathlib import Path

import pytest

from gpumem.client.control import Control
from restore_agent.drivers.weights_view import WeightsRung, WeightsView
from restore_agent.snapshots.manifest import WeightsRecord
from tests.worlds.gpumem_server import MIB, Weights, make_weights, served


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


async def test_the_largest_room_is_what_nobody_has_whose_name_is_known(tmp_path: Path, weights: Weights) -> None:
    with served(tmp_path / "server", reserve=12 * MIB, arena=32 * MIB) as server:
        view, region = WeightsView(server.socket), weights.id.hex()
        assert view.largest_room(set()) is None
        await view.look()
        assert view.largest_room({region}) == 32 * MIB
        async with Control.connected(server.socket) as control:
            await control.fill(weights.layout, weights.sources, "")
            await view.look()
            assert view.largest_room({region}) == 24 * MIB
            assert view.largest_room(set()) == 32 * MIB, "no snapshot has these any more"
    with served(tmp_path / "server", reserve=12 * MIB) as server:
        async with Control.connected(server.socket) as control:
            await control.fill(weights.layout, weights.sources, "host")
        await view.look()
        assert view.largest_room({region}) == 4 * MIB
        assert view.largest_room(set()) == 12 * MIB
