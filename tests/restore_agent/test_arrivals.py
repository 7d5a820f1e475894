"""What is on its way here stays over sweeps and the end of an agent, for a day."""

from __future__ import annotations

import os
from pathlib import Path

from restore_agent.snapshots.arrivals import Arrivals
from restore_agent.snapshots.store import Store
from tests.worlds.travelling import node, take
from tests.worlds.virtual_time import StandingClock

DAY = 24 * 3600.0


def test_chunks_of_what_is_on_its_way_are_not_swept_until_it_is_given_up(tmp_path: Path) -> None:
    with node(tmp_path / "other") as other:
        snapshot = take(other, tmp_path / "model")
        data = snapshot.manifest.encode()
        clock = StandingClock(1_800_000_000.0)
        arrivals = Arrivals(tmp_path / "state", clock)
        folder = arrivals.begin(snapshot.digest, data)
        (folder / "pages.index").write_bytes(b"some")
        regions = {record.region for record in snapshot.manifest.weights}
        assert arrivals.kept() == ({chunk.hash for chunk in snapshot.chunks}, regions)
        clock.moment += DAY - 1
        assert arrivals.begin(snapshot.digest, data) == folder
        clock.moment += 2
        assert arrivals.kept()[1] == regions, "somebody went on with it"
        clock.moment += DAY
        assert arrivals.kept() == (set(), set())
        assert list((tmp_path / "state/arriving").iterdir()) == []


def test_what_has_arrived_is_no_longer_on_its_way_and_what_cannot_be_read_keeps_nothing(tmp_path: Path) -> None:
    arrivals = Arrivals(tmp_path / "state")
    arrivals.begin("ab", b"torn")
    assert arrivals.kept() == (set(), set())
    arrivals.ended("ab")
    arrivals.ended("ab")
    assert not (tmp_path / "state/arriving/ab.json").exists()


def test_an_agent_that_starts_anew_keeps_what_had_come(tmp_path: Path) -> None:
    with node(tmp_path / "other") as other:
        snapshot = take(other, tmp_path / "model")
        state = tmp_path / "state"
        with node(state) as store, store.chunks.lease() as lease:
            store.arrivals.begin(snapshot.digest, snapshot.manifest.encode())
            kept = lease.put(other.chunks.path(snapshot.chunks[0].hash).read_bytes())
            orphan = lease.put(b"of nobody")
            (state / "fetched" / snapshot.manifest.weights[0].region).mkdir(parents=True)
            (state / "fetched" / "ab").mkdir()
        store = Store(state)
        assert store.chunks.has(kept) and not store.chunks.has(orphan)
        assert [folder.name for folder in (state / "fetched").iterdir()] == [snapshot.manifest.weights[0].region]
        store.close()


def test_what_a_killed_agent_left_half_begun_or_half_ended_goes(tmp_path: Path) -> None:
    with node(tmp_path / "state") as store:
        snapshot = take(store, tmp_path / "model")
        store.arrivals.begin(snapshot.digest, snapshot.manifest.encode()).rmdir()  # it is the snapshot's by now
        (tmp_path / "state/arriving/ab").mkdir()
        torn = tmp_path / "state/arriving/.ab.json.0123"
        torn.write_bytes(b"half")
        with store.chunks.lease() as lease:
            lease.hold([snapshot.digest, "ab"])
            store.sweep()
            assert len(list((tmp_path / "state/arriving").iterdir())) == 3, "somebody is at it"
        os.utime(torn, (0, 0))
        store.sweep()
        assert list((tmp_path / "state/arriving").iterdir()) == []


def test_what_somebody_brings_is_not_given_up_however_long_it_takes(tmp_path: Path) -> None:
    clock = StandingClock(1_800_000_000.0)
    arrivals = Arrivals(tmp_path / "state", clock)
    folder = arrivals.begin("ab", b"torn")
    clock.moment += 2 * DAY
    arrivals.kept(leased={"ab"})
    assert folder.exists()
    arrivals.kept()
    assert not folder.exists()
