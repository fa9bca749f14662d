"""SmolLM2 in exact mode: the same bits alone, in company and on a fresh backend."""

from __future__ import annotations

import os
import random
from functools import cache

import pytest
import torch

from shoal.base.errors import ModelUnknown
from shoal.base.spans import Span
from shoal.model.batched_backend import BatchedBackend
from shoal.model.known import default_cache_dir
from shoal.model.source import ModelSource, open_source
from shoal.model.torch_backend import BackendConfig, load_backend
from tests.unit.exact_cases import Step, play

pytestmark = pytest.mark.real_model

SCRIPT = [Step(37, 37), *[Step(1, 1)] * 12, Step(20, 20), *[Step(1, 1)] * 4]


@cache
def source() -> ModelSource:
    try:
        return open_source("smollm2-135m-instruct", default_cache_dir(os.environ))
    except ModelUnknown as error:
        pytest.skip(error.detail)


def loaded(dtype: str) -> BatchedBackend:
    config = BackendConfig(model="m", dtype=dtype, engine="batched", exact="always")
    backend = load_backend(source(), Span(0, 5), config)
    assert isinstance(backend, BatchedBackend)
    return backend


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_company_and_replay_change_no_bit(dtype: str) -> None:
    first, second = loaded(dtype), loaded(dtype)
    assert first.facts.is_exact
    assert first.facts.numerics == second.facts.numerics
    rows, cached = play(first, SCRIPT)
    for backend, others in ((first, 5), (second, 12)):
        again, cached_again = play(backend, SCRIPT, company=random.Random(others), others=others)
        assert again == rows
        assert all(torch.equal(a, b) for a, b in zip(cached_again, cached, strict=True))
