"""A directory as transformers saves it: config.json, *.safetensors, tokenizer files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer

from shoal.base.content import SIDE_FILES
from shoal.base.errors import ModelCorrupt, ModelUnknown, ModelUnsupported
from shoal.model.families import family_of
from shoal.model.hub_files import INDEX, ONE_FILE, PICKLE_SUFFIXES
from shoal.model.rows import tensor_bytes
from shoal.model.safetensors_header import TensorPlace, read_places
from shoal.model.source import StoredTensor, pickle_refusal

_PIECE_BYTES: Final = 16 << 20

TORCH_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_NOT_IDENTITY = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures"}
)
"""Config keys that say who saved the model or how to run it, not what it computes."""


class SavedOutline:
    """Config and tokenizer of a directory whose weights may be missing.

    Raises:
        ModelUnknown, ModelCorrupt, ModelUnsupported: as `SafetensorsSource`.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        _read_config_json(directory)
        self.config = read_config(directory)
        family_of(self.config)

    def tokenizer(self) -> Any:
        """The tokenizer that was saved there."""
        return read_tokenizer(self._directory)


class SafetensorsSource:
    """Weights in one safetensors file or several, read one by one.

    Tensors are read into memory of their own, not mapped: mapped pages would count as this
    process's memory beside the copies that a server keeps, and a file that is replaced
    while we serve would change the weights.

    Raises:
        ModelUnknown: not a model directory.
        ModelUnsupported: pickled weights, or an architecture without support.
        ModelCorrupt: a broken header, a file cut short, a shard or a tensor missing.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._config_json = _read_config_json(directory)
        self.config = read_config(directory)
        family_of(self.config)
        self._places_of: dict[Path, dict[str, TensorPlace]] = {}
        self._file_of = self._locate_tensors()

    @property
    def identity(self) -> Mapping[str, Any]:
        """config.json without what depends on who saved it."""
        return {k: v for k, v in self._config_json.items() if k not in _NOT_IDENTITY}

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files, sorted."""
        return tuple(sorted(set(self._file_of.values())))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """From generation_config.json where it says so, else from config.json."""
        return end_tokens(self.config, self._directory)

    def tensor_names(self) -> Sequence[str]:
        """All tensors, sorted."""
        return sorted(self._file_of)

    def stored(self, name: str) -> StoredTensor:
        """Shape and type from the file's header."""
        place = self._place(name)
        return StoredTensor(shape=place.shape, dtype=place.dtype)

    def stored_bytes(self, name: str) -> Iterator[memoryview]:
        """The tensor's raw bytes, piece by piece."""
        place, path = self._place(name), self._file_of[name]
        with path.open("rb") as file:
            file.seek(place.offset)
            left = place.num_bytes
            while left:
                piece = file.read(min(left, _PIECE_BYTES))
                if not piece:
                    raise _cut_short(path, name)
                left -= len(piece)
                yield memoryview(piece)

    def read_stored(self, name: str, start: int, count: int) -> bytes:
        """A part of the tensor's raw bytes."""
        place, path = self._place(name), self._file_of[name]
        count = max(0, min(count, place.num_bytes - start))
        with path.open("rb", buffering=0) as file:
            file.seek(place.offset + start)
            piece = file.read(count)
        if len(piece) != count:
            raise _cut_short(path, name)
        return piece

    def side_files(self) -> Mapping[str, bytes]:
        """Tokenizer files and generation_config.json, as they are."""
        paths = (self._directory / name for name in sorted(SIDE_FILES))
        return {path.name: path.read_bytes() for path in paths if path.is_file()}

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype, in memory of its own."""
        place, path = self._place(name), self._file_of[name]
        dtype = TORCH_DTYPES.get(place.dtype)
        if dtype is None:
            raise ModelUnsupported(f"{path}: {name} is stored as {place.dtype}")
        raw = torch.empty(place.num_bytes, dtype=torch.uint8)
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(place.offset)
                _read_fully(file, tensor_bytes(raw), path, name)
        except OSError as error:
            raise ModelCorrupt(f"{path}: cannot read {name}: {error}") from error
        return raw.view(dtype).view(place.shape)

    def tokenizer(self) -> Any:
        """The tokenizer that was saved beside the weights."""
        return read_tokenizer(self._directory)

    def _place(self, name: str) -> TensorPlace:
        return self._places(self._file_of[name])[name]

    def _places(self, path: Path) -> dict[str, TensorPlace]:
        """Where a file's tensors are.

        The library checks the file, and is not left with it: it would keep it mapped, which
        limits on a process's memory (RLIMIT_DATA, RLIMIT_AS) count.
        """
        places = self._places_of.get(path)
        if places is None:
            try:
                with safe_open(path, framework="pt"):
                    pass
            except FileNotFoundError as error:
                raise ModelCorrupt(f"{path} is missing: fetch the model again") from error
            except SafetensorError as error:
                raise ModelCorrupt(
                    f"{path} is truncated or altered ({error}): fetch the model again"
                ) from error
            places = self._places_of[path] = read_places(path)
        return places

    def _locate_tensors(self) -> dict[str, Path]:
        index = self._directory / INDEX
        if index.exists():
            return self._from_index(_read_json(index))
        # Hub snapshots may hold the same weights again, under names of other programs.
        one_file = self._directory / ONE_FILE
        files = [one_file] if one_file.exists() else sorted(self._directory.glob("*.safetensors"))
        if not files:
            raise _no_weights(self._directory)
        return {name: path for path in files for name in self._places(path)}

    def _from_index(self, index: Mapping[str, Any]) -> dict[str, Path]:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelCorrupt(f"{self._directory / INDEX} has no weight_map")
        located: dict[str, Path] = {}
        for name, file_name in weight_map.items():
            if not isinstance(file_name, str) or Path(file_name).name != file_name:
                raise ModelCorrupt(f"{INDEX} points outside its directory: {file_name!r}")
            located[name] = self._directory / file_name
        held = {path: set(self._places(path)) for path in set(located.values())}
        for name, path in located.items():
            if name not in held[path]:
                raise ModelCorrupt(f"{path} lacks {name}, which {INDEX} says is in it")
        return located


def end_tokens(config: Any, directory: Path | None) -> tuple[int, ...]:
    """From generation_config.json in `directory` where it says so, else from the config."""
    value = getattr(config, "eos_token_id", None)
    if directory is not None and (directory / "generation_config.json").exists():
        value = _read_json(directory / "generation_config.json").get("eos_token_id", value)
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)


def _read_fully(file: Any, target: memoryview, path: Path, name: str) -> None:
    done = 0
    while done < target.nbytes:
        count = file.readinto(target[done : done + _PIECE_BYTES])
        if not count:
            raise _cut_short(path, name)
        done += count


def _cut_short(path: Path, name: str) -> ModelCorrupt:
    return ModelCorrupt(f"{path} is truncated in {name}: fetch the model again")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ModelCorrupt(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelCorrupt(f"{path} is not a JSON object")
    return value


def _read_config_json(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.exists():
        raise ModelUnknown(
            f"{directory} is not a model: no config.json (MODEL is a directory with config.json "
            "and *.safetensors, a .gguf file, a known name or a hub id)"
        )
    return _read_json(path)


def read_config(directory: Path) -> Any:
    """The transformers config of a model directory. Code beside it is never run.

    Raises:
        ModelUnsupported: transformers does not know such a model, or wants its own code.
    """
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        if "auto_map" in _read_json(directory / "config.json"):
            raise ModelUnsupported(
                f"{directory} needs code of its own (auto_map in config.json), which is never run: "
                "take a model whose architecture is in transformers (see: shoal model inspect "
                "--families)"
            ) from error
        raise ModelUnsupported(f"{directory}: transformers rejects config.json: {error}") from error


def read_tokenizer(directory: Path) -> Any:
    """The transformers tokenizer of a model directory. Code beside it is never run.

    Raises:
        ModelUnsupported: there is none that can be used.
    """
    try:
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelUnsupported(f"{directory} has no usable tokenizer: {error}") from error


def _no_weights(directory: Path) -> Exception:
    for suffix in PICKLE_SUFFIXES:
        for path in sorted(directory.glob(f"*{suffix}")):
            return ModelUnsupported(pickle_refusal(path.name))
    return ModelCorrupt(f"{directory} has a config.json but no *.safetensors: fetch it again")
