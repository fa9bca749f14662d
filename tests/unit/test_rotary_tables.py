"""Rotary tables that look at the longest position of a pass: no session moves another's."""

from __future__ import annotations

import asyncio
import itertools
from functools import cache

import pytest
import torch

from shoal.base.backend import BlockBackend, Call, Outcome, SequenceId
from shoal.base.errors import SessionTooLong
from shoal.base.spans import Span
from shoal.model.families import session_tokens_max
from shoal.model.span_model import load_span
from shoal.model.torch_backend import BackendConfig, EngineChoice, ExactChoice, load_backend
from tests.models import tiny_config, tiny_source
from tests.unit.exact_cases import rows_at

FAMILIES = ["phi3_longrope", "llama_dynamic", "llama_yarn"]
ENGINES: list[tuple[EngineChoice, ExactChoice]] = [
    ("per-session", "always"),
    ("batched", "never"),
    ("batched", "always"),
]
SPAN = Span(0, 4)
HIDDEN = 32
TOLERANCE = 1e-6
"""Relative to the largest value; other row counts sum in another order."""

_ids = itertools.count(1)


@cache
def backend(family: str, engine: EngineChoice, exact: ExactChoice) -> BlockBackend:
    config = BackendConfig(model=family, engine=engine, exact=exact)
    return load_backend(tiny_source(family), SPAN, config)


def opened(target: BlockBackend) -> SequenceId:
    sequence = SequenceId(next(_ids))
    target.open(sequence, SPAN)
    return sequence


def call(
    sequence: SequenceId, start: int, count: int, *, seed: int = 1, call_count: int | None = None
) -> Call:
    return Call(
        sequence=sequence,
        span=SPAN,
        position=start,
        count=count,
        call_count=call_count or count,
        payload=rows_at(seed, start, count, HIDDEN),
        encoding="float32",
        output_encoding="float32",
        rows_wanted=count,
    )


def run(target: BlockBackend, *calls: Call) -> list[Outcome]:
    return asyncio.run(target.run(calls))


def rows(outcome: Outcome) -> torch.Tensor:
    assert isinstance(outcome, bytes), outcome
    return torch.frombuffer(bytearray(outcome), dtype=torch.float32).view(-1, HIDDEN)


def assert_close(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (mine - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


@pytest.mark.parametrize(("engine", "exact"), ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_companion_changes_nothing(
    family: str, engine: EngineChoice, exact: ExactChoice
) -> None:
    target = backend(family, engine, exact)
    limit = target.facts.session_tokens_max
    alone, short, long = opened(target), opened(target), opened(target)
    steps = [(0, 10), (10, 1), (11, 1), (12, 5), (17, 1)]
    expected = [run(target, call(alone, *step))[0] for step in steps]
    # The companion comes to its end and asks for more, always in the same run.
    run(target, call(long, 0, limit - 4, seed=2))
    places = [(limit - 4, 2), (limit - 2, 1), (limit - 1, 1), (limit, 1), (limit, 40)]
    for step, place, answer in zip(steps, places, expected, strict=True):
        companion, mine = run(target, call(long, *place, seed=2), call(short, *step))
        assert isinstance(companion, SessionTooLong if place[0] == limit else bytes)
        if exact == "always":
            assert mine == answer
        else:
            assert_close(rows(mine), rows(answer))


@pytest.mark.parametrize(("engine", "exact"), ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_beyond_the_end_changes_nothing(
    family: str, engine: EngineChoice, exact: ExactChoice
) -> None:
    """The tail of a call is repeated in the call's first shape, which may end further on."""
    target = backend(family, engine, exact)
    start = target.facts.session_tokens_max - 3
    plain, padded = opened(target), opened(target)
    for sequence in (plain, padded):
        run(target, call(sequence, 0, start))
    expected = run(target, call(plain, start, 3))[0]
    assert_close(rows(run(target, call(padded, start, 3, call_count=30))[0]), rows(expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_tables_never_move(family: str) -> None:
    model = load_span(tiny_source(family), SPAN, dtype="float32")
    table = model.base.rotary_emb.inv_freq.clone()
    generator = torch.Generator().manual_seed(1)
    one = torch.randn(1, HIDDEN, generator=generator)
    with torch.inference_mode():
        for position in (0, session_tokens_max(model.config) - 1, 5000, 3):
            model.forward(one, position, model.new_cache(SPAN), SPAN)
            assert torch.equal(model.base.rotary_emb.inv_freq, table)


def test_sessions_end_where_the_model_was_first_trained() -> None:
    ends = {family: session_tokens_max(tiny_config(family)) for family in FAMILIES}
    assert ends == {"phi3_longrope": 64, "llama_dynamic": 512, "llama_yarn": 512}
    config = tiny_config("phi3_longrope")
    config.rope_parameters["short_factor"] = config.rope_parameters["long_factor"]
    assert session_tokens_max(config) == 512
    config.rope_parameters |= {"short_mscale": 1.1, "long_mscale": 1.3}
    assert session_tokens_max(config) == 64
