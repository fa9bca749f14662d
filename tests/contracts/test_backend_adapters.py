"""What every BlockBackend does with adapters: load, apply to a session's rows alone, drop."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import pytest

from shoal.base.adapters import AdapterId, AdapterPart, make_adapter_manifest
from shoal.base.backend import NoAdapters, SequenceId
from shoal.base.errors import AdapterBad, InternalError
from shoal.lab.toy_adapters import toy_adapter
from tests.contracts.backend_cases import SPAN, SUBJECTS, Bench, Held, Subject

WITH = [subject for subject in SUBJECTS if subject.name != "cost"]
FIRST, SECOND = AdapterId(1), AdapterId(2)


@pytest.fixture(params=WITH, ids=lambda subject: subject.name)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(request.param)
    yield bench
    bench.close()


def adapter(bench: Bench, seed: int) -> AdapterPart:
    """A random adapter for the backend's blocks."""
    if bench.facts.model == "toy":
        return toy_adapter(random.Random(seed), bench.facts.num_blocks)
    from tests.golden.test_adapters_exact import random_adapter

    return random_adapter("llama", seed, 4)


def load(bench: Bench, number: AdapterId, part: AdapterPart) -> None:
    within = {block.index for block in part.manifest.within(SPAN)}
    blocks = {index: data for index, data in part.blocks.items() if index in within}
    one = AdapterPart(manifest=part.manifest, blocks=blocks)
    bench._runner.run(bench.backend.load_adapter(number, one))


def opened(bench: Bench, number: int, adapter: AdapterId | None) -> SequenceId:
    sequence = SequenceId(number)
    bench.backend.open(sequence, SPAN, adapter)
    bench.held[sequence] = Held(SPAN)
    return sequence


def test_each_sequence_has_its_own(bench: Bench) -> None:
    load(bench, FIRST, adapter(bench, 1))
    load(bench, SECOND, adapter(bench, 2))
    chosen = [None, FIRST, SECOND, FIRST, None]
    sequences = [opened(bench, 100 + n, one) for n, one in enumerate(chosen)]
    for count in (5, 1, 1, 3):
        rows = bench.rows(count)
        calls = [bench.call(sequence, rows) for sequence in sequences]
        found = bench.run_raw(calls)
        for call in calls:
            bench.held[call.sequence].inputs += bench.split(bytes(call.payload))
        outputs = [bytes(one) for one in found if isinstance(one, bytes)]
        assert len(outputs) == len(chosen), found
        assert len({outputs[0], outputs[1], outputs[2]}) == 3
        bench.check_equal(outputs[3], outputs[1])
        bench.check_equal(outputs[4], outputs[0])
        expected = bench.recomputed(SPAN, bench.held[sequences[0]].inputs)
        bench.check_equal(outputs[0], b"".join(expected[-count:]))


def test_forks_and_truncated_sequences_keep_it(bench: Bench) -> None:
    load(bench, FIRST, adapter(bench, 1))
    parent, whole = opened(bench, 100, FIRST), opened(bench, 101, FIRST)
    rows = bench.rows(8)
    (expected,) = bench.run_raw([bench.call(whole, rows)])
    bench.run_raw([bench.call(parent, rows[:5])])
    bench.held[parent].inputs = rows[:5]
    child = bench.fork(parent, 5)
    bench.truncate(parent, 4)
    for sequence in (parent, child):
        held = len(bench.held[sequence].inputs)
        (outcome,) = bench.run_raw([bench.call(sequence, rows[held:])])
        assert isinstance(outcome, bytes)
        assert isinstance(expected, bytes)
        size = len(expected) // 8
        bench.check_equal(outcome, expected[held * size :])


def test_a_dropped_one_is_gone_and_others_stay(bench: Bench) -> None:
    load(bench, FIRST, adapter(bench, 1))
    load(bench, SECOND, adapter(bench, 2))
    assert bench.backend.holds_adapter(FIRST)
    rows = bench.rows(4)
    (before,) = bench.run_raw([bench.call(opened(bench, 100, SECOND), rows)])
    bench._runner.run(bench.backend.drop_adapter(FIRST))
    bench._runner.run(bench.backend.drop_adapter(AdapterId(77)))
    assert not bench.backend.holds_adapter(FIRST)
    assert bench.backend.holds_adapter(SECOND)
    (after,) = bench.run_raw([bench.call(opened(bench, 101, SECOND), rows)])
    assert after == before
    with pytest.raises(InternalError):
        bench.backend.open(SequenceId(102), SPAN, FIRST)
    with pytest.raises(InternalError):
        load(bench, SECOND, adapter(bench, 3))


def test_what_does_not_fit_leaves_nothing(bench: Bench) -> None:
    good = adapter(bench, 1)
    blocks = {index: b"\xff" * len(data) for index, data in good.blocks.items()}
    shapes = {block.index: (block.shapes, blocks[block.index]) for block in good.manifest.blocks}
    config, encoding = good.manifest.config, good.manifest.encoding
    nan = AdapterPart(manifest=make_adapter_manifest(config, encoding, shapes), blocks=blocks)
    bench.backend.check_adapter(nan.manifest)
    with pytest.raises(AdapterBad, match="not finite"):
        load(bench, FIRST, nan)
    strange = toy_adapter(random.Random(1), bench.facts.num_blocks, hidden_size=24)
    with pytest.raises(AdapterBad):
        bench.backend.check_adapter(strange.manifest)
    with pytest.raises(AdapterBad):
        load(bench, FIRST, strange)
    load(bench, FIRST, good)


def test_backends_without_adapters_say_so() -> None:
    (cost,) = (subject for subject in SUBJECTS if subject.name == "cost")
    refuses_all(cost)


def refuses_all(subject: Subject) -> None:
    backend = subject.make()
    assert isinstance(backend, NoAdapters)
    manifest = toy_adapter(random.Random(1), 6).manifest
    with pytest.raises(AdapterBad, match="takes no adapters"):
        backend.check_adapter(manifest)
    with pytest.raises(AdapterBad, match="takes no adapters"):
        asyncio.run(backend.load_adapter(FIRST, AdapterPart(manifest=manifest, blocks={})))
