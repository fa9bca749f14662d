"""LoRA adapters on the command line: whose they are, and reading them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from shoal.base.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from shoal.base.adapters import AdapterPart
    from shoal.cli.models import OpenModel
    from shoal.client.client import Client
    from shoal.discovery.directory import Snapshot
    from shoal.hf.generation import TokenHead
    from shoal.hf.head import Head
    from shoal.hf.saved_answer import SavedAnswer
    from shoal.server.adapters import AdapterLimits

LABEL_CHARS_MAX: Final = 64

AdapterOption = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|NAME",
        help="A LoRA adapter that all tokens go through: a directory as PEFT saves it, which is "
        "sent to the servers, or the name of one that they serve (see: shoal status). Or a "
        "directory with a prompt, which stays here; generate also takes deep prompts and "
        "classifiers (see: shoal finetune).",
    ),
]
ServedAdaptersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME=DIR",
        help="Serve a LoRA adapter, as PEFT saves it, to everybody under this name; repeat for "
        "more. Sessions with different adapters, and with none, run together.",
    ),
]
ADAPTER_MEMORY: Final = "1GiB"

AdapterMemoryOption = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        help="Memory for adapters that clients bring, a quarter of it for each; those that are "
        "not in use make room. 0 takes none.",
    ),
]
CLIENT_SHARE: Final = 4


def parse_served(given: Sequence[str] | None) -> dict[str, Path]:
    """Directories of adapters by name.

    Raises:
        ConfigError: no NAME=DIR, or a name twice.
    """
    found: dict[str, Path] = {}
    for text in given or ():
        label, equals, path = text.partition("=")
        is_label = 0 < len(label) <= LABEL_CHARS_MAX and label == label.strip()
        if not equals or not path or not is_label:
            raise ConfigError(f"--adapter {text!r}: write NAME=DIR, for example poet=./my-adapter")
        if label in found:
            raise ConfigError(f"--adapter: two are called {label!r}; give them different names")
        found[label] = Path(path)
    return found


def adapter_limits(num_bytes: int) -> AdapterLimits:
    """The bounds that `--adapter-memory` means."""
    from shoal.server.adapters import AdapterLimits

    return AdapterLimits(bytes_max=num_bytes, bytes_per_client=num_bytes // CLIENT_SHARE)


def read_served(given: Mapping[str, Path], model: OpenModel) -> dict[str, AdapterPart]:
    """The adapters in these directories.

    Raises:
        AdapterBad: names what is wrong with one.
    """
    from shoal.model.adapter_files import read_peft

    return {label: read_peft(path, model.source.config) for label, path in given.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenAdapter:
    """An adapter that a client's tokens go through."""

    name: bytes = b""
    """Empty: none."""
    part: AdapterPart | None = None
    """Its tensors, where we bring them; None: servers have them."""
    prompt: torch.Tensor | None = None
    """(P, D) instead: embeddings that stand before the text. They stay here."""

    def ids_before(self, vocabulary: int) -> tuple[int, ...]:
        """Tokens that stand for the prompt; see `shoal.hf.tuning_prompted`."""
        count = 0 if self.prompt is None else len(self.prompt)
        return tuple(range(vocabulary, vocabulary + count))

    def around(self, head: Head) -> TokenHead:
        """A head that embeds the prompt's tokens as well."""
        if self.prompt is None:
            return head
        from shoal.hf.tuning_prompted import PromptedHead

        return PromptedHead(head, self.prompt)

    def offered_by(self, client: Client) -> bytes:
        """Its name, once the client can bring it; empty where servers need none."""
        if self.prompt is not None:
            return b""
        return self.name if self.part is None else client.adapters.add(self.part)


def choose_adapter(given: str | None, model: OpenModel, snapshot: Snapshot) -> ChosenAdapter:
    """The adapter that a person means: a directory, or what servers call so.

    A directory may hold a prompt (prompt tuning) instead.

    Raises:
        AdapterBad: the directory holds none that can be used.
        ConfigError: no such directory, and no server has one of this name; or it holds what
            has no sessions, or was learned for another model.
    """
    if not given:
        return ChosenAdapter()
    directory = Path(given)
    if directory.is_dir():
        from shoal.cli.learned import is_learned, read_prompt_of
        from shoal.model.adapter_files import read_peft

        if is_learned(directory):
            name, prompt = read_prompt_of(directory, model)
            return ChosenAdapter(name=name, prompt=prompt)

        part = read_peft(directory, model.source.config)
        return ChosenAdapter(name=part.manifest.name, part=part)
    from shoal.client.adapters import find_adapter

    view = snapshot.view(model.name, (model.num_blocks, model.hidden_size))
    return ChosenAdapter(name=find_adapter(view, given))


def adapter_to_resume(
    given: str | None, answer: SavedAnswer, model: OpenModel, snapshot: Snapshot
) -> ChosenAdapter:
    """The adapter that an answer began with: as given, or that of a server.

    Raises:
        ConfigError: another one is given, or nobody has it.
    """
    chosen = choose_adapter(given or answer.adapter, model, snapshot)
    if chosen.name.hex() != answer.adapter:
        began = f"adapter {answer.adapter}" if answer.adapter else "no adapter"
        raise ConfigError(f"the answer began with {began}: give --adapter as it was then")
    return chosen


def check_adapter(given: str | None, *, is_thin: bool) -> str | None:
    """What `--adapter` says; with `--thin` a name, of an adapter that servers of all blocks have.

    Raises:
        ConfigError: a thin client brings none.
    """
    if is_thin and given and Path(given).is_dir():
        raise ConfigError(
            "--adapter DIR and --thin: only a client with a head of its own brings an adapter; "
            "leave --thin out, or name one that servers have (shoal serve --adapter NAME=DIR)"
        )
    return given
