"""Training passes on torch: gradients, what is kept, and that inference stays what it was."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from shoal.base.backend import BlockBackend
from shoal.base.errors import AdapterBad, BadInput, BadOutput, InternalError
from shoal.base.spans import Span
from shoal.base.training import BlockTrainer, PassWork
from shoal.model.onednn_linear import OneDnnLinear
from shoal.model.quantize import Quantization
from shoal.model.quantized_linear import Int4Linear, Int8Linear
from shoal.model.rows import tensor_bytes
from shoal.model.torch_backend import BackendConfig, EngineChoice, load_backend
from tests.contracts.backend_cases import Bench, Subject
from tests.models import NUM_BLOCKS, tiny_model, tiny_source
from tests.training_cases import (
    check_equal,
    make_tensors,
    run_chain,
    run_pass,
    seeded_rows,
    whole_result,
)

LENGTHS = (9, 9, 4)
SPAN = Span(0, NUM_BLOCKS)


def backend_of(
    engine: EngineChoice = "batched", dtype: str = "float32", quantize: Quantization = "none"
) -> BlockBackend:
    config = BackendConfig(
        model="tiny", engine=engine, dtype=dtype, exact="never", quantize=quantize
    )
    return load_backend(tiny_source("llama"), SPAN, config)


def trainer_of(backend: BlockBackend) -> BlockTrainer:
    trainer = backend.trainer()
    assert trainer is not None
    return trainer


@pytest.mark.parametrize("engine", ["batched", "per-session"])
def test_gradients_kept_or_computed_again_are_the_same_bits(engine: EngineChoice) -> None:
    whole = tiny_model("llama")
    rows, gradients = seeded_rows(whole, LENGTHS)
    tensors = make_tensors(whole, (0, 2, 5))
    truth = whole_result(whole, rows, LENGTHS, gradients, tensors)
    backend = backend_of(engine)
    chain = [(SPAN, trainer_of(backend))]
    found = [
        run_chain(chain, rows, LENGTHS, gradients, tensors, held_bytes_max=limit)
        for limit in (0, 20_000, 1 << 30)
    ]
    check_equal(found[0], truth)
    for other in found[1:]:
        assert torch.equal(found[0].row_gradients, other.row_gradients)
        assert all(map(torch.equal, found[0].gradients, other.gradients))
    asyncio.run(backend.aclose())


def test_inference_gives_the_same_bits_after_training() -> None:
    backend = backend_of()
    subject = Subject(name="x", make=lambda: backend, is_bit_exact=False, num_examples=1)
    bench = Bench(subject)
    rows = bench.rows(5)
    before = bench.run_raw([bench.call(bench.open(SPAN), rows)])
    whole = tiny_model("llama")
    given, gradients = seeded_rows(whole, LENGTHS)
    run_chain([(SPAN, trainer_of(backend))], given, LENGTHS, gradients, make_tensors(whole, (1,)))
    assert bench.run_raw([bench.call(bench.open(SPAN), rows)]) == before
    bench.close()


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_bfloat16_and_quantised_weights_come_close(quantize: Quantization) -> None:
    whole = tiny_model("llama")
    rows, gradients = seeded_rows(whole, LENGTHS)
    tensors = make_tensors(whole, (0, 3))
    truth = whole_result(whole, rows, LENGTHS, gradients, tensors)
    backend = backend_of(dtype="bfloat16", quantize=quantize)
    found = run_chain(
        [(SPAN, trainer_of(backend))], rows, LENGTHS, gradients, tensors, encoding="bfloat16"
    )
    for mine, other in (
        (found.rows, truth.rows),
        (found.row_gradients, truth.row_gradients),
        *zip(found.gradients, truth.gradients, strict=True),
    ):
        flat, there = mine.float().flatten(), other.flatten()
        assert float(torch.nn.functional.cosine_similarity(flat, there, dim=0)) > 0.98
    asyncio.run(backend.aclose())


@pytest.mark.parametrize("make", [OneDnnLinear, Int8Linear, Int4Linear])
def test_frozen_products_have_the_gradient_of_their_weights(
    make: Callable[[torch.nn.Linear], torch.nn.Module],
) -> None:
    torch.manual_seed(2)
    linear = torch.nn.Linear(96, 160)
    layer = make(linear)
    weight = linear.weight if make is OneDnnLinear else layer.dequantized()  # type: ignore[operator]
    rows = torch.randn(2, 5, 96, requires_grad=True)
    gradient = torch.randn(2, 5, 160)
    expected = (gradient @ weight).detach()
    (found,) = torch.autograd.grad(layer(rows), rows, gradient)
    tolerance = 1e-5 if make is OneDnnLinear else 2e-2
    torch.testing.assert_close(
        found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )
    if isinstance(layer, OneDnnLinear):
        assert layer.keep_transposed() == 4 * 96 * 160
        assert layer.keep_transposed() == 0
        (again,) = torch.autograd.grad(layer(rows), rows, gradient)
        torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)


def test_what_is_held_is_counted_and_given_back() -> None:
    backend = backend_of()
    trainer = trainer_of(backend)
    whole = tiny_model("llama")
    rows, _ = seeded_rows(whole, LENGTHS)
    work = PassWork(span=SPAN, lengths=LENGTHS, rows=bytes(tensor_bytes(rows)), encoding="float32")

    async def story() -> None:
        held: list[int] = []
        for limit in (0, 1 << 30):
            one = trainer.begin(work, is_for_backward=True, held_bytes_max=limit)
            while one.steps_left:
                await one.step()
            held.append(one.held_bytes)
            one.close()
            one.close()
            assert not one.held_bytes
        assert held[0] == len(SPAN) * rows.nbytes
        assert held[1] > 10 * held[0]
        one = trainer.begin(work, is_for_backward=False, held_bytes_max=0)
        while one.steps_left:
            await one.step()
        assert not one.held_bytes
        with pytest.raises(InternalError):
            one.turn(work.rows)
        with pytest.raises(InternalError):
            await one.step()

    asyncio.run(story())
    asyncio.run(backend.aclose())


def test_trained_tensors_count_as_held_and_are_read_when_their_block_runs() -> None:
    backend = backend_of()
    trainer = trainer_of(backend)
    whole = tiny_model("llama")
    rows, gradients = seeded_rows(whole, LENGTHS)
    plain = PassWork(span=SPAN, lengths=LENGTHS, rows=bytes(tensor_bytes(rows)), encoding="float32")
    trained = make_tensors(whole, (0, 5)).within(SPAN)
    least = trainer.least_bytes(plain)

    async def held(work: PassWork, limit: int = 1 << 30) -> int:
        one = trainer.begin(work, is_for_backward=True, held_bytes_max=limit)
        while one.steps_left:
            await one.step()
        count = one.held_bytes
        one.output()
        one.turn(bytes(tensor_bytes(gradients)))
        while one.steps_left:
            await one.step()
        assert not one.held_bytes  # blocks that are undone hold nothing
        return count

    async def story() -> None:
        for limit in (least, least + 20_000, least + 300_000):  # measured under way
            assert least <= await held(plain, limit) <= limit
        alone = await held(plain)
        work = replace(plain, trained=trained)
        both = await held(work)
        assert both >= alone + len(trained.values)
        assert both == await held(work)
        one = trainer.begin(work, is_for_backward=True, held_bytes_max=1 << 30)
        for _ in range(3):
            await one.step()
        most = one.narrow()
        while one.steps_left:
            await one.step()
        assert least < one.held_bytes <= most < both
        one.close()
        for limit in (least, least + 20_000, both - 1):
            assert await held(work, limit) <= limit
        values = bytearray(trained.values)
        values[-4:] = b"\xff" * 4
        bad = replace(work, trained=replace(trained, values=bytes(values)))
        one = trainer.begin(bad, is_for_backward=True, held_bytes_max=0)
        for _ in range(5):
            await one.step()
        with pytest.raises(AdapterBad, match="block 5"):
            await one.step()

    asyncio.run(story())
    asyncio.run(backend.aclose())


def test_what_cannot_be_is_refused() -> None:
    backend = backend_of()
    trainer = trainer_of(backend)
    whole = tiny_model("llama")
    rows, _ = seeded_rows(whole, LENGTHS)
    values = bytes(tensor_bytes(rows))
    good = PassWork(span=SPAN, lengths=LENGTHS, rows=values, encoding="float32")
    tensors = make_tensors(whole, (0,)).within(SPAN)
    long = make_tensors(whole, (0,), prompt_tokens=5).within(SPAN)
    nan = bytes(tensor_bytes(rows * float("nan")))
    huge = b"\xff\xff\x7f\x7e" * (len(tensors.values) // 4)
    cases: list[tuple[PassWork, type[Exception], str]] = [
        (replace(good, span=Span(3, 99)), BadInput, "not a part"),
        (replace(good, lengths=()), BadInput, "at least 1"),
        (replace(good, lengths=(5000,)), BadInput, "ends at"),
        (replace(good, lengths=(9, 9, 5)), BadInput, "bytes"),
        (replace(good, encoding="float8"), BadInput, "encoding"),
        (replace(good, rows=nan), BadInput, "not finite"),
        (replace(good, trained=replace(tensors, values=b"")), BadInput, "trained tensors"),
        (replace(good, trained=replace(tensors, values=b"\xff" * len(tensors.values))),
         AdapterBad, "not finite"),
        (replace(good, trained=long), BadInput, "in front"),
        (replace(good, trained=replace(tensors, values=huge)), BadOutput, "not finite"),
    ]  # fmt: skip

    for work, kind, text in cases:
        with pytest.raises(kind, match=text):
            asyncio.run(run_pass(trainer, work, None))
    output, _ = asyncio.run(run_pass(trainer, good, None))
    assert len(output) == len(values)
    with pytest.raises(BadInput, match="not finite"):
        asyncio.run(run_pass(trainer, good, nan))
    asyncio.run(backend.aclose())
