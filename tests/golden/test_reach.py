"""The support table tells the truth: how far each family's sequences go back, and fork."""

from __future__ import annotations

import asyncio

import pytest

from shoal.base.backend import BlockBackend, Call, SequenceId
from shoal.base.spans import Span
from shoal.model.block_rows import ROLLBACK_TOKENS
from shoal.model.facts import Reach, model_facts
from shoal.model.torch_backend import BackendConfig, load_backend
from tests.models import FAMILIES, tiny_source
from tests.unit.exact_cases import rows_at

CHUNK = 50
FAR = 12
"""Longer than the windows of the tiny models, and far behind their margin."""


def grow(backend: BlockBackend, sequence: SequenceId, span: Span, length: int) -> None:
    for start in range(0, length, CHUNK):
        count = min(CHUNK, length - start)
        call = Call(
            sequence=sequence,
            span=span,
            position=start,
            count=count,
            call_count=count,
            payload=rows_at(1, start, count, backend.facts.hidden_size),
            encoding="float32",
            output_encoding="float32",
            rows_wanted=0,
        )
        (outcome,) = asyncio.run(backend.run([call]))
        assert outcome == b"", outcome


def reached(reach: Reach, length: int, wanted: int) -> int:
    if reach == "any" or wanted in (0, length):
        return wanted
    return wanted if reach == "margin" and wanted >= length - ROLLBACK_TOKENS else 0


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_go_back_as_far_as_the_table_says(family: str) -> None:
    source = tiny_source(family)
    span = Span(0, source.config.num_hidden_layers)
    backend = load_backend(source, span, BackendConfig(model="m", exact="never"))
    support = model_facts(source.config).support
    length = min(4 * CHUNK, backend.facts.session_tokens_max)
    parent = SequenceId(1)
    backend.open(parent, span)
    grow(backend, parent, span, length)
    places = (length, length - 1, max(length - ROLLBACK_TOKENS, 1), FAR, 0)
    for number, wanted in enumerate(places, 2):
        child = SequenceId(number)
        expected = reached(support.fork, length, wanted)
        assert backend.fork(parent, child, wanted) == expected
        again = SequenceId(number + len(places))
        backend.fork(parent, again, length)
        # A fork may keep less than its parent, but the margin behind its end is whole.
        assert backend.truncate(again, wanted) == reached(support.truncate, length, wanted)
    asyncio.run(backend.aclose())
