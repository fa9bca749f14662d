"""What is known of a ring's speed while it runs."""

from __future__ import annotations

import asyncio

import pytest

from shoal.base.errors import ConfigError, NoRouteError
from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.hf.ring import Ring, RingChoice, RingSample
from shoal.hf.ring_times import FACTOR_MAX, RingPace, measure_head, measure_ring
from shoal.hf.sampling import Sampler
from shoal.plan.slots import RingTimes
from shoal.plan.spec import DecodeTimes
from shoal.plan.view import ServerView, Stage, SwarmView

A, B, C = (PeerId(bytes([number]) * 32) for number in range(3))


def flat(seconds):
    return DecodeTimes(points=((1, seconds),))


def pace():
    times = RingTimes(stages=(flat(0.02), flat(0.03), flat(0.005)), hops=flat(0.001))
    return RingPace([A, B], [2, 3], times)


def stages(one):
    return pytest.approx([stage.at(1) for stage in one.times.stages])


def test_passes_put_the_times_right_and_the_head_stays():
    one = pace()
    one.observe({A: (2.0, 0.04), B: (0.0, 0.0), C: (1.0, 1.0)})
    assert stages(one) == [0.04, 0.03, 0.005]
    one.observe({A: (2.0, 0.02), B: (1.0, 1e9)})
    assert stages(one) == [0.02, 0.03 * FACTOR_MAX, 0.005]
    one.observe({})
    assert stages(one) == [0.02, 0.03 * FACTOR_MAX, 0.005]


def test_a_slower_stage_asks_for_other_slots():
    one = pace()
    assert one.slots(12).count == 1  # rows cost nothing here
    assert one.slots(12, fixed=3).count == 3
    assert one.slots(2, fixed=3).count == 2
    before = one.slots(1).tokens_per_s
    one.observe({B: (1.0, 0.3)})
    assert one.slots(1).tokens_per_s < before / 4


def test_blocks_that_were_dealt_out_anew():
    one = pace()
    one.observe({A: (2.0, 0.04)})
    one.move([Stage(peer=C, span=Span(0, 1)), Stage(peer=B, span=Span(1, 5))], [[(1, 0.05)], []])
    assert (one.peers, one.spans) == ((C, B), (1, 4))
    assert stages(one) == [0.05, 4 * 0.01, 0.005]


class Known:
    """A client that knows these servers."""

    def __init__(self, *peers):
        self._servers = tuple(
            ServerView(peer=peer, addresses=(), span=Span(0, 5), cache_tokens=160) for peer in peers
        )

    def view(self):
        return SwarmView(model="m", num_blocks=5, hidden_size=8, servers=self._servers)


def test_a_server_that_has_gone_since_it_was_measured():
    def limits(*peers):
        return Ring(Known(*peers), None, pace(), RingChoice()).limits([sample] * 20)

    sample = RingSample(prompt_ids=(1,), max_new_tokens=10, sampler=Sampler())
    assert limits(B) == limits(A, B, C)
    with pytest.raises(NoRouteError, match="every server"):
        limits(C)


class Row:
    """A head that takes no time."""

    def embed(self, token_ids, encoding, position=0):
        return b"row"

    def logits(self, rows, encoding):
        raise NotImplementedError


class Batch:
    """Counts rows that came together."""

    def __init__(self):
        self.calls = []

    async def logits(self, row, encoding):
        self.calls.append(row)


def test_the_head_is_tried_with_as_many_rows_as_there_may_be():
    times = asyncio.run(measure_head(Batch(), Row(), "float32", 3))
    assert [rows for rows, _ in times.points] == [1, 2, 3]
    with pytest.raises(ConfigError, match="at least 1 sample"):
        asyncio.run(measure_ring(None, Row(), Batch(), "float32", 0))
