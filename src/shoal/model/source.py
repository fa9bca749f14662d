"""Where a model's config, weights and tokenizer come from, whatever the file format.

`open_source` turns what a person types as MODEL into a `ModelSource`. Every source speaks
the tensor names of transformers; a GGUF file is translated on the way. Opening reads
headers only: weights are read tensor by tensor, when asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from shoal.base.errors import ConfigError, ModelUnknown, ModelUnsupported
from shoal.model.hub import Hub
from shoal.model.hub_files import PICKLE_SUFFIXES, parse_hub_id
from shoal.model.known import KNOWN_MODELS, cached_model

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor as it lies in the file, for the manifest."""

    shape: tuple[int, ...]
    """Shape as stored (a quantised tensor: of the values, not of the bytes)."""
    dtype: str
    """The file format's own name of the type, for example `F32`, `BF16`, `Q4_1`."""


class Outline(Protocol):
    """What a model is, without its weights."""

    @property
    def config(self) -> Any:
        """The transformers config."""

    def tokenizer(self) -> Any:
        """The transformers tokenizer, chat template included.

        Raises:
            ModelUnsupported: the source has none that can be used.
        """


class ModelSource(Outline, Protocol):
    """A model on disk or in memory. Cheap to open; not safe for use from two threads."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the file itself says about the architecture: JSON values only.

        Part of the model's name, so it must not depend on library versions.
        """

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold weights; empty for a source in memory."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text; may be empty."""

    def tensor_names(self) -> Sequence[str]:
        """All tensors, in transformers' naming, in a fixed order."""

    def stored(self, name: str) -> StoredTensor:
        """Shape and type of one tensor as stored."""

    def stored_bytes(self, name: str) -> Iterator[memoryview]:
        """The stored bytes of one tensor, piece by piece, for hashing."""

    def read_stored(self, name: str, start: int, count: int) -> bytes:
        """`count` of the stored bytes of one tensor from `start` on, fewer at its end.

        For handing weights out: may be called from another thread than the rest.

        Raises:
            KeyError: no such tensor.
            ModelCorrupt: the file ends before the tensor does.
        """

    def side_files(self) -> Mapping[str, bytes]:
        """Files that belong to the model beside its weights (`base.content.SIDE_FILES`)."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor, dequantised where it must be, in memory that nobody else holds.

        Raises:
            KeyError: no such tensor.
            ModelCorrupt: the file ends before the tensor does.
        """


def open_source(model: str | Path, cache_dir: Path, hub: Hub | None = None) -> ModelSource:
    """The model that a MODEL argument names.

    That is a directory, a `.gguf` file, a known name or a hub id; what is on the disk comes
    before what only has such a name. `cache_dir` is where `shoal model get` keeps known
    models. `hub` fetches an id that is not in the hub's cache; None: it must be there.

    Raises:
        ModelUnknown: nothing of that name, or one that was not fetched yet.
        ModelCorrupt: weights are truncated or altered.
        ModelUnsupported: an architecture or a format that cannot be served.
        ConfigError: the hub cannot be reached, or does not let us in.
    """
    from shoal.model.gguf_source import GgufSource
    from shoal.model.safetensors_source import SafetensorsSource

    path = Path(model).expanduser()
    if path.is_dir():
        only_gguf = _the_only_gguf(path)
        return GgufSource(only_gguf) if only_gguf is not None else SafetensorsSource(path)
    if path.is_file():
        _check_suffix(path)
        return GgufSource(path)
    if str(model) in KNOWN_MODELS:
        return GgufSource(cached_model(str(model), cache_dir))
    directory = None if isinstance(model, Path) else _hub_directory(model, hub)
    if directory is not None:
        return SafetensorsSource(directory)
    raise ModelUnknown(unknown_model(str(model)))


def unknown_model(given: str) -> str:
    """Why a MODEL argument names nothing, and what would."""
    return (
        f"no model {given!r}: MODEL is a directory with config.json and *.safetensors, "
        f"a .gguf file, one of the known names ({', '.join(sorted(KNOWN_MODELS))}), or a model "
        "of the Hugging Face hub (ORG/NAME)"
    )


def _hub_directory(given: str, hub: Hub | None) -> Path | None:
    hub_id = parse_hub_id(given)
    if hub_id is None:
        return None
    found = Hub().cached(hub_id) if hub is None else hub.resolve(hub_id)
    if found is None:
        raise ModelUnknown(
            f"there is no directory {given}, and as a hub id it is not in the hub's cache: run "
            f"`shoal model get {given}`"
        )
    return found


def _check_suffix(path: Path) -> None:
    if path.suffix == ".gguf":
        return
    if path.suffix in PICKLE_SUFFIXES:
        raise ModelUnsupported(pickle_refusal(path.name))
    if path.suffix == ".safetensors":
        raise ModelUnsupported(
            f"{path.name} is one file of a model: give its directory, which must also hold "
            "config.json"
        )
    raise ModelUnsupported(f"{path.name}: weights must be *.safetensors (a directory) or *.gguf")


def pickle_refusal(name: str) -> str:
    """Why a pickled checkpoint is refused, and what to do."""
    return (
        f"{name} is a pickled checkpoint: loading it runs code of whoever made it. Convert it "
        "to safetensors (model.save_pretrained in transformers) and give that directory"
    )


def _the_only_gguf(directory: Path) -> Path | None:
    if (directory / "config.json").exists():
        return None
    found = sorted(directory.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ConfigError(f"{directory} holds several GGUF files ({names}): name one of them")
    return found[0] if found else None
