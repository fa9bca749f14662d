"""Sessions as files: what is written is read; what is broken is refused."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from shoal.base.errors import ConfigError
from shoal.hf.chain_row import Chunk
from shoal.hf.saved_session import SavedSession, pack, read_file, unpack, write_file

HIDDEN = 4

chunk_kinds = st.lists(
    st.tuples(st.sampled_from(["ids", "embeddings", "hidden"]), st.integers(1, 5)), max_size=6
)


def saved_session(kinds: list[tuple[Any, int]]) -> SavedSession:
    chunks: list[Chunk] = []
    position = 0
    generator = torch.Generator().manual_seed(0)
    for kind, count in kinds:
        if kind == "ids":
            values = torch.randint(0, 1000, (count,), generator=generator)
        else:
            values = torch.randn(count, HIDDEN, generator=generator)
        chunks.append(Chunk(kind=kind, position=position, values=values))
        position += count
    return SavedSession(
        model="ab" * 16,
        borders=(0, 3, 7),
        chunks=tuple(chunks),
        generation_config={"temperature": 0.5, "eos_token_id": [1, 2]},
        rng_state=torch.get_rng_state(),
    )


@given(kinds=chunk_kinds)
def test_what_is_packed_is_unpacked(kinds: list[tuple[Any, int]]) -> None:
    saved = saved_session(kinds)
    again = unpack(pack(saved), HIDDEN)
    assert (again.model, again.borders) == (saved.model, saved.borders)
    assert again.generation_config == saved.generation_config
    assert again.rng_state is not None
    assert saved.rng_state is not None
    assert torch.equal(again.rng_state, saved.rng_state)
    assert len(again.chunks) == len(saved.chunks)
    for mine, theirs in zip(again.chunks, saved.chunks, strict=True):
        assert (mine.kind, mine.position) == (theirs.kind, theirs.position)
        assert torch.equal(mine.values, theirs.values)


@given(data=st.binary(max_size=300))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError, match="no saved session"):
        unpack(data, HIDDEN)


@given(at=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_harmless(at: int, value: int) -> None:
    data = bytearray(pack(saved_session([("ids", 3), ("hidden", 2)])))
    data[at % len(data)] = value
    try:
        saved = unpack(bytes(data), HIDDEN)
    except ConfigError:
        return
    assert sum(chunk.count for chunk in saved.chunks) == 5


def test_a_pickle_is_refused_unread() -> None:
    file = io.BytesIO()
    torch.save({"counts": torch.ones(1)}, file)
    with pytest.raises(ConfigError, match="no saved session"):
        unpack(file.getvalue(), HIDDEN)


@pytest.mark.parametrize(
    "change",
    [
        {"counts": torch.tensor([9])},
        {"counts": torch.tensor([-3, 6, 2])},
        {"counts": torch.tensor([2, 2])},
        {"kinds": torch.tensor([0, 7], dtype=torch.uint8)},
        {"token_ids": torch.zeros(3)},
        {"given": torch.zeros(2, HIDDEN + 1)},
        {"rng_state": torch.zeros(3)},
        {"token_ids": None},
        {"given": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_contradictions_are_refused(change: dict[str, torch.Tensor | None]) -> None:
    good = pack(saved_session([("ids", 3), ("hidden", 2)]))
    tensors = {k: v for k, v in (load(good) | change).items() if v is not None}
    with pytest.raises(ConfigError, match="no saved session"):
        unpack(save(tensors, metadata=metadata_of(good)), HIDDEN)


@pytest.mark.parametrize(
    "change",
    [{"format": "shoal-session-9"}, {"borders": '"x"'}, {"borders": "{"},
     {"generation_config": "[1]"}, {"model": None}],
    ids=str,
)  # fmt: skip
def test_headers_that_cannot_be_are_refused(change: dict[str, str | None]) -> None:
    good = pack(saved_session([("ids", 3)]))
    header = {k: v for k, v in (metadata_of(good) | change).items() if v is not None}
    with pytest.raises(ConfigError, match="no saved session"):
        unpack(save(load(good), metadata=header), HIDDEN)


def test_a_config_without_words_in_json_is_refused() -> None:
    saved = replace(saved_session([("ids", 2)]), generation_config={"seed": torch.ones(1)})
    with pytest.raises(ConfigError, match="generation config can't be saved"):
        pack(saved)


def test_files_are_private_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "talk"
    write_file(path, b"one")
    write_file(path, b"two")
    assert read_file(path) == b"two"
    assert path.stat().st_mode & 0o077 == 0
    assert [one.name for one in tmp_path.iterdir()] == ["talk"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="can't write"):
        write_file(tmp_path / "folder", b"")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["folder", "talk"]


def metadata_of(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    header: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    return header
