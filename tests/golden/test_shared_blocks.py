"""A backend that is loaded beside another one takes over the blocks that both have."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
import torch

from shoal.base.adapters import AdapterId, AdapterPart
from shoal.base.backend import Call, SequenceId
from shoal.base.spans import Span
from shoal.base.training import PassWork
from shoal.model import onednn_linear
from shoal.model.rows import tensor_bytes
from shoal.model.torch_backend import BackendConfig, load_backend
from shoal.server.switching import SwitchingBackend
from tests.golden.test_adapters_exact import random_adapter
from tests.models import tiny_model, tiny_source
from tests.training_cases import make_tensors, run_pass

ONE = SequenceId(1)
ENGINES = ("batched", "per-session")


class Counting:
    """A source that knows what was read of it."""

    def __init__(self, family: str) -> None:
        self._source = tiny_source(family)
        self.reads: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, name: str) -> torch.Tensor:
        self.reads[name] += 1
        return self._source.read(name)

    def blocks_read(self) -> set[int]:
        return {int(name.split(".")[2]) for name in self.reads if ".layers." in name}


def config_of(engine: str, **more: Any) -> BackendConfig:
    return BackendConfig(model="m", engine=engine, exact="always", **more)  # type: ignore[arg-type]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def call_of(
    sequence: SequenceId, span: Span, values: torch.Tensor, position: int, count: int
) -> Call:
    return Call(
        sequence=sequence, span=span, position=position, count=count, call_count=count,
        payload=values[position : position + count].numpy().tobytes(), encoding="float32",
        output_encoding="float32", rows_wanted=count,
    )  # fmt: skip


async def rows_of(
    backend: Any, span: Span, sequence: SequenceId = ONE, adapter: AdapterId | None = None
) -> list[bytes]:
    """A prompt and two tokens through a part of the blocks."""
    values = torch.randn(9, backend.facts.hidden_size, generator=seeded(3))
    backend.open(sequence, span, adapter)
    results, position = [], 0
    for count in (7, 1, 1):
        call = call_of(sequence, span, values, position, count)
        (outcome,) = await backend.run([call])
        assert isinstance(outcome, bytes), outcome
        results.append(outcome)
        position += count
    backend.close(sequence)
    return results


async def load(backend: Any, adapter: AdapterId, seed: int) -> None:
    part = random_adapter("llama", seed, 4)
    within = {one.index for one in part.manifest.within(backend.facts.span)}
    blocks = {index: data for index, data in part.blocks.items() if index in within}
    await backend.load_adapter(adapter, AdapterPart(manifest=part.manifest, blocks=blocks))


async def gradients_of(backend: Any, span: Span) -> tuple[bytes, Any]:
    """A training pass there and back, with LoRA of its own."""
    rows = torch.randn(9, backend.facts.hidden_size, generator=torch.Generator().manual_seed(4))
    values = bytes(tensor_bytes(rows))
    work = PassWork(
        span=span, lengths=(5, 4), rows=values, encoding="float32",
        trained=make_tensors(tiny_model("llama"), range(span.start, span.end)).within(span),
    )  # fmt: skip
    return await run_pass(backend.trainer(), work, values)


@pytest.mark.parametrize("engine", ENGINES)
def test_adapters_and_training_of_one_are_nothing_to_the_other(engine: str) -> None:
    """Both run the same layers: what one adds to them in its passes is not in the other's."""

    async def work() -> None:
        source, config, span = tiny_source("llama"), config_of(engine), Span(1, 3)
        first, second, third = AdapterId(1), AdapterId(2), AdapterId(3)
        alone: Any = load_backend(source, span, config)
        for adapter, seed in ((first, 1), (second, 2), (third, 3)):
            await load(alone, adapter, seed)
        plain = await rows_of(alone, span)
        tuned = {one: await rows_of(alone, span, adapter=one) for one in (first, second, third)}
        trained = await gradients_of(alone, span)

        small: Any = load_backend(source, span, config)
        await load(small, first, 1)
        assert await gradients_of(small, span) == trained
        large: Any = load_backend(source, Span(0, 4), config, beside=small)
        await load(large, second, 2)
        for _ in range(2):
            assert await rows_of(small, span, adapter=first) == tuned[first]
            assert await rows_of(large, span, adapter=second) == tuned[second]
            assert await rows_of(small, span) == await rows_of(large, span) == plain
            assert await gradients_of(large, span) == await gradients_of(small, span) == trained
        await small.aclose()
        await load(large, third, 3)
        for adapter in (second, third):
            assert await rows_of(large, span, adapter=adapter) == tuned[adapter]
        assert await rows_of(large, span) == plain
        assert await gradients_of(large, span) == trained
        for backend in (large, alone):
            await backend.aclose()

    asyncio.run(work())


def test_weights_that_are_held_for_training_are_counted_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever takes blocks over takes their transposed weights over, and counts them."""
    monkeypatch.setattr(onednn_linear, "_VALUES_MIN", 1)

    async def work() -> None:
        source, config, span = tiny_source("llama"), config_of("batched"), Span(1, 3)
        small: Any = load_backend(source, span, config)
        rows = torch.randn(4, small.facts.hidden_size, generator=torch.Generator().manual_seed(4))
        values = bytes(tensor_bytes(rows))
        pass_work = PassWork(span=span, lengths=(4,), rows=values, encoding="float32")
        await run_pass(small.trainer(), pass_work, values)
        held = small.trainer().transposed_bytes
        large: Any = load_backend(source, Span(0, 4), config, beside=small)
        await run_pass(large.trainer(), pass_work, values)
        assert large.trainer().transposed_bytes == held > 0
        for backend in (small, large):
            await backend.aclose()

    asyncio.run(work())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_span_that_grows_reads_its_new_blocks_only(family: str, engine: str) -> None:
    async def work() -> None:
        source, config = Counting(family), config_of(engine)
        small: Any = load_backend(source, Span(1, 3), config)
        before = await rows_of(small, Span(1, 3))
        source.reads.clear()
        large: Any = load_backend(source, Span(0, 4), config, beside=small)
        assert source.blocks_read() == {0, 3}
        for block in (1, 2):  # the very same weights
            assert large.loaded.model.block(block) is small.loaded.model.block(block)
        alone = load_backend(source, Span(0, 4), config)
        assert large.facts == alone.facts
        assert await rows_of(small, Span(1, 3)) == before
        assert await rows_of(large, Span(1, 3)) == before
        await small.aclose()
        assert await rows_of(large, Span(0, 4)) == await rows_of(alone, Span(0, 4))
        source.reads.clear()
        less = load_backend(source, Span(2, 4), config, beside=large)
        await large.aclose()
        assert not source.reads
        assert await rows_of(less, Span(2, 4)) == await rows_of(alone, Span(2, 4))
        for backend in (less, alone):
            await backend.aclose()

    asyncio.run(work())


@pytest.mark.parametrize("engine", ENGINES)
def test_sequences_go_on_while_a_server_grows_and_after(engine: str) -> None:
    """As a ring's node grows: those that run stay with the old blocks, others get the new."""

    async def work() -> None:
        source, config, span = tiny_source("llama"), config_of(engine), Span(1, 3)
        alone = load_backend(source, Span(0, 4), config)
        wanted = {one: await rows_of(alone, one) for one in (span, Span(0, 4))}
        server = SwitchingBackend(load_backend(source, span, config))
        values = torch.randn(9, server.facts.hidden_size, generator=seeded(3))
        server.open(ONE, span)
        found, position = [], 0
        for count in (7, 1, 1):
            (outcome,) = await server.run([call_of(ONE, span, values, position, count)])
            found.append(outcome)
            position += count
            if count == 7:
                grown = await asyncio.to_thread(
                    load_backend, source, Span(0, 4), config, None, server.newest
                )
                server.add(grown)
            for one in (span, Span(0, 4)):
                assert await rows_of(server, one, SequenceId(2)) == wanted[one]
        assert found == wanted[span]
        server.close(ONE)
        await server.drop_old()
        assert await rows_of(server, Span(0, 4)) == wanted[Span(0, 4)]
        await server.aclose()
        await alone.aclose()

    asyncio.run(work())


def test_what_was_loaded_otherwise_is_not_shared() -> None:
    async def work() -> None:
        source = Counting("llama")
        small = load_backend(source, Span(1, 3), config_of("batched"))
        for other in (config_of("per-session"), config_of("batched", dtype="bfloat16")):
            source.reads.clear()
            backend = load_backend(source, Span(0, 3), other, beside=small)
            assert source.blocks_read() == {0, 1, 2}
            await backend.aclose()
        await small.aclose()

    asyncio.run(work())


def test_experts_are_not_shared() -> None:
    """They know the pass under way, which the other engine's is not."""

    async def work() -> None:
        source = Counting("mixtral")
        small: Any = load_backend(source, Span(1, 3), config_of("batched"))
        source.reads.clear()
        large: Any = load_backend(source, Span(1, 4), config_of("batched"), beside=small)
        assert large.loaded.model.block(1) is not small.loaded.model.block(1)
        await small.aclose()
        await large.aclose()

    asyncio.run(work())
