"""Moves of a real server: is there room, and what comes out of it."""

import asyncio

import pytest

from shoal.base.errors import ConfigError
from shoal.base.spans import Span
from shoal.cli.models import OpenModel
from shoal.cli.moving import check_room, loader
from shoal.model.span_model import block_bytes
from shoal.model.torch_backend import BackendConfig, load_backend
from shoal.server.switching import SwitchingBackend
from tests.models import tiny_source

CONFIG = BackendConfig(model="tiny", cache_tokens=64)
GIB = 1 << 30


@pytest.fixture(scope="module")
def model():
    source = tiny_source("llama", blocks=6)
    return OpenModel(given="tiny", source=source, name="tiny", num_blocks=6, hidden_size=64)


def test_weights_and_a_full_cache_must_fit(model):
    weights = sum(block_bytes(model.source.config, "float32")[:3])
    check_room(model, Span(0, 3), CONFIG, GIB)
    check_room(model, Span(0, 3), CONFIG, None)
    with pytest.raises(ConfigError, match=r"blocks \[0,3\).* are free; a smaller --cache-tokens"):
        check_room(model, Span(0, 3), CONFIG, weights)
    check_room(model, Span(0, 3), CONFIG, weights, served=Span(1, 5))
    huge = BackendConfig(model="tiny", cache_tokens=1 << 30)
    with pytest.raises(ConfigError, match="KV cache need"):
        check_room(model, Span(0, 3), huge, GIB)


def test_blocks_are_fetched_and_loaded_only_where_there_is_room(model):
    done = []

    async def fetch(span):
        done.append(("fetch", span))

    async def load(span, beside):
        done.append(("load", span))
        return await asyncio.to_thread(load_backend, model.source, span, CONFIG, None, beside)

    async def work():
        first = load_backend(model.source, Span(2, 4), CONFIG)
        served = SwitchingBackend(first)
        backend = await loader(model, CONFIG, fetch, load, served)(Span(1, 3))
        assert backend.facts.span == Span(1, 3)
        assert backend.loaded.model.block(2) is first.loaded.model.block(2)
        await backend.aclose()
        assert done == [("fetch", Span(1, 3)), ("load", Span(1, 3))]
        huge = BackendConfig(model="tiny", cache_tokens=1 << 40)
        with pytest.raises(ConfigError):
            await loader(model, huge, fetch, load, served)(Span(1, 3))
        assert len(done) == 2
        await served.aclose()

    asyncio.run(work())
