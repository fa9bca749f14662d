"""An answer that is still coming, as a file: another process can go on with it.

The file is a saved session (`saved_session.py`) whose note says how the answer goes on: how
tokens are chosen, how many, in which encoding rows travel. What a position draws depends on
(seed, position) alone, so the tokens are all the state there is. `Session.load` reads the file
too; it ignores the note.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import msgspec
import torch

from shoal.base.errors import ConfigError
from shoal.base.limits import SESSION_TOKENS_MAX
from shoal.base.spans import Span
from shoal.hf.chain_row import Chunk
from shoal.hf.sampling import Sampler
from shoal.hf.saved_session import SavedSession, pack, unpack
from shoal.plan.view import Stage, SwarmView

FILE_BYTES_MAX: Final = 32 << 20
"""The longest answers have 17 bytes per token, and a header."""

NUMERICS: Final = ("exact", "same-class", "crossed")
"""The best first."""


class BlockClass(msgspec.Struct, frozen=True, kw_only=True):
    """Which numerics class computed some blocks."""

    start: int
    end: int
    numerics: str


class _Note(msgspec.Struct, frozen=True, kw_only=True):
    """What the file says beside the tokens; a reader ignores fields that it does not know."""

    given: str
    prompt_tokens: int
    max_new_tokens: int
    sampler: dict[str, Any]
    encoding: str
    is_compressed: bool
    numerics: str
    classes: list[BlockClass]
    adapter: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedAnswer:
    """An answer so far."""

    model: str
    """The model's hash."""
    given: str
    """How the person named it; an absolute path where it was one."""
    num_blocks: int
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...] = ()
    """New tokens so far; an end token is included."""
    max_new_tokens: int
    sampler: Sampler
    encoding: str
    is_compressed: bool
    """Whether servers sent each other compressed rows."""
    adapter: str = ""
    """Name of the LoRA adapter that all tokens go through, as 32 hex characters; empty: none."""
    numerics: str = "exact"
    """What changes of servers did to the numbers so far."""
    classes: tuple[BlockClass, ...] = ()
    """Who computed the tokens so far; empty before the first."""

    @property
    def tokens_left(self) -> int:
        """How many more may come."""
        return max(0, self.max_new_tokens - len(self.token_ids))

    def is_complete(self, eos_ids: Iterable[int]) -> bool:
        """Whether nothing is left to do."""
        return not self.tokens_left or (bool(self.token_ids) and self.token_ids[-1] in set(eos_ids))

    def raised(self, max_new_tokens: int) -> SavedAnswer:
        """With another limit; the tokens that are there stay."""
        return replace(self, max_new_tokens=max(max_new_tokens, len(self.token_ids)))

    def grown(
        self, token_ids: Sequence[int], numerics: str, classes: tuple[BlockClass, ...]
    ) -> SavedAnswer:
        """With more new tokens, computed by these classes."""
        return replace(
            self,
            token_ids=(*self.token_ids, *token_ids),
            numerics=numerics_after(self, numerics, classes),
            classes=classes,
        )


def numerics_after(before: SavedAnswer, numerics: str, classes: Sequence[BlockClass]) -> str:
    """What the text's numbers are worth when it went on with these classes.

    `numerics` is what the session that went on says of itself.
    """
    is_crossed = any(
        old.numerics != new.numerics and Span(old.start, old.end).overlap(Span(new.start, new.end))
        for old in before.classes
        for new in classes
    )
    return max(before.numerics, numerics, "crossed" if is_crossed else "exact", key=NUMERICS.index)


def block_classes(chain: Iterable[Stage], view: SwarmView) -> tuple[BlockClass, ...]:
    """The numerics class of each hop, as far as its server is known."""
    known = {server.peer: server.numerics for server in view.servers}
    return tuple(
        BlockClass(start=stage.span.start, end=stage.span.end, numerics=known[stage.peer])
        for stage in chain
        if stage.peer in known
    )


def pack_answer(answer: SavedAnswer) -> bytes:
    """The file's bytes."""
    prompt = Chunk(kind="ids", position=0, values=torch.tensor(answer.prompt_ids))
    new = [torch.tensor([token]) for token in answer.token_ids]
    first = len(answer.prompt_ids)
    note = _Note(
        given=answer.given,
        prompt_tokens=first,
        max_new_tokens=answer.max_new_tokens,
        sampler=asdict(answer.sampler),
        encoding=answer.encoding,
        is_compressed=answer.is_compressed,
        numerics=answer.numerics,
        classes=list(answer.classes),
        adapter=answer.adapter,
    )
    saved = SavedSession(
        model=answer.model,
        borders=(0, answer.num_blocks),
        # In the calls in which they were run: a replay repeats their shapes.
        chunks=(
            prompt,
            *(Chunk(kind="ids", position=first + at, values=one) for at, one in enumerate(new)),
        ),
        generation_config=_generation_config(answer),
        rng_state=None,
        note=msgspec.json.encode(note).decode(),
    )
    return pack(saved)


def unpack_answer(data: bytes) -> SavedAnswer:
    """The answer in a file's bytes.

    Raises:
        ConfigError: no such file, one of another version, or one that contradicts itself.
    """
    saved = unpack(data)
    if saved.note is None:
        raise ConfigError(
            "this is a session that the library saved, without an answer to go on with: "
            "Session.load opens it"
        )
    try:
        note = msgspec.json.decode(saved.note, type=_Note)
        sampler = Sampler(**note.sampler)
        prompt_ids, token_ids = _tokens(saved, note)
        if note.numerics not in NUMERICS:
            raise ValueError(f"numerics {note.numerics!r}")
        if len(saved.borders) != 2 or saved.borders[0] != 0:
            raise ValueError("it is of a part of the model only")
        for one in note.classes:
            Span(one.start, one.end)
    except (msgspec.MsgspecError, ValueError, TypeError, ConfigError) as error:
        raise ConfigError(f"this is no saved answer: {error}") from error
    return SavedAnswer(
        model=saved.model,
        given=note.given,
        num_blocks=saved.borders[1],
        prompt_ids=prompt_ids,
        token_ids=token_ids,
        max_new_tokens=note.max_new_tokens,
        sampler=sampler,
        encoding=note.encoding,
        is_compressed=note.is_compressed,
        numerics=note.numerics,
        classes=tuple(note.classes),
        adapter=note.adapter,
    )


def _tokens(saved: SavedSession, note: _Note) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Those of the prompt, and the new ones."""
    if not saved.chunks or any(chunk.kind != "ids" for chunk in saved.chunks):
        raise ValueError("it holds no tokens, or more than tokens")
    prompt, *new = saved.chunks
    if prompt.count != note.prompt_tokens or any(chunk.count != 1 for chunk in new):
        raise ValueError("prompt and tokens don't fit together")
    if not len(new) <= note.max_new_tokens <= SESSION_TOKENS_MAX:
        raise ValueError(f"{len(new)} of {note.max_new_tokens} new tokens")
    ids = [int(token) for chunk in saved.chunks for token in chunk.values]
    if min(ids) < 0:
        raise ValueError("tokens below 0")
    return tuple(ids[: prompt.count]), tuple(ids[prompt.count :])


def _generation_config(answer: SavedAnswer) -> dict[str, Any]:
    """The same in transformers' words, for those who go on with the library."""
    config: dict[str, Any] = {"do_sample": answer.sampler.temperature > 0}
    if config["do_sample"]:
        config["temperature"] = answer.sampler.temperature
    return {**config, "max_new_tokens": answer.max_new_tokens}
