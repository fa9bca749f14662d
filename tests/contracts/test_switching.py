"""The BlockBackend contract while one backend takes over from another, at any moment."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test

from shoal.base.adapters import AdapterId
from shoal.base.backend import BlockBackend, SequenceId
from shoal.base.errors import AdapterMissing, BadInput, ConfigError, InternalError
from shoal.base.spans import Span
from shoal.lab.toy_adapters import toy_adapter
from shoal.lab.toy_backend import ToyBackend, ToyConfig
from shoal.server.switching import SwitchingBackend
from tests.contracts.backend_cases import Bench, Subject
from tests.contracts.test_backend import Machine

BLOCKS = 6
SPANS = (Span(1, 5), Span(0, 4), Span(2, 6), Span(3, 5), Span(0, 2))

Make = Callable[[Span], BlockBackend]


def toy(span: Span, **more: int) -> BlockBackend:
    return ToyBackend(ToyConfig(span=span, num_blocks=BLOCKS, **more))


def batched(span: Span) -> BlockBackend:
    from tests.models import tiny_batched_backend

    backend: BlockBackend = tiny_batched_backend(span=span, exact="never")
    return backend


def subject(name: str, make: Make, *, is_bit_exact: bool, num_examples: int) -> Subject:
    return Subject(
        name=name,
        make=lambda: SwitchingBackend(make(SPANS[0])),
        is_bit_exact=is_bit_exact,
        num_examples=num_examples,
    )


CASES: list[tuple[Subject, Make]] = [
    (subject("toy", toy, is_bit_exact=True, num_examples=60), toy),
]
if importlib.util.find_spec("tests.models") is not None:
    CASES.append((subject("batched", batched, is_bit_exact=False, num_examples=3), batched))


class SwitchingBench(Bench):
    """Recomputes where the sequence's own blocks are, which the newest may lack."""

    def __init__(self, subject: Subject, make: Make) -> None:
        super().__init__(subject)
        self.make = make

    @property
    def switching(self) -> SwitchingBackend:
        assert isinstance(self.backend, SwitchingBackend)
        return self.backend

    def drop_old(self) -> None:
        self._runner.run(self.switching.drop_old())


class SwitchingMachine(Machine):
    """The contract's machine, with switches between its steps."""

    make: Make

    def __init__(self) -> None:
        super().__init__()
        self.bench: SwitchingBench = SwitchingBench(self.subject, type(self).make)

    @precondition(lambda self: len(self.bench.held) < 4)
    @rule(data=st.data())
    def open(self, data: st.DataObject) -> None:
        whole = self.bench.backend.facts.span
        start = data.draw(st.integers(whole.start, whole.end - 1))
        self.bench.open(Span(start, data.draw(st.integers(start + 1, whole.end))))

    @precondition(lambda self: self.bench.switching.old_facts is None)
    @rule(span=st.sampled_from(SPANS))
    def switch(self, span: Span) -> None:
        new = self.bench.make(span)
        self.bench.switching.add(new)
        assert self.bench.backend.facts is new.facts

    @precondition(lambda self: self.bench.switching.old_facts is not None)
    @rule()
    def drop(self) -> None:
        if self.bench.switching.is_old_used:
            with pytest.raises(InternalError, match="still open"):
                self.bench.drop_old()
        else:
            self.bench.drop_old()
            assert self.bench.switching.old_facts is None


@pytest.mark.parametrize(("subject", "make"), CASES, ids=[case[0].name for case in CASES])
def test_any_order_of_calls_and_switches(subject: Subject, make: Make) -> None:
    fields = {"subject": subject, "make": staticmethod(make)}
    run_state_machine_as_test(
        type("SwitchingMachine", (SwitchingMachine,), fields),
        settings=settings(
            max_examples=subject.num_examples,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )


def test_old_sequences_stay_and_new_ones_go_to_the_new_blocks() -> None:
    old, new = toy(Span(0, 4)), toy(Span(2, 6))
    backend = SwitchingBackend(old)
    backend.open(SequenceId(1), Span(0, 4))
    backend.add(new)
    backend.open(SequenceId(2), Span(2, 4))  # both have them
    backend.open(SequenceId(3), Span(0, 2))  # only the old one
    assert backend.fork(SequenceId(1), SequenceId(4), 0) == 0
    assert isinstance(old, ToyBackend)
    assert isinstance(new, ToyBackend)
    assert set(old.lengths) == {1, 3, 4}
    assert set(new.lengths) == {2}
    for sequence in (1, 3, 4):
        assert backend.is_old_used
        backend.close(SequenceId(sequence))
    asyncio.run(backend.drop_old())
    assert old.is_closed
    with pytest.raises(BadInput, match=r"blocks \[0,2\) are not served here"):
        backend.open(SequenceId(5), Span(0, 2))


def test_an_adapter_of_the_new_blocks_is_not_in_the_old_ones() -> None:
    backend, adapter = SwitchingBackend(toy(Span(0, 4))), AdapterId(1)
    backend.add(toy(Span(2, 6)))
    asyncio.run(backend.load_adapter(adapter, toy_adapter(random.Random(1), BLOCKS)))
    backend.open(SequenceId(1), Span(2, 4), adapter)
    with pytest.raises(AdapterMissing, match=r"blocks \[0,2\) are being left"):
        backend.open(SequenceId(2), Span(0, 2), adapter)


def test_only_the_blocks_may_change() -> None:
    backend = SwitchingBackend(toy(Span(0, 4)))
    with pytest.raises(ConfigError, match="page_tokens would change"):
        backend.add(toy(Span(2, 6), page_tokens=64))
    backend.add(toy(Span(2, 6)))
    with pytest.raises(InternalError, match="drop them first"):
        backend.add(toy(Span(0, 4)))


def test_facts_name_no_more_than_what_check_alike_knows() -> None:
    """A new fact must be judged: may it change while clients are here?"""
    names = {field.name for field in dataclasses.fields(toy(Span(0, 4)).facts)}
    assert names == {
        "model", "span", "num_blocks", "hidden_size", "encodings", "numerics", "is_exact",
        "cache_tokens", "page_tokens", "session_tokens_max", "calls_per_sequence_max",
    }  # fmt: skip
