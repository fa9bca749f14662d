"""What every BlockBackend does: one suite and one state machine, on each implementation."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from shoal.base.backend import Call, SequenceId
from shoal.base.errors import BadInput, ShoalError
from shoal.base.spans import Span
from shoal.wire.tensors import row_bytes
from tests.contracts.backend_cases import ODD_SUBJECTS, SPAN, SUBJECTS, Bench, Subject

SPANS = (SPAN, Span(1, 3), Span(3, 5), Span(2, 3))


@pytest.fixture(params=SUBJECTS, ids=lambda subject: subject.name)
def subject(request: pytest.FixtureRequest) -> Subject:
    chosen: Subject = request.param
    return chosen


@pytest.fixture
def bench(subject: Subject) -> Iterator[Bench]:
    bench = Bench(subject)
    yield bench
    bench.close()


def test_facts_are_consistent(bench: Bench) -> None:
    facts = bench.facts
    assert facts.span == SPAN
    assert facts.num_blocks >= facts.span.end
    assert facts.hidden_size > 0
    assert facts.cache_tokens >= facts.page_tokens > 0
    assert facts.session_tokens_max > 0
    assert facts.encodings
    for encoding in facts.encodings:
        assert row_bytes(encoding, facts.hidden_size) > 0
    assert facts.model
    assert facts.numerics


@pytest.mark.parametrize("cuts", [(12,), (1,) * 12, (5, 7), (1, 4, 1, 6), (8, 1, 1, 1, 1)])
@pytest.mark.parametrize("span", SPANS, ids=str)
def test_chunks_and_single_rows_give_what_one_call_gives(
    bench: Bench, cuts: tuple[int, ...], span: Span
) -> None:
    sequence = bench.open(span)
    for count in cuts:
        bench.run(bench.call(sequence, bench.rows(count)))


def test_a_chain_of_parts_gives_what_the_whole_span_gives(bench: Bench) -> None:
    whole, first, second = bench.open(SPAN), bench.open(Span(1, 3)), bench.open(Span(3, 5))
    rows = bench.rows(5)
    direct, middle = bench.run_raw([bench.call(whole, rows), bench.call(first, rows)])
    assert isinstance(middle, bytes)
    (chained,) = bench.run_raw([bench.call(second, bench.split(middle))])
    assert isinstance(direct, bytes)
    assert isinstance(chained, bytes)
    bench.check_equal(chained, direct)


def test_a_batch_mixes_sequences_spans_and_lengths(bench: Bench) -> None:
    sequences = [bench.open(span) for span in SPANS]
    for counts in ((3, 1, 7, 2), (1, 1, 1, 1), (1, 5, 1, 4)):
        pairs = zip(sequences, counts, strict=True)
        bench.run(*(bench.call(sequence, bench.rows(count)) for sequence, count in pairs))


@pytest.mark.parametrize("rows_wanted", [0, 1, 4])
def test_only_the_wanted_rows_come_back_but_all_are_held(bench: Bench, rows_wanted: int) -> None:
    sequence = bench.open()
    bench.run(bench.call(sequence, bench.rows(4), rows_wanted))
    bench.run(bench.call(sequence, bench.rows(1)))


def test_every_encoding_is_written_and_read(bench: Bench) -> None:
    rows = bench.rows(3)
    for encoding in bench.facts.encodings:
        call = bench.call(bench.open(), rows, output_encoding=encoding)
        (outcome,) = bench.run_raw([call])
        assert isinstance(outcome, bytes)
        encoded = bench.split(outcome, encoding)
        assert len(encoded) == 3
        (outcome,) = bench.run_raw([bench.call(bench.open(), encoded, encoding=encoding)])
        assert isinstance(outcome, bytes)
        assert len(bench.split(outcome)) == 3


def _with_value(row: bytes, value: float) -> bytes:
    return row[:-4] + struct.pack("<f", value)


@pytest.mark.parametrize("kind", ["nan", "inf", "short", "long", "encoding", "position", "span"])
def test_a_bad_call_fails_alone_and_leaves_its_cache_as_it_was(bench: Bench, kind: str) -> None:
    good, bad = bench.open(), bench.open()
    bench.run(bench.call(good, bench.rows(2)), bench.call(bad, bench.rows(3)))
    rows = bench.rows(2)
    call = bench.call(bad, rows)
    damage = {
        "nan": {"payload": rows[0] + _with_value(rows[1], float("nan"))},
        "inf": {"payload": _with_value(rows[0], float("-inf")) + rows[1]},
        "short": {"payload": b"".join(rows)[:-1]},
        "long": {"payload": b"".join(rows) + b"\0"},
        "encoding": {"encoding": "base64"},
        "position": {"position": call.position + 1},
        "span": {"span": Span(1, 4)},
    }
    wrong = dataclasses.replace(call, **damage[kind])
    healthy = bench.call(good, bench.rows(1))
    outcome, other = bench.run_raw([wrong, healthy])
    assert isinstance(outcome, BadInput)
    assert not isinstance(other, ShoalError)
    bench.held[good].inputs += bench.split(bytes(healthy.payload))
    bench.run(bench.call(bad, rows), bench.call(good, bench.rows(1)))


@pytest.mark.parametrize("length", [0, 1, 5, 8, 9, 10, 50])
def test_truncation_forgets_what_lies_behind(bench: Bench, length: int) -> None:
    sequence = bench.open()
    bench.run(bench.call(sequence, bench.rows(10)))
    bench.truncate(sequence, length)
    if length >= 10:
        assert len(bench.held[sequence].inputs) == 10
    bench.run(bench.call(sequence, bench.rows(2)))
    bench.run(bench.call(sequence, bench.rows(1)))


@pytest.mark.parametrize("length", [0, 3, 4, 6])
def test_a_fork_and_its_parent_go_their_own_ways(bench: Bench, length: int) -> None:
    parent = bench.open()
    bench.run(bench.call(parent, bench.rows(6)))
    child = bench.fork(parent, length)
    bench.run(bench.call(parent, bench.rows(1)), bench.call(child, bench.rows(2)))
    bench.truncate(parent, 1)
    bench.run(bench.call(child, bench.rows(1)))
    bench.drop(parent)
    grandchild = bench.fork(child, len(bench.held[child].inputs))
    bench.run(bench.call(child, bench.rows(1)), bench.call(grandchild, bench.rows(1)))


def test_closing_twice_or_the_unknown_is_nothing(bench: Bench) -> None:
    sequence = bench.open()
    bench.drop(sequence)
    bench.backend.close(sequence)
    bench.backend.close(SequenceId(10_000))
    bench.run(bench.call(bench.open(), bench.rows(1)))


def consecutive(bench: Bench, sequence: SequenceId, counts: tuple[int, ...]) -> list[Call]:
    """Calls of one run, each beginning where the one before ends."""
    calls: list[Call] = []
    for count in counts:
        call = bench.call(sequence, bench.rows(count))
        offset = sum(other.count for other in calls)
        calls.append(dataclasses.replace(call, position=call.position + offset))
    return calls


@pytest.mark.parametrize("counts", [(1,) * 9, (12, 1, 1, 12, 1), (1, 9, 3)])
def test_consecutive_calls_may_share_a_run(bench: Bench, counts: tuple[int, ...]) -> None:
    if bench.facts.calls_per_sequence_max < len(counts):
        pytest.skip("takes one call per sequence")
    sequence, other = bench.open(), bench.open()
    bench.run(bench.call(sequence, bench.rows(2)))
    bench.run(*consecutive(bench, sequence, counts), bench.call(other, bench.rows(4)))
    bench.run(bench.call(sequence, bench.rows(1)))


def test_what_follows_a_bad_call_in_a_run_fails_too(bench: Bench) -> None:
    if bench.facts.calls_per_sequence_max < 3:
        pytest.skip("takes one call per sequence")
    sequence = bench.open()
    first, second, third = consecutive(bench, sequence, (1, 1, 1))
    bad = dataclasses.replace(second, payload=_with_value(bytes(second.payload), float("nan")))
    good, wrong, after = bench.run_raw([first, bad, third])
    assert isinstance(good, bytes)
    assert isinstance(wrong, BadInput)
    assert isinstance(after, BadInput)
    bench.held[sequence].inputs += bench.split(bytes(first.payload))
    bench.run(bench.call(sequence, bench.rows(1)))


def test_an_empty_run_is_nothing(bench: Bench) -> None:
    assert bench.run_raw([]) == []


class Machine(RuleBasedStateMachine):
    """Sequences opened, run, cut, forked and closed in any order, beside recomputation."""

    subject: Subject

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(self.subject)

    def teardown(self) -> None:
        self.bench.close()

    def pick(self, data: st.DataObject) -> SequenceId:
        return data.draw(st.sampled_from(sorted(self.bench.held)))

    def pick_place(self, data: st.DataObject) -> tuple[SequenceId, int]:
        """Any length, or one a little shorter than the sequence: margins end there."""
        sequence = self.pick(data)
        held = len(self.bench.held[sequence].inputs)
        near = st.integers(max(held - 80, 0), held)
        return sequence, data.draw(st.one_of(near, st.integers(0, self.subject.length_max)))

    @precondition(lambda self: len(self.bench.held) < 4)
    @rule(span=st.sampled_from(SPANS))
    def open(self, span: Span) -> None:
        self.bench.open(span)

    @precondition(lambda self: self.bench.held)
    @rule(data=st.data())
    def run(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sets(st.sampled_from(sorted(self.bench.held)), min_size=1))
        calls = []
        for sequence in sorted(chosen):
            room = self.subject.length_max - len(self.bench.held[sequence].inputs)
            if room <= 0:
                continue
            count = data.draw(
                st.one_of(st.just(1), st.integers(1, min(room, self.subject.chunk_max)))
            )
            wanted = data.draw(st.sampled_from((0, 1, count)))
            calls.append(self.bench.call(sequence, self.bench.rows(count), wanted))
        self.bench.run(*calls)

    @precondition(lambda self: self.bench.held)
    @rule(data=st.data(), counts=st.lists(st.sampled_from((1, 1, 1, 9)), min_size=2, max_size=5))
    def run_together(self, data: st.DataObject, counts: list[int]) -> None:
        """Consecutive calls of one sequence in one run, as a replay makes them."""
        sequence = self.pick(data)
        room = self.subject.length_max - len(self.bench.held[sequence].inputs)
        if self.bench.facts.calls_per_sequence_max >= len(counts) and sum(counts) <= room:
            self.bench.run(*consecutive(self.bench, sequence, tuple(counts)))

    @precondition(lambda self: self.bench.held)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        self.bench.truncate(*self.pick_place(data))

    @precondition(lambda self: 0 < len(self.bench.held) < 4)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        self.bench.fork(*self.pick_place(data))

    @precondition(lambda self: self.bench.held)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        self.bench.drop(self.pick(data))


@pytest.mark.parametrize("subject", SUBJECTS + ODD_SUBJECTS, ids=lambda subject: subject.name)
def test_any_order_of_calls_gives_what_recomputation_gives(subject: Subject) -> None:
    machine = type("Machine", (Machine,), {"subject": subject})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=subject.num_examples,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
