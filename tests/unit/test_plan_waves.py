"""When rows of one client leave in groups, and how far apart."""

import pytest

from shoal.plan.waves import expected_trip_s, makes_waves, wave_slots


@pytest.mark.parametrize(
    ("sessions", "hops", "count", "rows"),
    [
        (1, 2, 1, 1), (2, 2, 2, 1), (5, 2, 5, 1),  # nobody waits for anybody
        (6, 2, 2, 3), (12, 2, 2, 6), (13, 2, 2, 7), (12, 4, 4, 3), (11, 4, 11, 1),
        (40, 1, 40, 1),  # one server takes what is there
    ],
)  # fmt: skip
def test_groups_are_even_and_as_many_as_servers(sessions, hops, count, rows):
    slots = wave_slots(sessions, hops, 0.04)
    assert (slots.count, slots.rows(sessions)) == (count, rows)
    assert makes_waves(sessions, hops) == (rows > 1)
    assert slots.gap_s == (pytest.approx(0.02 / hops) if rows > 1 else 0.0)


def test_a_trip_is_taken_for_the_shortest_of_late():
    assert expected_trip_s(0.0, 0.05) == 0.05
    assert expected_trip_s(0.05, 0.03) == 0.03
    slow = 0.03
    for _ in range(100):
        assert slow < (slow := expected_trip_s(slow, 0.06)) <= 0.06
    assert slow == pytest.approx(0.06, rel=0.01)
