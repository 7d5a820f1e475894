"""Who reads which chunk from where it comes from."""

from collections import Counter

from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from restore_agent.transfer.rendezvous import ranked

MEMBERS = [f"node-{number}" for number in range(8)]
CHUNKS = [blake3(str(number).encode()).hexdigest() for number in range(2000)]


def test_each_member_reads_about_as_many_as_the_next() -> None:
    shares = Counter(ranked(chunk, MEMBERS)[0] for chunk in CHUNKS)
    assert all(0.75 < shares[member] / (len(CHUNKS) / len(MEMBERS)) < 1.25 for member in MEMBERS)


@given(st.permutations(MEMBERS), st.sampled_from(CHUNKS))
def test_all_find_the_same_ranks_whatever_the_order_in_which_they_were_told(members: list[str], chunk: str) -> None:
    assert ranked(chunk, [*members, members[0]]) == ranked(chunk, MEMBERS)


@given(st.sampled_from(MEMBERS), st.sampled_from(CHUNKS))
def test_who_goes_changes_nobody_elses_rank(gone: str, chunk: str) -> None:
    left = [member for member in MEMBERS if member != gone]
    assert ranked(chunk, left) == [member for member in ranked(chunk, MEMBERS) if member != gone]
