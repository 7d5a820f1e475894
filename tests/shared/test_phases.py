"""The names of phases: in their order, with parts that belong to them, and unknown ones that stay."""

from zerowake_shared.phases import SCALE_UP, Phase, in_order


def test_a_scale_up_begins_with_its_request_and_ends_with_the_first_byte() -> None:
    assert SCALE_UP[0] is Phase.HELD
    assert SCALE_UP[-1] is Phase.FIRST_BYTE


def test_one_that_is_not_known_comes_after_those_that_are() -> None:
    assert in_order(["thawing", "first_byte", "image", "held", "melting"]) == ["held", "image", "first_byte", "thawing", "melting"]


def test_every_part_belongs_to_a_phase_of_a_scale_up() -> None:
    parts = [each for each in Phase if "." in each]
    assert parts
    assert {Phase.whole(each) for each in parts} <= set(SCALE_UP)
    assert Phase.whole("melting.ice") == "melting"
