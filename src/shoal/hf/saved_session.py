"""A session as a file: everything that is needed to go on elsewhere, and nothing to run.

The format is safetensors with JSON in its header, so reading it executes nothing. It holds
the inputs in the calls they came in (a replay then repeats their call shapes), not the
KV cache: new servers compute it again. It is as private as the conversation itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from shoal.base.errors import ConfigError
from shoal.base.limits import SESSION_TOKENS_MAX
from shoal.hf.chain_row import Chunk, ChunkKind

FORMAT: Final = "shoal-session-1"
_KINDS: Final = get_args(ChunkKind)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedSession:
    """What a file holds."""

    model: str
    """The model's hash."""
    borders: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    generation_config: dict[str, Any] | None
    rng_state: torch.Tensor | None
    """torch's, of the CPU."""
    adapter: str = ""
    """Name of the LoRA adapter, as 32 hex characters; empty: none."""
    note: str | None = None
    """Whatever else its writer wants to read again (`saved_answer.py`)."""


def pack(saved: SavedSession) -> bytes:
    """The file's bytes.

    Raises:
        ConfigError: the generation config holds what JSON has no word for.
    """
    ids = [chunk.values for chunk in saved.chunks if chunk.kind == "ids"]
    given = [chunk.values for chunk in saved.chunks if chunk.kind != "ids"]
    tensors = {
        "counts": torch.tensor([chunk.count for chunk in saved.chunks], dtype=torch.int64),
        "kinds": torch.tensor([_KINDS.index(chunk.kind) for chunk in saved.chunks]).to(torch.uint8),
        "token_ids": torch.cat(ids).to(torch.int64) if ids else torch.zeros(0, dtype=torch.int64),
    }
    if given:
        # float32 holds every dtype that rows are computed in unchanged.
        tensors["given"] = torch.cat([values.to(torch.float32) for values in given]).contiguous()
    if saved.rng_state is not None:
        tensors["rng_state"] = saved.rng_state
    try:
        generation_config = json.dumps(saved.generation_config)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the generation config can't be saved: {error}") from error
    header = {
        "format": FORMAT,
        "model": saved.model,
        "borders": json.dumps(saved.borders),
        "generation_config": generation_config,
    }
    if saved.adapter:
        header["adapter"] = saved.adapter
    if saved.note is not None:
        header["note"] = saved.note
    header["digest"] = _digest(header, tensors)
    data: bytes = save(tensors, metadata=header)
    return data


def unpack(data: bytes, hidden_size: int | None = None) -> SavedSession:
    """The session in a file's bytes; rows that were given must be of `hidden_size`, if it is.

    Raises:
        ConfigError: not such a file, or one that contradicts itself.
    """
    try:
        header = _header(data)
        _check_format(header["format"])
        model = header["model"]
        tensors = load(data)
        if header.get("digest", "") not in ("", _digest(header, tensors)):
            raise ValueError("bytes of it were changed")
        borders = json.loads(header["borders"])
        generation_config = json.loads(header["generation_config"])
        chunks = _chunks(tensors, hidden_size)
        if not isinstance(generation_config, dict | None):
            raise ValueError("a generation config that is no object")
        if not isinstance(borders, list) or not all(type(border) is int for border in borders):
            raise ValueError("borders that are no numbers")
        rng_state = tensors.get("rng_state")
        if rng_state is not None and (rng_state.dtype, rng_state.dim()) != (torch.uint8, 1):
            raise ValueError("a random state of a wrong type")
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ConfigError(f"this is no saved session ({FORMAT}): {error}") from error
    return SavedSession(
        model=model,
        borders=tuple(borders),
        chunks=chunks,
        generation_config=generation_config,
        rng_state=rng_state,
        adapter=header.get("adapter", ""),
        note=header.get("note"),
    )


def write_file(path: Path, data: bytes) -> None:
    """Put the bytes there whole or not at all; only the owner may read them.

    Raises:
        ConfigError: the place can't be written.
    """
    partial: str | None = None
    try:
        handle, partial = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(handle)  # else a power failure may leave the new name and no bytes
        os.replace(partial, path)
    except OSError as error:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)
        raise ConfigError(f"can't write {path}: {error}") from error


def read_file(path: Path, bytes_max: int | None = None) -> bytes:
    """The file's bytes.

    Raises:
        ConfigError: it can't be read, or is larger than `bytes_max`.
    """
    try:
        with path.open("rb") as file:
            data = file.read() if bytes_max is None else file.read(bytes_max + 1)
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error}") from error
    if bytes_max is not None and len(data) > bytes_max:
        raise ConfigError(f"{path} has more than {bytes_max} bytes: it can't be a file of ours")
    return data


def _check_format(found: str) -> None:
    if found != FORMAT:
        family = FORMAT.rpartition("-")[0]
        hint = ": use the version of shoal that wrote it" if str(found).startswith(family) else ""
        raise ValueError(f"it has the format {found!r}{hint}")


def _digest(header: dict[str, str], tensors: dict[str, torch.Tensor]) -> str:
    """Of all that the file says: a disk's mistake must not become another text."""
    summary = hashlib.blake2b(digest_size=16)
    for name in sorted(header.keys() - {"digest"}):
        summary.update(f"{name}={header[name]}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        summary.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        summary.update(tensor.numpy().tobytes())
    return summary.hexdigest()


def _header(data: bytes) -> dict[str, str]:
    """The strings that safetensors keeps beside the tensors; `load` does not return them."""
    length = int.from_bytes(data[:8], "little")
    if not 0 < length <= len(data) - 8:
        raise ValueError("its header is cut off")
    header = json.loads(data[8 : 8 + length])["__metadata__"]
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return header


def _chunks(tensors: dict[str, torch.Tensor], hidden_size: int | None) -> tuple[Chunk, ...]:
    counts, kinds, ids = (tensors[name] for name in ("counts", "kinds", "token_ids"))
    given = tensors.get("given", torch.zeros(0, hidden_size or 1))
    if counts.dim() != 1 or counts.shape != kinds.shape or ids.dim() != 1:
        raise ValueError("tables of different sizes")
    is_given_right = given.dim() == 2 and hidden_size in (None, given.shape[1])
    if not is_given_right or ids.dtype != torch.int64:
        raise ValueError("given rows or token ids of a wrong shape or type")
    sizes: list[int] = counts.tolist()
    names = [_KINDS[int(kind)] for kind in kinds if int(kind) < len(_KINDS)]
    if len(names) != len(sizes) or min(sizes, default=1) < 1 or sum(sizes) > SESSION_TOKENS_MAX:
        raise ValueError("calls of an impossible kind or size")
    return _laid_out(sizes, names, ids, given)


def _laid_out(
    sizes: Sequence[int], names: Sequence[ChunkKind], ids: torch.Tensor, given: torch.Tensor
) -> tuple[Chunk, ...]:
    chunks: list[Chunk] = []
    position = used_ids = used_given = 0
    for size, kind in zip(sizes, names, strict=True):
        if kind == "ids":
            values = ids[used_ids : used_ids + size]
            used_ids += size
        else:
            values = given[used_given : used_given + size]
            used_given += size
        chunks.append(Chunk(kind=kind, position=position, values=values))
        position += size
    if (used_ids, used_given) != (ids.shape[0], given.shape[0]):
        raise ValueError("calls and inputs of different lengths")
    return tuple(chunks)
