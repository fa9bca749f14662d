"""The starter's decisions carried out: deal blocks when all are here, again when one is lost.

What to do is decided in `shoal.plan.ring` and `ring_repair`, over snapshots of the desk's books.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from shoal.base.errors import ConfigError
from shoal.base.ids import PeerId
from shoal.base.spans import Span, missing_blocks
from shoal.plan.ring import NodeSpec, RingModel, RingSplit, head_s, split_by_hand, split_ring
from shoal.plan.ring_repair import (
    NodeView,
    Task,
    after_loss,
    better_split,
    growing_first,
    in_chain_order,
    tasks_of,
)
from shoal.plan.spec import DecodeTimes
from shoal.server.ring_desk import DeskNode, RingDesk

logger = logging.getLogger(__name__)

LOST_GRACE_S: Final = 1.5
"""A node whose stream broke may come back within this: a link that hiccups moves no weights."""

LOOK_S: Final = 0.5

SLOW_FOR_S: Final = 20.0
"""A better split must have been better for this long: a burst of other work is no reason."""

Say = Callable[[str], None]
"""Tells the person at the starter, a line at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RingWish:
    """How the person wants the ring."""

    num_nodes: int
    """Machines that have to join before blocks are dealt out, the starter not counted."""
    split: tuple[int, ...] = ()
    """Blocks by node in the order of joining; with one number more, the first is the starter's."""
    starter_blocks: int | None = 0
    """None: as the split says."""
    batch: float = 1.0
    """Rows of a decode pass that stages are compared for."""
    is_resplitting: bool = False
    """Change the split by itself when another one is better by the paces measured."""


class RingKeeper:
    """Keeps all blocks of one ring hosted."""

    def __init__(
        self,
        desk: RingDesk,
        model: RingModel,
        wish: RingWish,
        say: Say,
        head: DecodeTimes | None = None,
    ) -> None:
        """`head`: what embedding and head were measured to take here; None: as their size says."""
        self._desk = desk
        self._model = model
        self._wish = wish
        self._say = say
        self._head = head
        self._waiting: list[Task] = []
        """Of a new split: tasks that begin when those before are done."""
        self._told: Task | None = None
        """The last task that somebody was told."""
        self._since_s: float | None = None
        """Since when another split is better."""
        self._is_proposed = False
        """Whether the person was told, for this split."""
        self._said = ""
        self._met: set[PeerId] = set()
        """Whom the person knows of."""
        self.up = asyncio.Event()
        """Set while every block is served."""

    async def run(self) -> None:
        """Gather, deal, keep; until cancelled.

        Raises:
            ConfigError: those who came can't hold the model, or not in the split asked for.
        """
        await self._gather()
        self._deal()
        while True:
            await self._desk.changed(LOOK_S)
            self.look()

    def look(self) -> None:
        """Look once, and tell nodes what to do."""
        self._say_failures()
        self._say_spares()
        self._see_whether_up()
        self._relieve()
        try:
            tasks = after_loss(self._model, self._views(), batch=self._wish.batch)
        except ConfigError as error:
            self._say_once(f"{self._missing()}: {error.detail}")
            return
        if tasks:
            self._start(tasks, "taken over")
        elif self._waiting:
            self._go_on()
        elif self.up.is_set():
            self._watch_paces()

    # --- the first split ---------------------------------------------------------------

    async def _gather(self) -> None:
        wanted = self._wish.num_nodes
        said = -1
        while True:
            joined = [one for one in self._desk.here if not one.is_starter]
            has_all = len(joined) >= wanted and (
                self._wish.starter_blocks == 0 or len(self._desk.here) > len(joined)
            )
            if len(joined) != said:
                said = len(joined)
                self._say(f"{said} of {wanted} nodes are here")
            self._say_failures()
            if has_all:
                return
            await self._desk.changed(LOOK_S)

    def _deal(self) -> None:
        views = self._views()
        starters = [one for one in views if self._desk.nodes[one.spec.peer].is_starter]
        others = [one for one in views if one not in starters]
        chosen = [*starters, *others[: self._wish.num_nodes]]  # who came besides is a spare
        split = self._first_split([one.spec for one in chosen], bool(starters))
        tasks = tasks_of(self._model, chosen, split)
        for view, stage_s in zip(chosen, split.stages_s, strict=True):
            logger.info("planned node=%s stage_s=%.5f", view.spec.name, stage_s)
        self._met.update(one.spec.peer for one in chosen)
        self._start(tasks, "split")

    def _first_split(self, specs: Sequence[NodeSpec], has_starter: bool) -> RingSplit:
        counts = self._wish.split
        if not counts:
            return split_ring(self._model, specs, batch=self._wish.batch)
        if has_starter and len(counts) == len(specs) - 1 and specs[0].num_blocks is not None:
            counts = (specs[0].num_blocks, *counts)
        return split_by_hand(self._model, specs, counts, batch=self._wish.batch)

    # --- looking -----------------------------------------------------------------------

    def _views(self) -> list[NodeView]:
        """Who counts: who is here and serves something or may be told to, and who left just now."""
        now_s = asyncio.get_running_loop().time()
        return [
            self._view(one)
            for one in sorted(self._desk.nodes.values(), key=lambda one: one.number)
            if one.measured is not None
            and not one.is_leaving
            and not (one.is_failed and one.served is None)
            and (one.lost_s is None or now_s - one.lost_s < LOST_GRACE_S)
        ]

    def _view(self, node: DeskNode) -> NodeView:
        if node.is_failed and node.served is not None:  # it keeps what it has, and gets no more
            most = self._model.need_bytes(node.served)
            spec = replace(self._spec(node), memory_bytes=most, num_blocks=None)
            return NodeView(spec=spec, span=node.served, pace_s=node.report.pace_s)
        return NodeView(
            spec=self._spec(node),
            span=node.span,
            free_bytes=node.report.free_bytes,
            pace_s=node.report.pace_s,
        )

    def _spec(self, node: DeskNode) -> NodeSpec:
        if node.measured is None:
            raise ConfigError(f"{node.name} has not measured itself yet")
        decode = DecodeTimes(points=tuple(node.measured.decode_s_by_batch))
        fixed_s = self._head_s(decode) if node.is_starter else 0.0
        return NodeSpec(
            peer=node.peer,
            name=node.name,
            memory_bytes=node.measured.memory_bytes,
            decode=decode,
            fixed_s=fixed_s,
            num_blocks=self._wish.starter_blocks if node.is_starter else None,
        )

    def _head_s(self, decode: DecodeTimes) -> float:
        if self._head is not None:
            return self._head.at(self._wish.batch)
        return head_s(self._model, decode, self._wish.batch)

    def _see_whether_up(self) -> None:
        served = [one.served for one in self._desk.here if one.served is not None]
        missing = missing_blocks(Span(0, self._model.num_blocks), served)
        self._desk.is_up = not missing
        if not missing and not self.up.is_set():
            self.up.set()
            self._said = ""
            self._say("the ring is up: " + self._chain_text())
        elif missing and self.up.is_set():
            self.up.clear()
            self._say("blocks " + ", ".join(map(str, missing)) + " are served by nobody now")

    def _relieve(self) -> None:
        """Let those go who were told to stop, once others serve what they have."""
        staying = [
            one.served
            for one in self._desk.here
            if one.served is not None and not one.is_leaving and one.is_settled
        ]
        for node in self._desk.here:
            if not node.is_leaving or node.task.start == node.task.end:
                continue
            if node.served is not None and missing_blocks(node.served, staying):
                self._say_once(f"{node.name} was told to stop: others take its blocks first")
                continue
            self._desk.tell(node, None, is_beside=False)
            self._say(f"{node.name} leaves: others have its blocks")

    def _missing(self) -> str:
        names = ", ".join(one.name for one in self._desk.here if one.is_leaving)
        return f"nobody can take the blocks of {names}" if names else "blocks are missing"

    def _chain_text(self) -> str:
        serving = [one for one in self._desk.here if one.served is not None]
        serving.sort(key=lambda one: (one.served or Span(0, 0), one.number))
        chain = " -> ".join(f"{one.name} {one.served}" for one in serving)
        spares = [one.name for one in self._desk.here if one.served is None]
        return chain + (f"; spare: {', '.join(spares)}" if spares else "")

    def _say_failures(self) -> None:
        for node in self._desk.nodes.values():
            if node.is_failed and node.lost_s is None:
                self._say_once(f"{node.name} can't take its blocks: {node.report.detail}")

    def _say_spares(self) -> None:
        """Who came after blocks were dealt out."""
        for node in self._desk.here:
            if node.peer not in self._met:
                self._met.add(node.peer)
                if node.span is None:
                    self._say(f"{node.name} is a spare")

    # --- doing -------------------------------------------------------------------------

    def _start(self, tasks: Sequence[Task], what: str, *, is_in_turn: bool = False) -> None:
        self._desk.turn += 1
        self._since_s, self._desk.proposal, self._is_proposed = None, "", False
        texts = [f"{self._desk.nodes[one.peer].name} {one.span or 'is a spare'}" for one in tasks]
        self._say(f"{what}: {', '.join(texts)}")
        count = 1 if is_in_turn else len(tasks)
        self._waiting = list(tasks[count:])
        for task in tasks[:count]:
            self._tell(task)

    def _tell(self, task: Task) -> None:
        self._told = task
        node = self._desk.nodes[task.peer]
        need = 0 if task.span is None else self._model.need_bytes(task.span)
        self._desk.planned_bytes[task.peer] = need
        self._desk.tell(node, task.span, is_beside=task.is_beside)

    def _go_on(self) -> None:
        """The next task of a new split, when nobody is loading; none if the last one failed."""
        if any(not one.is_settled for one in self._desk.here):
            return
        task, told = self._waiting.pop(0), self._told
        serve = {one.peer: one.served for one in self._desk.here}
        is_done = told is None or (told.peer in serve and serve[told.peer] == told.span)
        if is_done and task.peer in serve:
            self._tell(task)
        else:  # what the others would leave now is served by nobody else
            logger.info("split given up waiting=%s", 1 + len(self._waiting))
            self._waiting.clear()

    def _watch_paces(self) -> None:
        views = self._views()
        found = better_split(self._model, views)
        now_s = asyncio.get_running_loop().time()
        if found is None or any(not one.is_settled for one in self._desk.here):
            self._since_s, self._desk.proposal = None, ""
            return
        split, gain = found
        ordered = in_chain_order(views)
        text = ",".join(str(len(span) if span else 0) for span in split.spans)
        slow = max(
            ordered, key=lambda one: one.spec.stage_s(0, 1.0) + one.pace_s * _count(one.span)
        )
        self._desk.proposal = (
            f"{slow.spec.name} is slower than planned: blocks {text} would be {gain:.1f} times as "
            "fast by what is measured now"
        )
        if self._since_s is None:
            self._since_s = now_s
        if now_s - self._since_s < SLOW_FOR_S:
            return
        if not self._wish.is_resplitting:
            if not self._is_proposed:
                self._say(self._desk.proposal + " (--auto-resplit would change it)")
            self._is_proposed = True
            return
        tasks = growing_first(ordered, tasks_of(self._model, ordered, split))
        self._start(tasks, "resplit", is_in_turn=True)

    def _say_once(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self._say(text)


def _count(span: Span | None) -> int:
    return 0 if span is None else len(span)
