"""Which models of the hub there can be, and which of a repository's files are taken."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shoal.base.content import SIDE_FILES
from shoal.base.errors import ModelCorrupt, ModelUnsupported

CONFIG: Final = "config.json"
INDEX: Final = "model.safetensors.index.json"
ONE_FILE: Final = "model.safetensors"

SMALL_FILES: Final = frozenset(
    {
        CONFIG,
        INDEX,
        "sentencepiece.bpe.model",
        "spiece.model",
        "tekken.json",
        *(SIDE_FILES - {"tokenizer.gguf"}),
    }
)
"""All that is taken besides weights, from the top folder of a repository."""

PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt")
"""Files that hold pickled weights: reading them runs code of whoever made them."""

_FILE_SUFFIXES: Final = (*PICKLE_SUFFIXES, ".gguf", ".safetensors", ".json", ".git")
_REPO: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION: Final = re.compile(r"[A-Za-z0-9][\w./-]*", re.ASCII)
_ID_CHARS_MAX: Final = 96
"""As the hub itself allows."""

_NAMED_MAX: Final = 3
"""Files that an error names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubId:
    """A repository and, maybe, one of its branches, tags or commits."""

    repo: str
    revision: str | None = None
    """None: the main branch."""

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def parse_hub_id(text: str) -> HubId | None:
    """What `ORG/NAME` or `ORG/NAME@REVISION` names; None if `text` looks like neither.

    Only the look counts: whether there is a file or folder of that name is asked elsewhere,
    and comes first.
    """
    repo, at, revision = text.partition("@")
    if not _REPO.fullmatch(repo) or len(repo) > _ID_CHARS_MAX or ".." in text or "--" in repo:
        return None
    if repo.endswith((*_FILE_SUFFIXES, "-", ".")) or (at and not _REVISION.fullmatch(revision)):
        return None
    return HubId(repo=repo, revision=revision or None)


def choose_files(hub_id: HubId, names: Collection[str]) -> tuple[list[str], list[str] | None]:
    """Of a repository's files: the small ones, and the weights (None: as its index says).

    Raises:
        ModelUnsupported: no config, or no weights in safetensors under transformers' names.
    """
    if CONFIG not in names or not {INDEX, ONE_FILE} & set(names):
        raise ModelUnsupported(f"{hub_id} {_why_not(sorted(names))}")
    small = sorted(SMALL_FILES.intersection(names))
    return small, None if INDEX in names else [ONE_FILE]


def _why_not(names: Sequence[str]) -> str:
    def listed(*suffixes: str) -> str:
        found = [name for name in names if name.endswith(suffixes)]
        more = ", ..." if len(found) > _NAMED_MAX else ""
        return ", ".join(found[:_NAMED_MAX]) + more

    if gguf := listed(".gguf"):
        return f"holds GGUF files ({gguf}): download the one you want and give its path"
    if "adapter_config.json" in names:
        return "is an adapter, not a model: give the id of the model that it belongs to"
    if pickled := listed(*PICKLE_SUFFIXES):
        return (
            f"has only pickled weights ({pickled}), and loading those runs code of whoever made "
            "them: look for a repository or a revision (@refs/pr/N) with model.safetensors"
        )
    if CONFIG not in names:
        return "has no config.json at its top: it is not a model in transformers' format"
    if other := listed(".safetensors"):
        return f"has safetensors, but not under transformers' names ({other})"
    return "has no weights in safetensors"


def weight_files(index: Path) -> list[str]:
    """The files that an index of shards names, sorted.

    Raises:
        ModelCorrupt: not such an index, or it points outside its directory.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        found = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelCorrupt(f"{index} is not an index of weights: {error!r}") from error
    for name in found:
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or not name.endswith(".safetensors")
        ):
            raise ModelCorrupt(f"{index} names {name!r}, which is no safetensors file beside it")
    if not found:
        raise ModelCorrupt(f"{index} names no weights")
    return found


def files_of_index(index: Path, names: Collection[str]) -> list[str]:
    """The files that an index names, all of which must be among `names`.

    Raises:
        ModelCorrupt: as `weight_files`, or one is not.
    """
    found = weight_files(index)
    missing = [name for name in found if name not in names]
    if missing:
        raise ModelCorrupt(f"{index} names {missing[0]}, which the repository does not have")
    return found


def is_whole(directory: Path) -> bool:
    """Whether all the weights of a snapshot are there."""
    if not (directory / INDEX).exists():
        return (directory / ONE_FILE).exists()
    try:
        return all((directory / name).exists() for name in weight_files(directory / INDEX))
    except ModelCorrupt:
        return False
