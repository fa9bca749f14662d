"""Every family: training passes give the gradients of the whole model."""

from __future__ import annotations

import asyncio

import pytest
import torch

from shoal.base.spans import Span
from shoal.model.families import FAMILIES as ROWS
from shoal.model.torch_backend import BackendConfig, EngineChoice, load_backend
from tests.models import FAMILIES, tiny_model, tiny_source
from tests.training_cases import (
    check_equal,
    make_tensors,
    run_chain,
    seeded_rows,
    whole_result,
)

LENGTHS = (13, 13, 5)


def _packs(family: str) -> bool:
    return ROWS[tiny_source(family).config.model_type].packs


@pytest.mark.parametrize("engine", ["batched", "per-session"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_whole_model(family: str, engine: EngineChoice) -> None:
    if engine == "batched" and not _packs(family):
        pytest.skip("does not pack")
    whole = tiny_model(family)
    rows, gradients = seeded_rows(whole, LENGTHS)
    tensors = make_tensors(whole, (0, 1, 3))
    truth = whole_result(whole, rows, LENGTHS, gradients, tensors)
    config = BackendConfig(model=family, engine=engine, exact="never")
    spans = (Span(0, 1), Span(1, int(whole.config.num_hidden_layers)))
    backends = [load_backend(tiny_source(family), span, config) for span in spans]
    try:
        trainers = [(b.facts.span, t) for b in backends if (t := b.trainer()) is not None]
        check_equal(run_chain(trainers, rows, LENGTHS, gradients, tensors), truth)
    finally:
        for backend in backends:
            asyncio.run(backend.aclose())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama"])
def test_exact_servers_train_as_well(family: str) -> None:
    whole = tiny_model(family)
    rows, gradients = seeded_rows(whole, LENGTHS)
    tensors = make_tensors(whole, (0, 2))
    truth = whole_result(whole, rows, LENGTHS, gradients, tensors)
    span = Span(0, int(whole.config.num_hidden_layers))
    config = BackendConfig(model=family, engine="batched", exact="always")
    backend = load_backend(tiny_source(family), span, config)
    trainer = backend.trainer()
    assert trainer is not None
    try:
        check_equal(run_chain([(span, trainer)], rows, LENGTHS, gradients, tensors), truth)
    finally:
        asyncio.run(backend.aclose())


@pytest.mark.parametrize("engine", ["batched", "per-session"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "deepseek_v3"])
def test_bfloat16_comes_close(family: str, engine: EngineChoice) -> None:
    whole = tiny_model(family)
    rows, gradients = seeded_rows(whole, LENGTHS)
    tensors = make_tensors(whole, (0,))
    truth = whole_result(whole, rows, LENGTHS, gradients, tensors)
    span = Span(0, int(whole.config.num_hidden_layers))
    config = BackendConfig(model=family, engine=engine, exact="never", dtype="bfloat16")
    backend = load_backend(tiny_source(family), span, config)
    trainer = backend.trainer()
    assert trainer is not None
    try:
        chain = [(span, trainer)]
        found = run_chain(chain, rows, LENGTHS, gradients, tensors, encoding="bfloat16")
    finally:
        asyncio.run(backend.aclose())
    mine, other = found.row_gradients.float().flatten(), truth.row_gradients.flatten()
    assert float(torch.nn.functional.cosine_similarity(mine, other, dim=0)) > 0.9
