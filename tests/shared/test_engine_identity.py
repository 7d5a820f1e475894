"""What makes an engine another one."""

from zerowake_shared.engine_identity import engine_identity


def test_each_part_of_it_counts_and_the_order_of_variables_does_not() -> None:
    one = engine_identity(["serve", "a b"], {"A": "1", "B": "2"}, "/srv")
    assert one == engine_identity(("serve", "a b"), {"B": "2", "A": "1"}, "/srv")
    others = [
        engine_identity(["serve", "a", "b"], {"A": "1", "B": "2"}, "/srv"),
        engine_identity(["serve", "a b"], {"A": "1", "B": "3"}, "/srv"),
        engine_identity(["serve", "a b"], {"A": "1"}, "/srv"),
        engine_identity(["serve", "a b"], {"A": "1", "B": "2"}, "/srv/other"),
    ]
    assert len({one, *others}) == 5
