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
from shoal.model.known import KNOWN_MODELS, cached_model

if TYPE_CHECKING:
    import torch

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
"""Files that hold pickled weights: reading them runs code of whoever made them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor as it lies in the file, for the manifest."""

    shape: tuple[int, ...]
    """Shape as stored (a quantised tensor: of the values, not of the bytes)."""
    dtype: str
    """The file format's own name of the type, for example `F32`, `BF16`, `Q4_1`."""


class ModelSource(Protocol):
    """A model on disk or in memory. Cheap to open; not safe for use from two threads."""

    @property
    def config(self) -> Any:
        """The transformers config."""

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

    def tokenizer(self) -> Any:
        """The transformers tokenizer, chat template included.

        Raises:
            ModelUnsupported: the source has none that can be used.
        """


def open_source(model: str | Path, cache_dir: Path) -> ModelSource:
    """The model that a MODEL argument names: a directory, a `.gguf` file or a known name.

    `cache_dir` is where `shoal model get` keeps known models.

    Raises:
        ModelUnknown: nothing of that name, or a known model that was not fetched yet.
        ModelCorrupt: weights are truncated or altered.
        ModelUnsupported: an architecture or a format that cannot be served.
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
    raise ModelUnknown(
        f"no model {str(model)!r}: MODEL is a directory with config.json and *.safetensors, "
        f"a .gguf file, or one of the known names: {', '.join(sorted(KNOWN_MODELS))}"
    )


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
