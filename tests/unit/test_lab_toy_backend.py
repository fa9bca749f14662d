"""Toy blocks are pure, sensitive to everything, and fail on demand."""

from __future__ import annotations

import asyncio
import math
import random
import struct
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.backend import Call, SequenceId
from shoal.base.errors import BadInput, ConfigError, InternalError
from shoal.base.spans import Span
from shoal.lab.clock import run_virtual
from shoal.lab.toy_backend import Gate, ToyBackend, ToyConfig, ToyFault, fixed_pace
from shoal.lab.toy_blocks import (
    ToySequence,
    decode_rows,
    encode_rows,
    expected_output,
    expected_tokens,
    is_finite,
    toy_embedding,
    toy_next_token,
)

SPAN = Span(0, 4)
ROWS = [toy_embedding(token) for token in range(6)]
ONE, TWO = SequenceId(1), SequenceId(2)


def call(sequence: SequenceId, position: int, count: int = 1, call_count: int = 0) -> Call:
    return Call(
        sequence=sequence,
        span=SPAN,
        position=position,
        count=count,
        call_count=call_count or count,
        payload=b"".join(ROWS[position : position + count]),
        encoding="float32",
        output_encoding="float32",
        rows_wanted=count,
    )


def backend(**options: Any) -> ToyBackend:
    pace, fault = options.pop("pace", None), options.pop("fault", None)
    made = ToyBackend(ToyConfig(span=SPAN, num_blocks=4, **options), pace=pace, fault=fault)
    made.open(ONE, SPAN)
    made.open(TWO, SPAN)
    return made


def test_splitting_the_span_changes_nothing() -> None:
    whole = expected_output(SPAN, ROWS)
    assert expected_output(Span(3, 4), expected_output(Span(0, 3), ROWS)) == whole


@pytest.mark.parametrize(
    "inputs",
    [
        [*ROWS[:2], *ROWS[3:]],
        [*ROWS[:2], ROWS[1], *ROWS[2:]],
        [ROWS[1], ROWS[0], *ROWS[2:]],
        [bytes([ROWS[0][0] ^ 1]) + ROWS[0][1:], *ROWS[1:]],
    ],
    ids=["missing", "repeated", "swapped", "altered"],
)
def test_any_wrong_row_shows_in_the_last_output(inputs: list[bytes]) -> None:
    assert expected_output(SPAN, inputs)[-1] != expected_output(SPAN, ROWS)[-1]


@pytest.mark.parametrize("span", [Span(0, 3), Span(1, 4), Span(1, 5)], ids=str)
def test_other_blocks_give_other_outputs(span: Span) -> None:
    assert expected_output(span, ROWS)[-1] != expected_output(SPAN, ROWS)[-1]


@given(st.binary(min_size=64, max_size=64))
def test_outputs_are_finite_in_every_encoding(row: bytes) -> None:
    output = expected_output(Span(0, 1), [row])[0]
    assert is_finite(output)
    assert all(math.isfinite(value) for value in struct.unpack("<16f", output))
    halves = encode_rows(output, "bfloat16")
    assert encode_rows(decode_rows(halves, "bfloat16"), "bfloat16") == halves
    for mine, rounded in zip(
        struct.unpack("<16f", output),
        struct.unpack("<16f", decode_rows(halves, "bfloat16")),
        strict=True,
    ):
        assert abs(mine - rounded) <= abs(mine) / 64 + 1e-38


@given(st.lists(st.floats(width=32), min_size=1, max_size=8))
def test_is_finite_agrees_with_the_maths(values: list[float]) -> None:
    assert is_finite(struct.pack(f"<{len(values)}f", *values)) == all(map(math.isfinite, values))


def test_truncation_and_copies_repeat_what_was_there() -> None:
    sequence = ToySequence(SPAN)
    outputs = [sequence.push(row) for row in ROWS]
    child = sequence.copy(4)
    sequence.truncate(2)
    assert [sequence.push(row) for row in ROWS[2:]] == outputs[2:]
    assert [child.push(row) for row in ROWS[4:]] == outputs[4:]


def test_expected_tokens_are_those_of_a_plain_loop() -> None:
    tokens = [5, 6, 7]
    for _ in range(4):
        rows = expected_output(SPAN, [toy_embedding(token) for token in tokens])
        tokens.append(toy_next_token(rows[-1]))
    assert expected_tokens(4, [5, 6, 7], 4) == tokens[3:]


def test_runs_take_the_time_they_are_given() -> None:
    async def scenario() -> None:
        toy = backend(pace=fixed_pace(per_run_s=1.0, per_row_s=0.25))
        await toy.run([call(ONE, 0, 3), call(TWO, 0, 1)])
        assert asyncio.get_running_loop().time() == pytest.approx(2.0)
        assert toy.lengths == {ONE: 3, TWO: 1}

    run_virtual(scenario)


def test_a_gate_lets_single_runs_go_and_the_backend_guards_its_contract() -> None:
    async def scenario() -> None:
        gate = Gate()
        toy = backend(pace=gate)
        running = asyncio.create_task(toy.run([call(ONE, 0)]))
        calls, go = await gate.next()
        assert [each.sequence for each in calls] == [ONE]
        guarded: list[Callable[[], object]] = [
            lambda: toy.truncate(ONE, 0),
            lambda: toy.fork(ONE, SequenceId(8), 0),
            lambda: toy.open(SequenceId(9), SPAN),
            lambda: toy.close(ONE),
        ]
        for forbidden in guarded:
            with pytest.raises(InternalError, match="in progress"):
                forbidden()
        assert toy.lengths[ONE] == 0
        go.set()
        assert await running == expected_output(SPAN, ROWS[:1])

    run_virtual(scenario)


def _fails_on_two(kind: ToyFault) -> ToyBackend:
    return backend(fault=lambda each: kind if each.sequence == TWO else None)


async def _raise() -> None:
    toy = _fails_on_two("raise")
    with pytest.raises(RuntimeError, match="injected"):
        await toy.run([call(ONE, 0, 2), call(TWO, 0)])
    assert toy.truncate(ONE, 0) == 0
    assert await toy.run([call(ONE, 0)]) == expected_output(SPAN, ROWS[:1])


async def _bad_row() -> None:
    toy = _fails_on_two("bad_row")
    good, bad = await toy.run([call(ONE, 0), call(TWO, 0)])
    assert good == expected_output(SPAN, ROWS[:1])[0]
    assert isinstance(bad, BadInput)
    assert toy.lengths == {ONE: 1, TWO: 0}


async def _wrong() -> None:
    toy = _fails_on_two("wrong")
    good, bad = await toy.run([call(ONE, 0), call(TWO, 0)])
    assert good != bad
    assert len(good) == len(bad) == 64  # type: ignore[arg-type]


async def _hang() -> None:
    toy = _fails_on_two("hang")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1000):
            await toy.run([call(TWO, 0)])
    assert toy.lengths[TWO] == 0
    assert len(await toy.run([call(ONE, 0)])) == 1


@pytest.mark.parametrize("scenario", [_raise, _bad_row, _wrong, _hang])
def test_injected_faults(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    run_virtual(scenario)


def test_coarse_truncation_keeps_a_multiple_or_everything() -> None:
    async def scenario() -> None:
        toy = backend(coarse_truncate=4)
        await toy.run([call(ONE, 0, 6)])
        assert toy.truncate(ONE, 6) == 6
        assert toy.fork(ONE, SequenceId(3), 5) == 4
        assert toy.truncate(ONE, 3) == 0

    run_virtual(scenario)


def test_call_shapes_show_when_asked_for() -> None:
    async def scenario() -> None:
        toy = backend(mixes_call_shape=True)
        first = await toy.run([call(ONE, 0, 2)])
        second = await toy.run([call(TWO, 0, 2, call_count=6)])
        assert first != second
        toy.truncate(ONE, 0)
        assert await toy.run([call(ONE, 0, 2, call_count=6)]) == second

    run_virtual(scenario)


def test_misuse_is_an_internal_error() -> None:
    async def scenario() -> None:
        toy = backend(cache_tokens=4)
        with pytest.raises(InternalError, match="never reused"):
            toy.open(ONE, SPAN)
        with pytest.raises(InternalError, match="not open"):
            toy.truncate(SequenceId(77), 0)
        with pytest.raises(InternalError, match="too many calls of one sequence"):
            await toy.run([call(ONE, position) for position in range(5)])
        with pytest.raises(InternalError, match="5 positions in a cache of 4"):
            await toy.run([call(ONE, 0, 5)])
        await toy.aclose()
        with pytest.raises(InternalError, match="aclose"):
            toy.close(ONE)

    run_virtual(scenario)


@pytest.mark.parametrize("options", [{"span": Span(0, 9)}, {"coarse_truncate": 0}])
def test_impossible_configurations(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ToyConfig(**{"span": SPAN, "num_blocks": 4, **options})


def test_random_call_patterns_agree_with_the_pure_function() -> None:
    async def scenario() -> None:
        rng = random.Random(3)
        for number in range(20):
            toy = ToyBackend(ToyConfig(span=SPAN, num_blocks=4))
            toy.open(ONE, SPAN)
            outputs = b""
            position = 0
            while position < len(ROWS):
                count = rng.randint(1, len(ROWS) - position)
                (outcome,) = await toy.run([call(ONE, position, count)])
                assert isinstance(outcome, bytes), number
                outputs += outcome
                position += count
            assert outputs == b"".join(expected_output(SPAN, ROWS))

    run_virtual(scenario)
