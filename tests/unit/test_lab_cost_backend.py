"""The cost-model backend: its passes take what the speeds say, its answers prove positions."""

from __future__ import annotations

import asyncio

import pytest

from shoal.base.backend import Call, SequenceId
from shoal.base.errors import BadInput, ConfigError, InternalError
from shoal.base.spans import Span
from shoal.lab.clock import run_virtual
from shoal.lab.cost_backend import (
    CostBackend,
    CostConfig,
    CostSequence,
    number_of,
    pass_s,
    prompt_number,
    row_of,
)
from shoal.plan.spec import DecodeTimes, ServerSpec

SPEC = ServerSpec(
    name="s",
    memory_bytes=0,
    decode=DecodeTimes(points=((1, 0.010), (3, 0.014))),
    prefill_s_per_block=0.1,
    prefill_s_per_block_token=0.001,
)


def call(sequence: int, count: int, span: Span, position: int = 0) -> Call:
    rows = b"".join(row_of(prompt_number(token), 16) for token in range(count))
    return Call(
        sequence=SequenceId(sequence), span=span, position=position, count=count,
        call_count=count, payload=rows, encoding="bfloat16", output_encoding="bfloat16",
        rows_wanted=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("calls", "seconds"),
    [
        ([], 0.0),
        ([call(1, 1, Span(0, 4))], 4 * 0.010),
        ([call(1, 1, Span(0, 4)), call(2, 1, Span(2, 4))], 2 * 0.010 + 2 * 0.012),
        ([call(1, 1, Span(0, 2)), call(2, 1, Span(3, 4))], 3 * 0.010),
        ([call(1, 20, Span(0, 4))], 4 * 0.12),
        ([call(1, 1, Span(0, 4)), call(1, 1, Span(0, 4), 1)], 4 * 0.102),
        ([call(1, 20, Span(0, 4)), call(2, 1, Span(0, 4))], 4 * 0.13),
    ],
)
def test_a_pass_takes_what_its_rows_take(calls: list[Call], seconds: float) -> None:
    assert pass_s(SPEC, calls) == pytest.approx(seconds)


def test_a_run_takes_its_time_on_the_running_clock() -> None:
    async def story() -> float:
        backend = CostBackend(CostConfig(server=SPEC, span=Span(0, 4), num_blocks=4))
        backend.open(SequenceId(1), Span(0, 4))
        backend.slowness = 2.0
        run = asyncio.ensure_future(backend.run([call(1, 1, Span(0, 4))]))
        await asyncio.sleep(0)
        with pytest.raises(InternalError, match="in progress"):
            backend.open(SequenceId(2), Span(0, 4))
        await run
        assert backend.held_tokens == 1
        assert backend.busy_s == pytest.approx(0.08)
        return asyncio.get_running_loop().time()

    assert run_virtual(story) == pytest.approx(0.08)


@pytest.mark.parametrize("encoding", ["bfloat16", "float32"])
def test_every_encoding_carries_a_number_without_loss(encoding: str) -> None:
    for number in (0, 1, 255, (1 << 61) - 2, (1 << 64) - 1):
        assert number_of(row_of(number, 9, encoding), encoding) == number
    with pytest.raises(BadInput, match="float16"):
        row_of(1, 16, "float16")


def test_an_answer_depends_on_every_row_before_and_its_order() -> None:
    def last(numbers: list[int], start: int = 0) -> int:
        sequence = CostSequence(Span(start, start + 3))
        return [sequence.push(number) for number in numbers][-1]

    right = last([5, 6, 7])
    assert last([6, 5, 7]) != right
    assert last([6, 7]) != right
    assert last([5, 6, 6, 7]) != right
    assert last([5, 6, 7], 1) != right


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="of a model with 3"):
        CostConfig(server=SPEC, span=Span(0, 4), num_blocks=3)
    with pytest.raises(ConfigError, match="need 8 values"):
        CostConfig(server=SPEC, span=Span(0, 4), num_blocks=4, hidden_size=4)
    backend = CostBackend(CostConfig(server=SPEC, span=Span(0, 4), num_blocks=4))
    with pytest.raises(InternalError, match="not open"):
        backend.truncate(SequenceId(1), 0)
    with pytest.raises(InternalError, match="can't open"):
        backend.open(SequenceId(1), Span(0, 5))
