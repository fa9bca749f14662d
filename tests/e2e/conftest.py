"""Tiny models with a tokenizer on disk, and servers that several tests share."""

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.e2e.nursery import Nursery
from tests.e2e.processes import Server, end_all
from tests.e2e.recovery import exact_model
from tests.models import VOCABULARY, tiny_model


def save_model(folder, family="llama", seed=7, model=None):
    """A tiny model (or `model`) whose tokens are the printable characters of ASCII."""
    (model or tiny_model(family, seed=seed)).save_pretrained(folder)
    vocabulary = {chr(32 + index): index for index in range(VOCABULARY - 1)}
    vocabulary["<unk>"] = VOCABULARY - 1
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def other_model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("other-model"), seed=8)


@pytest.fixture(scope="session")
def exactable_model(tmp_path_factory):
    """One that exact mode finds row tiles for, in float32 and in bfloat16."""
    return save_model(tmp_path_factory.mktemp("exactable-model"), model=exact_model())


@pytest.fixture(scope="session")
def nursery():
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="module")
def serve(nursery):
    """Starts servers; they all end with the module. `serve(model, [blocks, ...])`."""
    started = []
    launch = nursery.launch()

    def start(model, spans, *extra, join=None):
        here = []
        for blocks in spans:
            here.append(Server(model, blocks, *extra, join=join, launch=launch))
            started.append(here[-1])
            join = join or here[0].ready().address
        return [server.ready() for server in here]

    yield start
    end_all(started)
