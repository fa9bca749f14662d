"""Training steps in a swarm whose servers fail: every gradient must still be right.

The servers, links and faults are those of a chaos plan (`chaos.draw_plan`); in place of its
users, clients train, one of them beside an answer that must not change either.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from shoal.base.adapters import AdapterConfig, DropoutKey, LoraShape
from shoal.base.spans import Span
from shoal.base.training import BlockTensors, Draw, PassWork, TrainedSpec, TrainedTensors
from shoal.client.client import Client
from shoal.client.training import TrainConfig, TrainingClient
from shoal.client.training_batch import Batch, Part, Trail
from shoal.lab.chaos import LIMIT_S, ChaosPlan, first_error
from shoal.lab.clock import run_virtual
from shoal.lab.faults import Fault, Injector
from shoal.lab.network import SimulatedNetwork
from shoal.lab.script import Reference, ScriptRunner
from shoal.lab.swarm import SimulatedSwarm
from shoal.lab.toy_blocks import HIDDEN_SIZE, TOY_LAYER, finite_row
from shoal.lab.training import toy_pass
from shoal.wire.tensors import row_bytes

STEPS: Final = 6
"""Of each client."""

SETTLE_S: Final = 620.0
"""After the last step: longer than every deadline, that of streams whose end was lost included."""

RANK: Final = 2


class WrongGradient(AssertionError):
    """What came back is not what one machine gives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """What a run that went well did."""

    steps: int
    micro_batches: int
    repairs: int
    virtual_s: float


@dataclass(slots=True)
class Sums:
    """Gradients of tensors as they came, to be compared in any order."""

    found: Counter[tuple[int, bytes]] = field(default_factory=Counter)

    def add(self, block: int, gradients: bytes) -> None:
        """One micro-batch's, of one block."""
        self.found[(block, gradients)] += 1


def draw_batch(rng: random.Random, span: Span, step: int) -> Batch:
    """A batch of toy rows with tensors in some of the blocks."""
    lengths = tuple(rng.randint(2, 6) for _ in range(rng.randint(1, 8)))
    size = row_bytes("float32", HIDDEN_SIZE) * sum(lengths)
    shape = LoraShape(target=TOY_LAYER, inputs=HIDDEN_SIZE, outputs=HIDDEN_SIZE)
    blocks = tuple(
        BlockTensors(index=index, prompt_tokens=rng.randint(0, 2), lora=(shape,))
        for index in range(span.start, span.end)
        if rng.random() < 0.7
    )
    trained = None
    if blocks:
        config = AdapterConfig(rank=RANK, alpha=1.0, targets=(TOY_LAYER,), dropout=0.1)
        spec = TrainedSpec(config=config, encoding="float32", blocks=blocks)
        values = finite_row(rng.randbytes(16), spec.num_bytes(HIDDEN_SIZE))
        trained = TrainedTensors(spec=spec, values=values)
    return Batch(
        span=span,
        lengths=lengths,
        rows=finite_row(rng.randbytes(16), size),
        encoding="float32",
        trained=trained,
        key=DropoutKey(seed=1, step=step),
    )


async def check_step(training: TrainingClient, batch: Batch, rng: random.Random) -> Trail:
    """One step, forward and back, compared with one machine.

    Raises:
        WrongGradient: what differs.
    """
    trail = await training.forward(batch, is_kept=True)
    gradients = finite_row(rng.randbytes(16), memoryview(batch.rows).nbytes)
    sums = Sums()
    found = await training.backward(trail, gradients, sums.add)
    _compare(batch, trail.parts, gradients, found, sums)
    return trail


async def check_whole_step(training: TrainingClient, batch: Batch, rng: random.Random) -> int:
    """The same where each micro-batch turns round as soon as it can; how many there were.

    Raises:
        WrongGradient: what differs.
    """
    gradients = finite_row(rng.randbytes(16), memoryview(batch.rows).nbytes)
    step, sums, left = row_bytes("float32", HIDDEN_SIZE), Sums(), dict[int, bytes]()

    async def ending(chosen: range, output: bytes) -> bytes:
        left[chosen.start] = output
        await asyncio.sleep(rng.uniform(0, 0.1))
        return gradients[step * chosen.start : step * chosen.stop]

    found = await training.step(batch, ending, sums.add)
    parts = training.cut(batch)
    for part in parts:
        part.output = left[part.first_row]
    _compare(batch, parts, gradients, found, sums)
    return len(parts)


def _compare(
    batch: Batch, parts: Sequence[Part], gradients: bytes, found: bytes, sums: Sums
) -> None:
    truth, back, at = Sums(), b"", 0
    for part in parts:
        key = batch.key
        work = PassWork(
            span=batch.span,
            lengths=part.lengths,
            rows=part.rows,
            encoding=batch.encoding,
            trained=batch.trained,
            draw=None if key is None else Draw(key=key, first_sequence=part.first),
        )
        end = at + memoryview(part.rows).nbytes
        expected = toy_pass(work, gradients[at:end])
        if part.output != expected.rows:
            raise WrongGradient(f"rows of sequences {part.first} on")
        back, at = back + expected.row_gradients, end
        _split(batch, expected.tensor_gradients, truth)
    if found != back:
        raise WrongGradient("gradients of rows")
    if sums.found != truth.found:
        raise WrongGradient("gradients of tensors")


def _split(batch: Batch, tensors: bytes, sums: Sums) -> None:
    spec, at = None if batch.trained is None else batch.trained.spec, 0
    for block in () if spec is None else spec.blocks:
        end = at + 4 * block.num_values(HIDDEN_SIZE, 0 if spec is None else spec.rank)
        sums.add(block.index, tensors[at:end])
        at = end


def run_training(plan: ChaosPlan, *, steps: int = STEPS) -> TrainingResult:
    """Play a plan's faults while two clients train.

    Raises:
        WrongGradient, ShoalError, Deadlock, VirtualTimeout: what went wrong.
    """
    return run_virtual(lambda: _Run(plan, steps).run(), timeout_s=10 * LIMIT_S)


class _Run:
    def __init__(self, plan: ChaosPlan, steps: int) -> None:
        self._plan = plan
        self._steps = steps
        self._rng = random.Random(plan.seed + 2)
        self._network = SimulatedNetwork(self._rng, default=plan.link, break_after_s=5.0)
        self._swarm = SimulatedSwarm(
            plan.servers, self._network, self._rng, num_blocks=plan.num_blocks,
            mixes_call_shape=True,
        )  # fmt: skip
        self._clients: list[Client] = []
        self._injector = Injector(self._swarm, self._network, self._clients, self._rng)
        self._micro_batches = 0
        self._repairs = 0

    async def run(self) -> TrainingResult:
        loop = asyncio.get_running_loop()
        async with self._swarm:
            self._clients += [await self._swarm.open_client(patience_s=LIMIT_S) for _ in range(2)]
            faults = [asyncio.ensure_future(self._inject(fault)) for fault in self._plan.faults]
            try:
                async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
                    for number, client in enumerate(self._clients):
                        group.create_task(self._train(client, number))
                    group.create_task(self._answer(self._clients[0]))
            except* Exception as errors:
                raise first_error(errors) from errors
            finally:
                finished_s = loop.time()
                for task in faults:
                    task.cancel()
                await asyncio.gather(*faults, return_exceptions=True)
            self._network.heal()
            await asyncio.sleep(SETTLE_S)
            self._check_nothing_left()
        return TrainingResult(
            steps=self._steps * len(self._clients),
            micro_batches=self._micro_batches,
            repairs=self._repairs,
            virtual_s=finished_s,
        )

    async def _train(self, client: Client, number: int) -> None:
        rng = random.Random(self._plan.seed * 2 + number)
        training = TrainingClient(client, TrainConfig(micro_tokens=rng.choice((4, 9, None))))
        for step in range(self._steps):
            blocks = sorted(rng.sample(range(self._plan.num_blocks + 1), 2))
            span = Span(*blocks) if rng.random() < 0.5 else Span(0, self._plan.num_blocks)
            batch = draw_batch(rng, span, step)
            if rng.random() < 0.5:
                self._micro_batches += await check_whole_step(training, batch, rng)
            else:
                self._micro_batches += len((await check_step(training, batch, rng)).parts)
            await asyncio.sleep(rng.uniform(0, 1.0))
        self._repairs += training.repairs
        await training.close()

    async def _answer(self, client: Client) -> None:
        user = self._plan.users[0]
        reference = Reference(self._plan.num_blocks, mixes_call_shape=True)
        runner = ScriptRunner(client, user.script, random.Random(user.seed), reference)
        await runner.run()
        if runner.session is not None:
            runner.session.close()

    async def _inject(self, fault: Fault) -> None:
        await asyncio.sleep(fault.at_s)
        undo = await self._injector.begin(fault)
        await asyncio.sleep(fault.lasts_s)
        await undo()

    def _check_nothing_left(self) -> None:
        """Streams are over: servers hold nothing of anybody."""
        for server in self._swarm.servers:
            if server.server is None or server.backend is None:
                continue
            training = server.server.training
            left = (training.num_clients, len(training.kept), server.backend.training.num_open)
            if any(left) or training.queue.is_waiting:
                raise AssertionError(f"{server.spec.name} holds training work: {left}")
