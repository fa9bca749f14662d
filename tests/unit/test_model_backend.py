"""The torch backend beside the shared contract suite: isolation, rollback, classes."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import struct
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
import torch

from shoal.base.backend import Call, SequenceId
from shoal.base.errors import BadInput, BadOutput, ConfigError, InternalError, SessionTooLong
from shoal.base.spans import Span
from shoal.model.device_thread import DeviceThread
from shoal.model.measure import measure_block_times
from shoal.model.torch_backend import BackendConfig, TorchBackend, load_backend
from tests.models import NUM_BLOCKS, tiny_source, tiny_torch_backend

T = TypeVar("T")
SPAN = Span(1, 4)
HIDDEN = 48
GOOD, BAD = SequenceId(1), SequenceId(2)


def on_backend(work: Callable[[TorchBackend], Awaitable[T]], **options: Any) -> T:
    async def run() -> T:
        backend = tiny_torch_backend(SPAN, **options)
        try:
            backend.open(GOOD, SPAN)
            backend.open(BAD, SPAN)
            return await work(backend)
        finally:
            await backend.aclose()

    return asyncio.run(run())


def rows_of(count: int, value: float = 0.5) -> bytes:
    values = [value + math.sin(index) for index in range(count * HIDDEN)]
    return struct.pack(f"<{count * HIDDEN}f", *values)


def call_of(sequence: SequenceId, position: int, count: int, **changes: Any) -> Call:
    call = Call(
        sequence=sequence,
        span=SPAN,
        position=position,
        count=count,
        call_count=count,
        payload=rows_of(count),
        encoding="float32",
        output_encoding="float32",
        rows_wanted=count,
    )
    return dataclasses.replace(call, **changes)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_poisoned_row_fails_alone_and_leaves_no_trace(value: float) -> None:
    poisoned = bytearray(rows_of(3))
    struct.pack_into("<f", poisoned, 4 * HIDDEN, value)

    async def work(backend: TorchBackend) -> None:
        await backend.run([call_of(GOOD, 0, 2), call_of(BAD, 0, 2)])
        bad, good = await backend.run(
            [call_of(BAD, 2, 3, payload=bytes(poisoned)), call_of(GOOD, 2, 3)]
        )
        assert isinstance(bad, BadInput)
        assert isinstance(good, bytes)
        (again,) = await backend.run([call_of(BAD, 2, 3)])
        assert again == good

    on_backend(work)


def test_overflow_inside_the_blocks_is_reported_and_rolled_back() -> None:
    async def work(backend: TorchBackend) -> None:
        with torch.inference_mode():
            backend._model.parameters()[-3].fill_(60000.0)
        (outcome,) = await backend.run([call_of(GOOD, 0, 2)])
        assert isinstance(outcome, BadOutput)
        assert "float16" in outcome.detail
        assert backend.truncate(GOOD, 2) == 0

    on_backend(work, dtype="float16")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"position": 1}, BadInput),
        ({"payload": rows_of(1)}, BadInput),
        ({"payload": b""}, BadInput),
        ({"encoding": "int8"}, BadInput),
        ({"encoding": "bfloat16"}, BadInput),
        ({"output_encoding": "int8"}, BadInput),
        ({"rows_wanted": 3}, BadInput),
        ({"count": 0, "payload": b"", "rows_wanted": 0}, BadInput),
        ({"span": Span(1, 3)}, BadInput),
        ({"sequence": SequenceId(77)}, InternalError),
    ],
)
def test_a_malformed_call_fails_alone(changes: dict[str, Any], error: type[Exception]) -> None:
    async def work(backend: TorchBackend) -> None:
        bad, good = await backend.run(
            [dataclasses.replace(call_of(BAD, 0, 2), **changes), call_of(GOOD, 0, 2)]
        )
        assert isinstance(bad, error)
        assert isinstance(good, bytes)

    on_backend(work)


def test_a_sequence_ends_where_the_model_ends() -> None:
    async def work(backend: TorchBackend) -> None:
        limit = backend.facts.session_tokens_max
        (fits,) = await backend.run([call_of(GOOD, 0, limit, rows_wanted=1)])
        assert isinstance(fits, bytes)
        (over,) = await backend.run([call_of(GOOD, limit, 1)])
        assert isinstance(over, SessionTooLong)

    on_backend(work)


def test_an_exception_inside_a_block_is_that_calls_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work(backend: TorchBackend) -> None:
        cache = backend._sequences[BAD]
        whole = cache.layers[2]
        cache.layers[2] = None
        bad, good = await backend.run([call_of(BAD, 0, 2), call_of(GOOD, 0, 2)])
        assert isinstance(bad, InternalError)
        assert isinstance(good, bytes)
        cache.layers[2] = whole
        (again,) = await backend.run([call_of(BAD, 0, 2)])
        assert again == good

    on_backend(work)
    assert "call failed" in caplog.text


def test_misuse_by_the_server_is_our_bug() -> None:
    async def work(backend: TorchBackend) -> None:
        with pytest.raises(InternalError):
            backend.open(GOOD, SPAN)
        with pytest.raises(InternalError):
            backend.fork(GOOD, BAD, 0)
        with pytest.raises(InternalError):
            backend.truncate(SequenceId(9), 0)
        with pytest.raises(BadInput):
            backend.open(SequenceId(9), Span(0, 2))
        with pytest.raises(InternalError):
            await backend.run([call_of(GOOD, 0, 1), call_of(GOOD, 1, 1)])
        backend.close(SequenceId(9))

    on_backend(work)


def test_company_does_not_change_the_bits() -> None:
    async def work(backend: TorchBackend) -> None:
        (alone,) = await backend.run([call_of(GOOD, 0, 5)])
        backend.truncate(GOOD, 0)
        _, company = await backend.run(
            [call_of(BAD, 0, 9, payload=rows_of(9, 0.1)), call_of(GOOD, 0, 5)]
        )
        assert alone == company

    on_backend(work)


def test_classes_are_comparable_between_spans_and_dtypes() -> None:
    def class_of(span: Span, dtype: str = "float32", threads: int = 1) -> str:
        config = BackendConfig(model="m", dtype=dtype, threads=threads)
        backend = load_backend(tiny_source(), span, config)
        numerics = backend.facts.numerics
        asyncio.run(backend.aclose())
        return numerics

    first = class_of(Span(0, 3))
    assert first.startswith("float32-")
    assert len(first) == len("float32-") + 16
    assert class_of(Span(3, NUM_BLOCKS)) == first
    assert class_of(Span(0, 3), "bfloat16").startswith("bfloat16-")
    assert class_of(Span(0, 3), threads=2) != first


def test_block_times_are_positive_and_nothing_is_left_open() -> None:
    async def work(backend: TorchBackend) -> None:
        times = await measure_block_times(backend)
        assert times.decode_s_per_block > 0
        assert times.prefill_s_per_block_token > 0
        assert [batch for batch, _ in times.decode_s_by_batch] in ([1, 4, 16, 64], [1, 4, 16])
        assert times.decode_s_by_batch[0] == (1, times.decode_s_per_block)
        assert all(seconds > 0 for _, seconds in times.decode_s_by_batch)
        assert set(backend._sequences) == {GOOD, BAD}

    on_backend(work)


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "int3"}, {"threads": 0}, {"cache_tokens": 1}, {"exact": "maybe"}],
)
def test_a_wrong_config_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        BackendConfig(**{"model": "m"} | changes)


@pytest.mark.parametrize("device", ["tpu", "cuda:0", "gpu please"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="cpu"):
        load_backend(tiny_source(), SPAN, BackendConfig(model="m", device=device))


def test_no_thread_is_left_after_closing_or_failing() -> None:
    def device_threads() -> set[threading.Thread]:
        return {t for t in threading.enumerate() if t.name == "shoal-device"}

    before = device_threads()
    on_backend(lambda backend: backend.run([call_of(GOOD, 0, 1)]))
    assert device_threads() <= before


def test_what_work_raises_reaches_its_caller_alone() -> None:
    def fail() -> None:
        raise ValueError("this work")

    async def scenario() -> None:
        thread = DeviceThread(1)
        failing, other = await asyncio.gather(
            thread.run(fail), thread.run(lambda: 7), return_exceptions=True
        )
        assert isinstance(failing, ValueError)
        assert other == 7
        await thread.aclose()

    asyncio.run(scenario())


def test_a_cancelled_run_waits_for_the_device() -> None:
    started, release = threading.Event(), threading.Event()
    finished: list[bool] = []

    def work() -> None:
        started.set()
        release.wait()
        finished.append(True)

    async def scenario() -> None:
        thread = DeviceThread(1)
        task = asyncio.create_task(thread.run(work))
        await asyncio.to_thread(started.wait)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
        release.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert finished == [True]
        await thread.aclose()
        with pytest.raises(InternalError):
            await thread.run(work)

    asyncio.run(scenario())
