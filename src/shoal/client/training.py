"""Training steps: micro-batches through parallel chains, forward and back.

Servers keep nothing that a step depends on. The rows that entered each server's blocks stay
here, so whoever fails, on the way out or back, only its blocks are run again elsewhere, and the
gradients are the same. Chains are chosen anew for every step (`plan/lanes.py`).
Bytes in, bytes out: tensors are `shoal.hf.training`'s business.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from shoal.base.errors import (
    AdapterMissing,
    BadInput,
    ConfigError,
    PeerMisbehaved,
    SessionLost,
    ShoalError,
)
from shoal.base.ids import PeerId, short
from shoal.base.spans import Span
from shoal.base.training import TrainedTensors, Values
from shoal.client.training_batch import AddGradients, Batch, Found, InOrder, Leg, Part, Trail
from shoal.client.training_check import Disputed, SpotChecks
from shoal.client.training_host import HonestHost, TrainingHost
from shoal.client.training_link import TrainingLink
from shoal.client.training_route import Lane, Trouble
from shoal.plan.lanes import choose_lanes, cut_batch, micro_tokens
from shoal.plan.routing import Wanted
from shoal.plan.view import Stage
from shoal.wire.tensors import check_payload, is_finite, row_bytes
from shoal.wire.training import Drawn, Micro

logger = logging.getLogger(__name__)

T = TypeVar("T")

Ending = Callable[[range, bytes], Awaitable[bytes]]
"""What is behind the span: which rows of the batch, and these as they left it, to the gradients
of them."""

MICRO_TOKENS_MIN: Final = 128
"""Below this the products of a block are too small to be fast."""

MICRO_TOKENS_MAX: Final = 512
"""What others' decode rows may have to wait for is one block of so many rows."""

LANES_MAX: Final = 8

FLOAT32_BYTES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How batches are cut and spread."""

    micro_tokens: int | None = None
    """Positions of a micro-batch, at most; None: by the batch. A sequence that is longer goes
    alone."""
    lanes_max: int = LANES_MAX
    """Chains that are used side by side, at most."""
    verify_rate: float = 0.0
    """Share of what servers compute that another one computes as well: `training_check.py`."""

    def __post_init__(self) -> None:
        if self.micro_tokens is not None and self.micro_tokens < 1:
            raise ConfigError(f"micro_tokens is {self.micro_tokens}: it must be at least 1")
        if self.lanes_max < 1:
            raise ConfigError(f"lanes_max is {self.lanes_max}: it must be at least 1")
        if not 0 <= self.verify_rate <= 1:
            raise ConfigError(f"verify_rate is {self.verify_rate}: it must be from 0 to 1")


class TrainingClient:
    """Runs training steps for one client."""

    def __init__(self, host: TrainingHost, config: TrainConfig | None = None) -> None:
        self.config = config or TrainConfig()
        self.repairs = 0
        """How often a server's part was run again elsewhere."""
        self.sent_bytes = 0
        """Rows and gradients that were sent; tensors are not counted."""
        self._host = HonestHost(host)
        self.checks = SpotChecks(self._host, self.config.verify_rate)
        self._links: dict[PeerId, TrainingLink] = {}

    async def close(self) -> None:
        """End all streams."""
        for link in self._links.values():
            await link.close()

    async def forward(self, batch: Batch, *, is_kept: bool) -> Trail:
        """Run a batch through its span; with `is_kept` a way back will follow.

        Raises:
            BadInput, AdapterBad: rows or tensors that can't be.
            NoRouteError, PeerError: the swarm could not do it within the client's patience.
        """
        size = self._host.config.hidden_size
        check_payload(batch.encoding, size, sum(batch.lengths), memoryview(batch.rows).nbytes)
        lanes = await self._lanes(batch)
        trail = Trail(batch=batch, parts=self.cut(batch))
        waiting = deque(trail.parts)

        async def work(lane: Lane) -> None:
            while waiting:
                part = waiting.popleft()
                await self._whole_way_out(batch, part, lane, is_kept=is_kept)

        try:
            # Twice as many as servers: one computes while another travels.
            await _all(work(lane) for lane in lanes for _ in range(2 * len(lane.stages)))
        except BaseException:
            self.forget(trail)
            raise
        return trail

    async def backward(self, trail: Trail, gradients: Values, add: AddGradients) -> bytes:
        """The gradients of the rows that entered, from those of the rows that left.

        Those of trained tensors go to `add`, one micro-batch after the other in their order,
        so that sums of them round the same way however fast anybody was.

        Raises:
            BadInput: gradients of a wrong size, or not finite.
            NoRouteError, PeerError: as `forward`.
        """
        batch, size = trail.batch, self._host.config.hidden_size
        check_payload(batch.encoding, size, sum(batch.lengths), memoryview(gradients).nbytes)
        _check_gradients(batch.encoding, gradients)
        step, at = row_bytes(batch.encoding, size), 0
        found: dict[int, bytes] = {}
        in_order = InOrder((part.first for part in trail.parts), add)
        waiting: deque[tuple[Part, memoryview]] = deque()
        for part in trail.parts:
            end = at + step * sum(part.lengths)
            waiting.append((part, memoryview(gradients)[at:end]))
            at = end

        async def work() -> None:
            while waiting:
                await in_order.room()
                if not waiting:
                    return
                part, values = waiting.popleft()
                found[part.first], tensors = await self._back(batch, part, values)
                in_order.came(part.first, tensors)

        servers = {leg.stage.peer for part in trail.parts for leg in part.legs}
        try:
            await _all(work() for _ in range(2 * len(servers)))
        finally:
            self.forget(trail)
        return b"".join(found[part.first] for part in trail.parts)

    async def step(self, batch: Batch, ending: Ending, add: AddGradients | None) -> bytes:
        """Forward, `ending`, and back: each micro-batch as soon as it can, so that servers
        compute while the ending does, and keep little. What `backward` gives and tells.

        `ending` is given the rows of each micro-batch, in whichever order they come and of several
        at a time, and gives their gradients. Without `add` there is no way back: what it gives
        is of no effect, and what comes of this is empty.

        Raises:
            BadInput, AdapterBad, NoRouteError, PeerError: as `forward` and `backward`.
        """
        size = self._host.config.hidden_size
        check_payload(batch.encoding, size, sum(batch.lengths), memoryview(batch.rows).nbytes)
        lanes = await self._lanes(batch)
        trail = Trail(batch=batch, parts=self.cut(batch))
        in_order = InOrder((part.first for part in trail.parts), add or _add_nothing)
        waiting, found = deque(trail.parts), dict[int, bytes]()

        async def work(lane: Lane) -> None:
            while waiting:
                await in_order.room()
                if not waiting:
                    return
                part = waiting.popleft()
                await self._whole_way_out(batch, part, lane, is_kept=add is not None)
                chosen = range(part.first_row, part.first_row + sum(part.lengths))
                gradients = await ending(chosen, part.output)
                part.output = b""
                if add is None:
                    continue
                check_payload(batch.encoding, size, len(chosen), len(gradients))
                _check_gradients(batch.encoding, gradients)
                found[part.first], tensors = await self._back(batch, part, gradients)
                in_order.came(part.first, tensors)
                part.legs.clear()

        try:
            # As many as on the way out alone: each server has one that goes and one that returns.
            await _all(work(lane) for lane in lanes for _ in range(2 * len(lane.stages)))
        finally:
            self.forget(trail)
        return b"" if add is None else b"".join(found[part.first] for part in trail.parts)

    def forget(self, trail: Trail) -> None:
        """No way back will come: servers may free what they kept."""
        numbers: dict[PeerId, list[int]] = {}
        for part in trail.parts:
            for leg in part.legs:
                link = self._links.get(leg.stage.peer)
                if leg.is_kept and link is not None and link.generation == leg.generation:
                    numbers.setdefault(leg.stage.peer, []).append(leg.number)
                leg.is_kept = False
        for peer, chosen in numbers.items():
            self._links[peer].forget(chosen)

    def cut(self, batch: Batch) -> list[Part]:
        """The batch's micro-batches: the same whoever is there to run them."""
        tokens_max = self.config.micro_tokens or micro_tokens(
            sum(batch.lengths),
            max(batch.lengths),
            least=MICRO_TOKENS_MIN,
            most=MICRO_TOKENS_MAX,
        )
        step = row_bytes(batch.encoding, self._host.config.hidden_size)
        view, row, parts = memoryview(batch.rows), 0, []
        for start, end in cut_batch(batch.lengths, tokens_max):
            lengths = batch.lengths[start:end]
            rows = view[step * row : step * (row + sum(lengths))]
            parts.append(Part(first=start, lengths=lengths, rows=rows, first_row=row))
            row += sum(lengths)
        return parts

    async def _lanes(self, batch: Batch) -> list[Lane]:
        trouble = Trouble(self._host)

        def choose() -> list[Lane]:
            host, wanted = self._host, Wanted(encoding=batch.encoding)
            chains = choose_lanes(
                host.view(),
                batch.span,
                trouble.experience(),
                host.rng,
                lanes_max=self.config.lanes_max,
                wanted=wanted,
            )
            return [Lane(host, chain, wanted) for chain in chains]

        return await trouble.until_found(choose)

    async def _whole_way_out(self, batch: Batch, part: Part, lane: Lane, *, is_kept: bool) -> None:
        part.legs, part.output = await self._out(
            batch, part, batch.span, part.rows, lane, is_kept=is_kept
        )

    async def _out(
        self, batch: Batch, part: Part, span: Span, rows: Values, lane: Lane, *, is_kept: bool
    ) -> tuple[list[Leg], bytes]:
        """A micro-batch through the blocks of `span`; the way that it took, and what left."""
        trouble, legs, border = Trouble(self._host), list[Leg](), span.start
        while border < span.end:
            lane = await trouble.lane_from(lane, border, span.end)
            stage = lane.at(border)
            leg = Leg(stage=stage, rows=rows)
            try:
                left = await self._run(batch, part, leg, is_kept=is_kept)
                again = partial(self._run_again, batch, part, leg.rows)
                await self.checks.check(batch.encoding, stage, (left, b""), again)
            except Disputed:
                raise
            except ShoalError as error:
                self.repairs += 1
                await trouble.meet(lane, stage, error)
                continue
            trouble.passed(stage)
            legs.append(leg)
            rows, border = left, stage.span.end
        return legs, bytes(rows)

    async def _back(self, batch: Batch, part: Part, gradients: Values) -> tuple[bytes, Found]:
        """A micro-batch's way back; parts whose server is lost are run again elsewhere."""
        trouble, found = Trouble(self._host), Found()
        left = list(part.legs)
        while left:
            leg = left.pop()
            try:
                entered, tensors = await self._undo(batch, part, leg, gradients)
                again = partial(self._undo_again, batch, part, leg.rows, gradients)
                await self.checks.check(batch.encoding, leg.stage, (entered, tensors), again)
            except Disputed:
                raise
            except ShoalError as error:
                self.repairs += 1
                lane = Lane(self._host, (leg.stage,), Wanted(encoding=batch.encoding))
                await trouble.meet(lane, leg.stage, error)
                lane = await trouble.lane_from(lane, leg.stage.span.start, leg.stage.span.end)
                if len(lane.stages) == 1:
                    left.append(Leg(stage=lane.stages[0], rows=leg.rows))
                else:
                    legs, _ = await self._out(
                        batch, part, leg.stage.span, leg.rows, lane, is_kept=True
                    )
                    left += legs
                continue
            trouble.passed(leg.stage)
            gradients = entered
            found += self._by_block(batch, leg.stage.span, tensors)
        return bytes(gradients), found

    def _by_block(self, batch: Batch, span: Span, tensors: bytes) -> Found:
        found = Found()
        if batch.trained is None:
            return found
        spec, at = batch.trained.spec.within(span), 0
        for block in spec.blocks:
            count = block.num_values(self._host.config.hidden_size, spec.rank)
            end = at + FLOAT32_BYTES * count
            found.append((block.index, tensors[at:end]))
            at = end
        return found

    async def _run(self, batch: Batch, part: Part, leg: Leg, *, is_kept: bool) -> bytes:
        """One server's part forward."""
        link = self._link(leg.stage.peer)

        async def ask(micro: Micro) -> bytes:
            leg.number = link.next_pass()
            return await link.forward(leg.number, micro, leg.rows, is_kept=is_kept)

        rows = await self._with_tensors(batch, part, leg.stage, link, ask)
        leg.generation, leg.is_kept = link.generation, is_kept
        self.sent_bytes += memoryview(leg.rows).nbytes
        self._check(leg.stage.peer, batch.encoding, rows)
        return rows

    async def _undo(
        self, batch: Batch, part: Part, leg: Leg, gradients: Values
    ) -> tuple[bytes, bytes]:
        """One server's part back: from what it kept, or with the rows that entered it."""
        link = self._link(leg.stage.peer)
        tensors_bytes, trained = 0, batch.trained
        if trained is not None:
            spec, size = trained.spec.within(leg.stage.span), self._host.config.hidden_size
            values = sum(block.num_values(size, spec.rank) for block in spec.blocks)
            tensors_bytes = FLOAT32_BYTES * values
        if not leg.is_kept or leg.generation != link.generation:
            leg.number, leg.is_kept = link.next_pass(), False

        async def ask(micro: Micro) -> tuple[bytes, bytes]:
            if leg.is_kept:
                leg.is_kept = False
                try:
                    return await link.backward(leg.number, micro, gradients, None, tensors_bytes)
                except SessionLost:
                    logger.debug("pass not kept peer=%s", short(link.peer))
            return await link.backward(leg.number, micro, gradients, leg.rows, tensors_bytes)

        found = await self._with_tensors(batch, part, leg.stage, link, ask)
        self.sent_bytes += memoryview(gradients).nbytes
        self._check(leg.stage.peer, batch.encoding, found[0])
        self._check(leg.stage.peer, "float32", found[1])
        return found

    async def _run_again(
        self, batch: Batch, part: Part, rows: Values, stage: Stage
    ) -> tuple[bytes, bytes]:
        return await self._run(batch, part, Leg(stage=stage, rows=rows), is_kept=False), b""

    async def _undo_again(
        self, batch: Batch, part: Part, rows: Values, gradients: Values, stage: Stage
    ) -> tuple[bytes, bytes]:
        return await self._undo(batch, part, Leg(stage=stage, rows=rows), gradients)

    async def _with_tensors(
        self,
        batch: Batch,
        part: Part,
        stage: Stage,
        link: TrainingLink,
        ask: Callable[[Micro], Awaitable[T]],
    ) -> T:
        """What `ask` gives once the server has the trained tensors; they are sent as needed."""
        tensors = _within(batch.trained, stage.span, self._host.config.hidden_size)
        name = b"" if tensors is None else _name(tensors)
        micro = _micro(batch, part, stage.span, name)
        for is_last in (False, True):
            if tensors is not None:
                await link.put(name, tensors)
            try:
                return await ask(micro)
            except AdapterMissing:
                link.unknown(name)
                if is_last:
                    raise
        raise AssertionError("unreachable")

    def _check(self, peer: PeerId, encoding: str, rows: bytes) -> None:
        if not is_finite(encoding, rows):
            raise PeerMisbehaved(f"peer {short(peer)} sent values that are not finite")

    def _link(self, peer: PeerId) -> TrainingLink:
        if peer not in self._links:
            self._links[peer] = TrainingLink(peer, self._host.dial)
        return self._links[peer]


def _within(trained: TrainedTensors | None, span: Span, hidden_size: int) -> TrainedTensors | None:
    """The tensors in the blocks of `span`; None: there are none."""
    if trained is None:
        return None
    parts = trained.spec.parts(trained.values, hidden_size)
    chosen = [values for block, values in parts if block.index in span]
    spec = trained.spec.within(span)
    return TrainedTensors(spec=spec, values=b"".join(chosen)) if chosen else None


def _name(tensors: TrainedTensors) -> bytes:
    """What the tensors are called at servers: the same for the same."""
    digest = hashlib.blake2b(repr(tensors.spec).encode(), digest_size=16, person=b"shoal-trained")
    digest.update(tensors.values)
    return digest.digest()


def _micro(batch: Batch, part: Part, span: Span, name: bytes) -> Micro:
    key = batch.key
    return Micro(
        span.start,
        span.end,
        list(part.lengths),
        batch.encoding,
        name,
        None if key is None else Drawn(key.seed, key.step, part.first),
    )


def _check_gradients(encoding: str, gradients: Values) -> None:
    if not is_finite(encoding, gradients):
        raise BadInput("gradients hold values that are not finite: scale the loss down")


def _add_nothing(_block: int, _tensors: bytes) -> None:
    """For passes without a way back."""


async def _all(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run works side by side; the first failure ends the others and is raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
