"""Weights from peers between real processes: nobody but the first has a copy of the model."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest

from shoal.base.content import content_hash
from shoal.base.errors import ModelUnknown
from shoal.base.spans import Span
from shoal.model.known import KNOWN_MODELS, default_cache_dir
from shoal.model.manifest import build_manifest
from shoal.model.manifest_text import stored_num_bytes
from shoal.model.safetensors_source import SafetensorsSource
from shoal.model.source import open_source
from shoal.model.span_model import span_tensor_names
from tests.e2e import processes
from tests.e2e.processes import Server, alone, end_all, error_line, run, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PROMPT = "What the sea gives, the sea takes."
REAL = "smollm2-135m-instruct"


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """`caches(name)`: processes started from now on have this cache and this home."""

    def use(name):
        monkeypatch.setitem(processes.ENVIRONMENT, "SHOAL_CACHE", str(tmp_path / name))
        monkeypatch.setitem(processes.ENVIRONMENT, "HOME", str(tmp_path / "home"))
        return tmp_path / name / "weights"

    return use


@pytest.fixture
def start():
    """Starts servers that end with the test."""
    started = []

    def serve(*arguments, join=None, is_ready=True):
        started.append(Server(*arguments, join=join))
        return started[-1].ready() if is_ready else started[-1]

    yield serve
    end_all(started)


def span_contents(source, span):
    """Hash and bytes of the tensors of a span, and of the files beside them."""
    files = {content_hash(data): len(data) for data in source.side_files().values()}
    names = set(span_tensor_names(source, span))
    return files | {
        entry.content: stored_num_bytes(entry.shape, entry.dtype)
        for entry in build_manifest(source).tensors
        if entry.name in names
    }


def stored(weights):
    return {path.name: path.stat().st_size for path in (weights / "content").glob("*/*")}


def report(server):
    """(bytes, peers) of the line that says what was fetched."""
    line = server.wait_line(server.err, "fetched ")
    match = re.search(r"\((\d+) bytes\), from (\d+) peer", line)
    assert match, line
    return int(match[1]), int(match[2])


def test_a_swarm_grows_out_of_one_copy(model, caches, start):
    source = SafetensorsSource(model)
    name = build_manifest(source).model_name()
    caches("first")
    first = start(model, "0:7", "--weights-rate", "1GB")
    from_peers = ("--weights-from-peers", "--weights-rate", "1GB")
    others = []
    for span in (Span(0, 4), Span(3, 7)):
        weights = caches(f"cache-{span.start}")
        blocks = f"{span.start}:{span.end}"
        others.append(start(name[:8], blocks, *from_peers, join=first.address))
        expected = span_contents(source, span)
        assert stored(weights) == expected, "exactly the span's tensors, and the tokenizer"
        assert report(others[-1])[0] == sum(expected.values())

    caches("client")
    command = ("generate", name, "--weights-from-peers", "--join", others[0].address, "--json")
    result = run(*command, "--prompt", PROMPT, "--max-new-tokens", "30")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout.splitlines()[-1])
    assert (answer["token_ids"], answer["text"]) == alone(model, PROMPT, 30)

    first.end()
    weights = caches("late")
    late = start(name, "1:6", *from_peers, join=others[0].address)
    expected = span_contents(source, Span(1, 6))
    assert stored(weights) == expected
    assert report(late) == (sum(expected.values()), 2), "from both, who had it from the first"

    caches("client")  # has embedding and head; the tokenizer was handed on
    result = run(*command, "--prompt", PROMPT, "--max-new-tokens", "30")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["text"] == answer["text"]


def test_who_has_no_copy_can_train_and_use_what_was_learned(model, caches, start, tmp_path):
    caches("first")
    first = start(model, "0:7", "--weights-rate", "1GB")
    name = build_manifest(SafetensorsSource(model)).model_name()
    weights = caches("client")
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text('{"text": "the sea takes"}\n' * 4)
    place = ("--join", first.address, "--weights-from-peers")
    options = ("--method", "deep-prompt", "--prompt-tokens", "2", "--steps", "2")
    result = run("finetune", name[:8], *place, "--data", data, "--out", out, *options)
    assert result.returncode == 0, result.stderr
    assert stored(weights), "embedding and head came from the server"
    result = run("finetune", "--resume", out, *place)
    assert result.returncode == 0, result.stderr
    ask = ("--adapter", out, "--prompt", PROMPT, "--max-new-tokens", "3", "--json")
    result = run("generate", name, *place, *ask)
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout.splitlines()[-1])["token_ids"]) <= 3


def test_a_peer_that_hands_out_nothing_is_an_error_with_its_reason(model, caches, start):
    caches("first")
    first = start(model, "0:7", "--weights-rate", "0")
    caches("second")
    name = build_manifest(SafetensorsSource(model)).model_name()
    result = run("generate", name, "--weights-from-peers", "--join", first.address, "--prompt", "x")
    assert result.returncode == 1
    line = error_line(result.stderr)
    assert "hands out no weights" in line
    assert name in line


@pytest.mark.slow
@pytest.mark.real_model
def test_the_demo_model_from_peers_writes_the_same_text(caches, start):
    try:
        source = open_source(REAL, default_cache_dir(os.environ))
    except ModelUnknown as error:
        pytest.skip(error.detail)
    assert build_manifest(source).model_name() == KNOWN_MODELS[REAL].model
    generate = ("--prompt", "The sea is", "--max-new-tokens", "16", "--json", "--threads", "1")
    first = start(REAL, "0:30", "--weights-rate", "6MB")
    expected = json.loads(run("generate", REAL, "--join", first.address, *generate).stdout)

    weights = caches("second")
    arguments = (REAL, "3:6", "--weights-from-peers")
    second = start(*arguments, join=first.address, is_ready=False)
    wait_until(lambda: len(stored(weights)) > 3, "some tensors fetched")
    second.signal(signal.SIGKILL)
    second.wait()
    kept = sum(path.stat().st_size for path in (weights / "partial").glob("*"))
    kept += sum(stored(weights).values())
    second = start(*arguments, join=first.address)
    contents = span_contents(source, Span(3, 6))
    assert stored(weights) == contents
    assert report(second)[0] == sum(contents.values()) - kept, "what was there is not sent again"

    caches("client")
    result = run("generate", REAL, "--weights-from-peers", "--join", second.address, *generate)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert (answer["text"], answer["token_ids"]) == (expected["text"], expected["token_ids"])
