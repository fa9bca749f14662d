"""Standbys and moves: who gets ready beside a chain, and when a session should leave a hop.

A **standby** is a hop beside the chain that is fed like the hop it may replace. A **move** is
the same thing made on purpose: the stages of the new chain get ready as standbys first, then a
route makes them hops. Pure: how it is carried out is the client's (`shoal.client.tending`).
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Final

from shoal.base.errors import NoRouteError
from shoal.base.ids import PeerId
from shoal.base.limits import STANDBYS_PER_BORDER_MAX
from shoal.base.spans import Span
from shoal.plan.repair import choose_repair
from shoal.plan.routing import (
    ANY_SERVER,
    Wanted,
    choose_chain,
    decode_step_s,
    leg_of,
    power_of_two,
    slowness_with_one_more,
)
from shoal.plan.shortest import Leg, Task
from shoal.plan.view import Experience, Stage, SwarmView
from shoal.plan.ways import ways_of

MIGRATION_GAIN: Final = 0.3
"""A session moves only to a chain whose step takes so much less: measured times vary by a
tenth, batches of others by more, and a move costs its new servers a replay."""

IN_USE_S: Final = 1.0
"""Put on the price of a peer that the session already depends on: one death should not take
hop and standby."""


def promote(
    chain: Sequence[Stage], lost: Collection[PeerId], standbys: Sequence[Stage]
) -> tuple[Stage, ...]:
    """The chain in which standbys take the place of the stages of `lost` peers, where they can.

    Adjacent lost stages are replaced together if need be. Stages that nothing stands by for
    stay as they are.
    """
    standbys = [standby for standby in standbys if standby.peer not in lost]
    new: list[Stage] = []
    for group in _runs(chain, lost):
        if group[0].peer not in lost:
            new += group
            continue
        whole = _tile(Span(group[0].span.start, group[-1].span.end), standbys)
        if whole is not None:
            new += whole
            continue
        for stage in group:
            new += _tile(stage.span, standbys) or [stage]
    return tuple(new)


def keep_valid(chain: Sequence[Stage], standbys: Sequence[Stage]) -> tuple[Stage, ...]:
    """The standbys that may stand beside this chain, the first of several that exclude another.

    Each must be fed: begin where the chain or one of its hops does, or where another standby
    ends. No peer may have two hops that begin or end at the same block.
    """
    taken = [stage for stage in chain if len(stage.span)]
    borders = {stage.span.start for stage in taken}
    kept: list[Stage] = []
    waiting = list(standbys)
    is_progressing = True
    while is_progressing:
        is_progressing = False
        for standby in list(waiting):
            if standby.span.start not in borders:
                continue
            waiting.remove(standby)
            is_progressing = True
            beside = sum(1 for one in kept if one.span.start == standby.span.start)
            if beside < STANDBYS_PER_BORDER_MAX and not any(
                _collide(standby, other) for other in taken
            ):
                kept.append(standby)
                taken.append(standby)
                borders.add(standby.span.end)
    return tuple(kept)


def choose_standbys(
    view: SwarmView,
    chain: Sequence[Stage],
    present: Sequence[Stage],
    experience: Experience,
    classes: Mapping[PeerId, str],
    rng: random.Random,
    *,
    wanted: Wanted = ANY_SERVER,
    count: int = 1,
) -> tuple[Stage, ...]:
    """Standbys for every stage of `chain`: those `present` that fit, and new ones.

    A new one has the numerics class of the hop it stands by for (`classes`), does not drain, is
    not to be avoided, and is another peer; peers that the chain does not use yet go first.
    Stages that nobody can stand by for have none.
    """
    stages = [stage for stage in chain if len(stage.span)]
    draining = {server.peer for server in view.servers if server.state == "draining"}
    spare = list(keep_valid(stages, [one for one in present if one.peer not in draining]))
    chosen: list[Stage] = []
    for _ in range(count):
        for index, stage in enumerate(stages):
            mine = _tile(stage.span, spare)
            if mine is None:
                taken = [*stages, *chosen, *spare]
                feeder = stages[index - 1].peer if index else None
                follower = stages[index + 1].peer if index + 1 < len(stages) else None
                mine = _stand_by(
                    view, stage, taken, experience, classes, rng, wanted, feeder, follower
                )
            spare = [one for one in spare if one not in mine]
            chosen += mine
    return keep_valid(stages, chosen)


def _stand_by(
    view: SwarmView,
    stage: Stage,
    taken: Sequence[Stage],
    experience: Experience,
    classes: Mapping[PeerId, str],
    rng: random.Random,
    wanted: Wanted,
    feeder: PeerId | None,
    follower: PeerId | None,
) -> list[Stage]:
    """The stages that could stand by for `stage`, fed by `feeder`, to send on to `follower`.

    None of both is the client. No stages if nobody can.
    """
    used = {one.peer for one in taken}
    legs: list[Leg] = []
    for server in view.servers:
        if not wanted.allows(server) or server.state == "draining":
            continue
        if server.peer == stage.peer or server.peer in experience.avoid:
            continue
        if (feeder, server.peer) in experience.unreachable_pairs:
            continue
        if server.numerics != classes.get(stage.peer, server.numerics):
            continue
        leg = leg_of(server, experience)
        if server.peer in used:
            leg = replace(leg, seconds=leg.seconds + IN_USE_S)
        part = leg.span.overlap(stage.span)
        if part is None or any(
            other.peer == leg.peer and other.span.overlap(part) for other in taken
        ):
            continue
        legs.append(leg)
    ways = ways_of(view.servers, experience, hidden_size=view.hidden_size)
    task = Task(span=stage.span, ways=ways, before=feeder, after=follower)
    path = power_of_two(task, legs, rng)
    return [] if path is None else list(path)


def choose_departure(
    view: SwarmView,
    chain: Sequence[Stage],
    leaving: Collection[Stage],
    experience: Experience,
    numerics: str,
    rng: random.Random,
    *,
    wanted: Wanted = ANY_SERVER,
) -> tuple[Stage, ...] | None:
    """The chain to move to so that no `leaving` stage is used; None: there is none.

    What else their peers run for the session stays; nothing new is asked of them.
    """
    stages = [stage for stage in chain if len(stage.span)]
    lost = frozenset(i for i, stage in enumerate(stages) if stage in leaving)
    if not lost:
        return None
    peers = {stage.peer for stage in leaving}
    experience = replace(experience, avoid=experience.avoid | peers)
    try:
        target = choose_repair(view, stages, lost, experience, numerics, rng, wanted=wanted)
    except NoRouteError:
        return None
    new = [stage for stage in target if stage not in stages]
    if any(stage in leaving for stage in target) or any(
        stage.peer in experience.avoid for stage in new
    ):
        return None
    return target if can_move(stages, target) else None


def choose_migration(
    view: SwarmView,
    chain: Sequence[Stage],
    experience: Experience,
    numerics: str,
    rng: random.Random,
    *,
    wanted: Wanted = ANY_SERVER,
    gain: float = MIGRATION_GAIN,
) -> tuple[Stage, ...] | None:
    """A chain of the `numerics` class that is faster by `gain`, or None.

    Prices are those of routing, with what the client learned of slow servers since. What the
    session itself does to its servers is not held against them.
    """
    stages = tuple(stage for stage in chain if len(stage.span))
    experience = _of_one_session(stages, view, experience)
    span = Span(stages[0].span.start, stages[-1].span.end)
    wanted = replace(wanted, numerics=numerics)
    try:
        target = choose_chain(view, span, experience, rng, wanted=wanted)
    except NoRouteError:
        return None
    draining = {server.peer for server in view.servers if server.state == "draining"}
    unwanted = experience.avoid | draining
    if target == stages or any(stage.peer in unwanted for stage in target):
        return None
    now_s, then_s = (decode_step_s(one, view, experience) for one in (stages, target))
    if then_s > (1 - gain) * now_s or not can_move(stages, target):
        return None
    return target


def _of_one_session(stages: Iterable[Stage], view: SwarmView, experience: Experience) -> Experience:
    """What a session along `stages` may expect of servers, compared with others.

    Its own have room for it, and it is one of those that share their passes; elsewhere its rows
    come on top of those that a server runs now.
    """
    mine = {stage.peer for stage in stages}
    slowness = {
        one.peer: slowness_with_one_more(one, experience.slowness[one.peer])
        for one in view.servers
        if one.peer in experience.slowness and one.peer not in mine
    }
    return replace(
        experience,
        sessions={
            peer: max(0, count - (peer in mine)) for peer, count in experience.sessions.items()
        },
        waits_s={peer: wait_s for peer, wait_s in experience.waits_s.items() if peer not in mine},
        slowness=experience.slowness | slowness,
    )


def can_move(chain: Sequence[Stage], target: Sequence[Stage]) -> bool:
    """Whether all new stages of `target` can get ready beside `chain`."""
    new = [stage for stage in target if stage not in chain]
    return len(keep_valid(chain, new)) == len(new)


def can_be_fed(target: Sequence[Stage], new: Sequence[Stage], experience: Experience) -> bool:
    """Whether whoever comes before each new stage of `target` can reach it without a relay."""
    return not any(
        stage in new and (before.peer, stage.peer) in experience.unreachable_pairs
        for before, stage in pairwise(target)
    )


def _collide(one: Stage, other: Stage) -> bool:
    """Whether a peer's two hops could be taken for each other."""
    if one.peer != other.peer:
        return False
    return one.span.start == other.span.start or one.span.end == other.span.end


def _tile(span: Span, standbys: Iterable[Stage]) -> list[Stage] | None:
    """Standbys that cover `span` exactly, one after the other, the fewest; None: impossible."""
    by_start: dict[int, list[Stage]] = {}
    for standby in standbys:
        by_start.setdefault(standby.span.start, []).append(standby)
    best: dict[int, list[Stage]] = {span.start: []}
    for border in range(span.start, span.end):
        if border not in best:
            continue
        for standby in by_start.get(border, []):
            tiles = [*best[border], standby]
            known = best.get(standby.span.end)
            if standby.span.end <= span.end and (known is None or len(tiles) < len(known)):
                best[standby.span.end] = tiles
    return best.get(span.end)


def _runs(chain: Sequence[Stage], lost: Collection[PeerId]) -> Iterator[list[Stage]]:
    """The chain in pieces: each living stage alone, adjacent lost stages together."""
    run: list[Stage] = []
    for stage in chain:
        if not len(stage.span):
            continue
        if stage.peer in lost:
            run.append(stage)
            continue
        if run:
            yield run
            run = []
        yield [stage]
    if run:
        yield run
