"""Models of the hub: which ids there are, what is fetched, what is refused and why."""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from shoal.base.errors import ConfigError, ModelCorrupt, ModelUnknown, ModelUnsupported, ShoalError
from shoal.model.hub import Hub, _stoppable
from shoal.model.hub_files import HubId, choose_files, parse_hub_id
from shoal.model.safetensors_source import SavedOutline
from shoal.model.source import open_source
from tests.models import save_safetensors
from tests.unit.hub_cases import FakeHub, files_of, serving

TINY = HubId(repo="org/tiny")
JUNK = {
    "README.md": b"# words",
    "pytorch_model.bin": b"pickle",
    "modeling_tiny.py": b"import os",
    "consolidated.safetensors": b"the same again",
    "original/params.json": b"{}",
}
WITH_WEIGHTS = ["config.json", "model.safetensors"]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    # Another test of this process may have put the library off line.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    with serving(FakeHub()) as hub:
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, bytes]:
    save_safetensors(tmp_path / "saved")
    return files_of(tmp_path / "saved")


def hub_of(fake: FakeHub, tmp_path: Path, told: list[tuple[int, int]] | None = None) -> Hub:
    def progress(what: str, done: int, total: int) -> None:
        if told is not None:
            told.append((done, total))

    return Hub(endpoint=fake.endpoint, cache_dir=tmp_path / "cache", progress=progress)


def refused(kind: type[ShoalError], hub: Hub, given: str) -> str:
    hub_id = parse_hub_id(given)
    assert hub_id is not None
    with pytest.raises(kind) as caught:
        hub.fetch(hub_id)
    return caught.value.detail


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubId(repo="org/name")),
        ("Qwen/Qwen2.5-0.5B_x", HubId(repo="Qwen/Qwen2.5-0.5B_x")),
        ("org/name@v1.0", HubId(repo="org/name", revision="v1.0")),
        ("org/name@refs/pr/3", HubId(repo="org/name", revision="refs/pr/3")),
        ("smollm2-135m-instruct", None),
        ("a/b/c", None),
        ("./org/name", None),
        ("../name", None),
        ("/org/name", None),
        ("~/name", None),
        ("org/", None),
        ("org/name/", None),
        ("org/name@", None),
        ("org/name@../../x", None),
        ("org/name@/x", None),
        ("org/..", None),
        ("org/a--b", None),
        ("org/name.gguf", None),
        ("org/model.safetensors", None),
        ("o/" + "n" * 95, None),
        ("örg/name", None),
        ("org/na me", None),
        ("", None),
    ],
)
def test_what_is_a_hub_id(text: str, expected: HubId | None) -> None:
    assert parse_hub_id(text) == expected
    assert expected is None or str(expected) == text


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["config.json", "pytorch_model.bin"], "pickled weights (pytorch_model.bin)"),
        (["config.json", "m.Q4_K.gguf", "README.md"], "GGUF files (m.Q4_K.gguf)"),
        (["adapter_config.json", "adapter_model.safetensors"], "adapter"),
        (["config.json", "consolidated.safetensors"], "(consolidated.safetensors)"),
        (["config.json"], "no weights"),
        (["model.safetensors"], "no config.json"),
        (["deep/config.json", "deep/model.safetensors"], "no config.json"),
        ([], "no config.json"),
        (["config.json", *(f"{i}.pt" for i in range(5))], "(0.pt, 1.pt, 2.pt, ...)"),
    ],
)
def test_repositories_without_what_we_need(names: list[str], says: str) -> None:
    with pytest.raises(ModelUnsupported) as caught:
        choose_files(TINY, names)
    assert says in caught.value.detail
    assert caught.value.detail.startswith("org/tiny ")


def test_only_what_we_need_is_chosen() -> None:
    assert choose_files(TINY, [*WITH_WEIGHTS, *JUNK, "tokenizer.json"]) == (
        ["config.json", "tokenizer.json"],
        ["model.safetensors"],
    )
    assert choose_files(TINY, [*WITH_WEIGHTS, "model.safetensors.index.json"])[1] is None


@pytest.mark.parametrize("sharded", [False, True])
def test_a_fetched_model_is_the_one_that_was_saved(
    fake: FakeHub, tmp_path: Path, sharded: bool
) -> None:
    expected = save_safetensors(tmp_path / "saved", sharded=sharded).state_dict()
    files = files_of(tmp_path / "saved")
    fake.add("org/tiny", files | JUNK)
    told: list[tuple[int, int]] = []
    hub = hub_of(fake, tmp_path, told)
    assert hub.cached(TINY) is None
    source = open_source("org/tiny", tmp_path, hub)
    assert list(source.tensor_names()) == sorted(expected)
    for name in source.tensor_names():
        assert torch.equal(source.read(name), expected[name])
    assert sorted(fake.downloads()) == sorted(files)
    weights = sum(len(data) for name, data in files.items() if name.endswith(".safetensors"))
    assert told[-1] == (weights, weights)


def test_what_is_cached_is_opened_without_asking(
    fake: FakeHub, tmp_path: Path, saved: dict[str, bytes]
) -> None:
    fake.add("org/tiny", saved)
    hub = hub_of(fake, tmp_path)
    directory = hub.fetch(TINY)
    fake.asked.clear()
    assert hub.cached(TINY) == hub.resolve(TINY) == hub.preview(TINY) == directory
    assert open_source("org/tiny", tmp_path, hub).files == (directory / "model.safetensors",)
    assert fake.asked == []


def test_the_main_branch_moves_when_it_is_fetched_again(
    fake: FakeHub, tmp_path: Path, saved: dict[str, bytes]
) -> None:
    first = fake.add("org/tiny", saved, "main", "v1")
    hub = hub_of(fake, tmp_path)
    assert hub.fetch(TINY).name == first
    second = fake.add("org/tiny", saved | {"tokenizer.json": b"{}"})
    assert hub.resolve(TINY).name == first
    fake.asked.clear()
    assert hub.fetch(TINY).name == second
    assert fake.downloads() == ["tokenizer.json"]  # the rest has the hashes that are here
    assert hub.resolve(HubId(repo="org/tiny", revision="v1")).name == first
    assert hub.resolve(HubId(repo="org/tiny", revision=first)).name == first
    fake.refs["org/tiny"]["refs/pr/2"] = second
    assert hub.resolve(HubId(repo="org/tiny", revision="refs/pr/2")).name == second


def test_an_update_that_fails_leaves_the_older_snapshot(fake: FakeHub, tmp_path: Path) -> None:
    save_safetensors(tmp_path / "saved", sharded=True)
    files = files_of(tmp_path / "saved")
    fake.add("org/tiny", files)
    hub = hub_of(fake, tmp_path)
    before = hub.fetch(TINY)
    shard = max(name for name in files if name.endswith(".safetensors"))
    fake.add("org/tiny", files | {shard: files[shard] + b"0", "vocab.json": b"{}"})
    fake.broken = {shard}
    assert "answered 500: try again" in refused(ConfigError, hub, "org/tiny")
    assert hub.cached(TINY) == before
    fake.broken = set()
    fake.asked.clear()
    assert hub.fetch(TINY) != before
    assert fake.downloads() == [shard]


def test_a_local_directory_comes_first(
    fake: FakeHub, tmp_path: Path, saved: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add("org/tiny", saved)
    save_safetensors(tmp_path / "org" / "tiny", "qwen2")
    monkeypatch.chdir(tmp_path)
    assert open_source("org/tiny", tmp_path, hub_of(fake, tmp_path)).config.model_type == "qwen2"
    assert fake.asked == []


def test_without_a_hub_only_the_cache_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    with pytest.raises(ModelUnknown, match="shoal model get org/tiny@v2"):
        open_source("org/tiny@v2", tmp_path)
    with pytest.raises(ModelUnknown, match="ORG/NAME"):
        open_source(Path("org/tiny"), tmp_path, Hub(endpoint="http://127.0.0.1:1"))


def test_a_preview_fetches_no_weights(
    fake: FakeHub, tmp_path: Path, saved: dict[str, bytes]
) -> None:
    fake.add("org/tiny", saved)
    hub = hub_of(fake, tmp_path)
    outline = SavedOutline(hub.preview(TINY))
    assert outline.config.model_type == "llama"
    assert "model.safetensors" not in fake.downloads()
    assert hub.cached(TINY) is None
    with pytest.raises(ModelUnsupported, match="tokenizer"):
        outline.tokenizer()


def test_a_repository_that_lets_nobody_in(
    fake: FakeHub, tmp_path: Path, saved: dict[str, bytes]
) -> None:
    fake.add("org/gated", saved)
    fake.gated.add("org/gated")
    hub = hub_of(fake, tmp_path)
    detail = refused(ConfigError, hub, "org/gated")
    assert f"ask for access at {fake.endpoint}/org/gated" in detail
    assert "HF_TOKEN" in detail
    assert "hf auth login" in refused(ModelUnknown, hub, "org/missing")
    assert "not this revision" in refused(ModelUnknown, hub, "org/gated@v9")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "strange", "auto_map": {"AutoConfig": "modeling_tiny.X"}}, "never run"),
        ({"model_type": "strange"}, "transformers rejects config.json"),
        ({"model_type": "t5"}, "'t5' cannot be served"),
    ],
)
def test_what_cannot_be_served_is_refused_before_its_weights_travel(
    fake: FakeHub, tmp_path: Path, saved: dict[str, bytes], config: dict[str, object], says: str
) -> None:
    fake.add("org/tiny", saved | JUNK | {"config.json": json.dumps(config).encode()})
    detail = refused(ModelUnsupported, hub_of(fake, tmp_path), "org/tiny")
    assert detail.startswith("org/tiny: ")
    assert says in detail
    assert "model.safetensors" not in fake.downloads()
    assert "modeling_tiny.py" not in fake.downloads()


@pytest.mark.parametrize(
    "index",
    [b"{", b"[]", b'{"weight_map": {}}', b'{"weight_map": {"x": "../x.safetensors"}}',
     b'{"weight_map": {"x": "x.bin"}}', b'{"weight_map": {"x": 3}}',
     b'{"weight_map": {"x": "gone.safetensors"}}'],
)  # fmt: skip
def test_a_hostile_index_is_corrupt(
    fake: FakeHub, tmp_path: Path, saved: dict[str, bytes], index: bytes
) -> None:
    fake.add("org/tiny", saved | {"model.safetensors.index.json": index})
    hub = hub_of(fake, tmp_path)
    refused(ModelCorrupt, hub, "org/tiny")
    assert hub.cached(TINY) is None


def test_off_line(
    fake: FakeHub,
    tmp_path: Path,
    saved: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake.add("org/tiny", saved)
    hub = hub_of(fake, tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    detail = refused(ConfigError, hub, "org/tiny")
    assert "HF_HUB_OFFLINE" in detail
    assert "shoal model get org/tiny" in detail
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    directory = hub.fetch(TINY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with caplog.at_level(logging.WARNING, "shoal.model.hub"):
        assert hub.fetch(TINY) == directory
    assert "cached copy of org/tiny" in caplog.text


def test_no_network(fake: FakeHub, tmp_path: Path) -> None:
    hub = Hub(endpoint="http://127.0.0.1:1", cache_dir=tmp_path)
    detail = refused(ConfigError, hub, "org/tiny")
    assert "http://127.0.0.1:1 cannot be reached" in detail
    assert "HF_ENDPOINT" in detail


def test_a_web_server_that_is_no_hub(fake: FakeHub, tmp_path: Path) -> None:
    fake.commits["org/tiny"] = {}
    fake.refs["org/tiny"] = {}
    hub = Hub(endpoint=f"{fake.endpoint}/api/models/org", cache_dir=tmp_path)
    with pytest.raises(ShoalError):
        hub.fetch(TINY)


def test_no_room(fake: FakeHub, tmp_path: Path, saved: dict[str, bytes]) -> None:
    class Large(bytes):
        def __len__(self) -> int:
            return 1 << 60

    fake.add("org/tiny", saved | {"model.safetensors": Large(b"0")})
    assert "bytes free" in refused(ConfigError, hub_of(fake, tmp_path), "org/tiny")


def test_an_interrupt_stops_the_work_in_its_thread() -> None:
    ended = threading.Event()

    def work(stop: threading.Event) -> None:
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)
        if stop.wait(60):
            ended.set()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            _stoppable(work)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.wait(60)


def test_the_same_weights_under_other_names_are_not_read(
    tmp_path: Path, saved: dict[str, bytes]
) -> None:
    (tmp_path / "saved" / "consolidated.safetensors").write_bytes(b"of another program")
    source = open_source(tmp_path / "saved", tmp_path)
    assert [path.name for path in source.files] == ["model.safetensors"]
