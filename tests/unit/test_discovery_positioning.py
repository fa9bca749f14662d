"""Round trips by gossip: who is asked, who answers, what nobody asked for."""

from __future__ import annotations

import pytest

from shoal.base.ids import PeerId
from shoal.base.limits import GOSSIP_BEAT_S
from shoal.discovery.gossiper import (
    TICK_S,
)
from shoal.discovery.neighbourhood import (
    Action,
)
from shoal.discovery.positioning import ASK_PERIOD_S, ASK_SOON_S, SOON_COUNT
from shoal.plan import coordinates as plan
from shoal.wire.fields import Coordinate
from shoal.wire.gossip import Beat
from tests.unit.gossip_cases import ANN, BOB, Scene, said


def asks(actions: list[Action]) -> list[tuple[PeerId, int]]:
    return [(peer, beat.ask) for peer, beat in said(actions, Beat) if beat.ask]


def test_neighbours_are_asked_for_round_trips_often_at_first_then_seldom() -> None:
    scene = Scene(ANN.peer)
    actions: list[Action] = []
    for _ in range(round(120 / TICK_S)):
        new = scene.wait(TICK_S, [ANN.peer])
        for _, ask in asks(new):
            scene.now_s += 0.04
            scene.hear(ANN.peer, Beat(echo=ask, coordinate=Coordinate([0.0] * 3, 0.001, 0.2)))
        actions += new
    assert len(asks(actions)) == pytest.approx(
        SOON_COUNT + (120 - SOON_COUNT * ASK_SOON_S) / ASK_PERIOD_S, abs=2
    )
    mine = scene.gossiper.coordinate
    assert mine is not None
    there = plan.Coordinate(point=(0.0,) * 3, height=0.001, error=0.2)
    assert plan.distance_s(mine, there) == pytest.approx(0.04, rel=0.2)


def test_who_asks_is_answered_but_not_faster_than_beats() -> None:
    scene = Scene(ANN.peer)
    assert said(scene.hear(ANN.peer, Beat(ask=7)), Beat) == [(ANN.peer, Beat(echo=7))]
    assert not said(scene.hear(ANN.peer, Beat(ask=8)), Beat)
    scene.now_s += GOSSIP_BEAT_S
    assert said(scene.hear(ANN.peer, Beat(ask=9)), Beat) == [(ANN.peer, Beat(echo=9))]


def test_echoes_that_nobody_asked_for_say_nothing() -> None:
    scene = Scene(ANN.peer, BOB.peer)
    (_, ask), *_ = asks(scene.wait(TICK_S, [ANN.peer, BOB.peer]))
    scene.hear(BOB.peer, Beat(echo=ask + 17))
    scene.hear(BOB.peer, Beat(echo=0))
    assert scene.gossiper.coordinate is None
    scene.now_s += 0.05
    scene.hear(ANN.peer, Beat(echo=ask))
    first = scene.gossiper.coordinate
    assert first is not None
    scene.now_s += 1.0
    scene.hear(ANN.peer, Beat(echo=ask))
    assert scene.gossiper.coordinate == first, "an echo counts once"


def test_a_client_answers_and_does_not_ask() -> None:
    scene = Scene(ANN.peer, is_reader=True)
    assert not asks(scene.wait(60.0, [ANN.peer]))
    assert said(scene.hear(ANN.peer, Beat(ask=7)), Beat) == [(ANN.peer, Beat(echo=7))]
