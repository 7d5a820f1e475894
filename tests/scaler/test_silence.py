"""How long a gateway of which nothing is heard has, and what its share is meanwhile."""

from __future__ import annotations

import asyncio
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from scaler.fleet.member import Hearing, Member
from scaler.fleet.silence import Silence, share
from tests.worlds.virtual_time import run


def member(address: str, hearing: Hearing) -> Member:
    return Member(address, f"process at {address}", 1.0, hearing)


SILENT, HEARD = member("a", Hearing.SILENT), member("b", Hearing.HEARD)


def test_one_that_is_silent_has_its_time_and_is_overdue_then() -> None:
    async def story() -> None:
        loop = asyncio.get_running_loop()
        called: list[float] = []
        silence = Silence(10.0, loop.time, lambda: called.append(loop.time()))
        silence.look([SILENT, HEARD], ())
        assert (silence.addresses, silence.is_overdue(SILENT), silence.is_overdue(HEARD)) == ({"a"}, False, False)
        await asyncio.sleep(4)
        silence.look([SILENT, HEARD], {"b"})  # it is heard, and has not said what it has
        await asyncio.sleep(5.9)
        assert (silence.is_overdue(SILENT), called) == (False, [])
        await asyncio.sleep(0.2)
        silence.look([SILENT, HEARD], {"b"})
        assert (silence.is_overdue(SILENT), silence.is_overdue(HEARD), called) == (True, False, [10.0])
        await asyncio.sleep(4)
        assert silence.is_overdue(HEARD) and called == [10.0, 14.0]

    run(story())


def test_who_is_heard_again_has_all_of_its_time_at_the_next_silence() -> None:
    async def story() -> None:
        loop = asyncio.get_running_loop()
        silence = Silence(10.0, loop.time, lambda: None)
        heard = member("a", Hearing.HEARD)
        for seen, unknown in (([SILENT], ()), ([heard], ()), ([SILENT], ()), ([heard], ("a",)), ([SILENT], ())):
            silence.look(seen, unknown)
            await asyncio.sleep(9)
        assert not silence.is_overdue(SILENT)
        await asyncio.sleep(1)
        assert silence.is_overdue(SILENT) and not silence.is_overdue(heard), "it stands in another way by then"

    run(story())


def test_after_its_end_it_calls_nobody() -> None:
    async def story() -> None:
        called: list[int] = []
        silence = Silence(10.0, asyncio.get_running_loop().time, lambda: called.append(1))
        silence.look([SILENT], ())
        silence.close()
        await asyncio.sleep(60)
        assert not called

    run(story())


@given(st.integers(0, 50), st.sets(st.text(max_size=5), min_size=1, max_size=6), st.text(max_size=5))
def test_all_shares_together_are_the_places(places: int, addresses: set[str], replica: str) -> None:
    shares = {each: share(each, replica, places, addresses) for each in addresses}
    assert sum(shares.values()) == places
    assert max(shares.values()) - min(shares.values()) <= 1
    assert shares == {each: share(each, replica, places, sorted(addresses, reverse=True)) for each in addresses}


def test_what_does_not_divide_is_not_always_the_same_gateway_s() -> None:
    more = {each for each, replica in product("abc", map(str, range(30))) if share(each, replica, 1, "abc")}
    assert more == {"a", "b", "c"}
