"""What `shoal finetune` learned, in `shoal generate`: prompts, deep prompts, classes.

A prompt stands before the text as tokens of its own, and everything else is as ever. Deep
prompts and classes have no sessions: servers run the whole text in one pass, for deep prompts
once for every token.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shoal.base.errors import BadInput, ConfigError
from shoal.cli.tuning_place import Place, open_base
from shoal.hf.detokenize import Detokenizer
from shoal.hf.sampling import Sampler
from shoal.hf.tuning_files import Learned, check_fits, learned_kind, read_learned
from shoal.hf.tuning_model import TunedModel

if TYPE_CHECKING:
    from shoal.cli.models import OpenModel

NAME_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeQuestion:
    """A text for a model that runs it as a whole."""

    text: str
    max_new_tokens: int
    sampler: Sampler
    is_json: bool


def is_learned(directory: Path) -> bool:
    """Whether a directory holds something else than LoRA."""
    return directory.is_dir() and learned_kind(directory) != "LORA"


def runs_whole(given: str | None) -> bool:
    """Whether what `--adapter` names has no sessions."""
    if given is None or not is_learned(Path(given)):
        return False
    learned = read_learned(Path(given))
    return learned.classes is not None or learned.additions is not None


def read_prompt_of(directory: Path, model: OpenModel) -> tuple[bytes, torch.Tensor]:
    """A prompt's name, the hash of its values, and its (P, D) values.

    Raises:
        ConfigError: it holds something else, or was learned for another model.
    """
    learned = _read(directory, model)
    if learned.prompt is None or learned.additions is not None or learned.classes is not None:
        held = "a head for classes" if learned.additions is None else "deep prompts"
        raise ConfigError(
            f"{directory} holds {held}, which have no sessions: servers run the whole text in "
            f"one pass. Use shoal generate --adapter {directory}"
        )
    values = learned.prompt.contiguous().numpy().tobytes()
    name = hashlib.blake2b(values, digest_size=NAME_BYTES, person=b"shoal-prompt").digest()
    return name, learned.prompt


def answer_whole(question: WholeQuestion, directory: Path, model: OpenModel, place: Place) -> None:
    """Print a text's class, or the text that goes on behind a deep prompt.

    Raises:
        ConfigError: learned for another model.
        BadInput: an empty text.
        NoRouteError, PeerError: the swarm could not do it.
    """
    learned = _read(directory, model)
    tokenizer = model.source.tokenizer()
    ids = [int(token) for token in tokenizer(question.text)["input_ids"]]
    if not ids:
        raise BadInput("the text has no tokens; give at least one character")
    with ExitStack() as stack, torch.no_grad():
        base = open_base(place, model, stack)
        prompt, classes = learned.modules()
        tuned = TunedModel(base, prompt=prompt, classes=classes).eval()
        if classes is not None:
            scores = tuned.logits(torch.tensor([ids]), (len(ids),))[0]
            _tell_classes(scores, learned.label_names, is_json=question.is_json)
            return
        print("deep prompts: servers run the whole text for every token", file=sys.stderr)
        tokens = continued(tuned, ids, question, model.source.eos_token_ids)
        _write(tokens, tokenizer, len(ids), is_json=question.is_json)


def continued(
    tuned: TunedModel, ids: Collection[int], question: WholeQuestion, eos_ids: Collection[int]
) -> Iterator[int]:
    """New tokens behind `ids`, each from a pass over all that is there; an end token is given."""
    text = list(ids)
    for _ in range(question.max_new_tokens):
        states = tuned.states(torch.tensor([text]), (len(text),))
        scores = tuned.base.scores(states[0, -1])
        token = question.sampler.choose(scores, len(text))
        yield token
        if token in eos_ids:
            return
        text.append(token)


def _read(directory: Path, model: OpenModel) -> Learned:
    learned = read_learned(directory)
    check_fits(
        learned, model=model.name, hidden_size=model.hidden_size, num_blocks=model.num_blocks
    )
    return learned


def _tell_classes(scores: torch.Tensor, names: tuple[str, ...], *, is_json: bool) -> None:
    shares = [float(share) for share in scores.float().softmax(dim=0)]
    found = sorted(zip(shares, names, strict=True), reverse=True)
    if is_json:
        told = {"label": found[0][1], "shares": {name: share for share, name in found}}
        print(json.dumps(told), flush=True)
        return
    print(found[0][1], flush=True)
    print(", ".join(f"{name} {share:.1%}" for share, name in found), file=sys.stderr)


def _write(tokens: Iterator[int], tokenizer: Any, num_before: int, *, is_json: bool) -> None:
    detokenizer = Detokenizer(tokenizer)
    show: Callable[[str], None] = (
        (lambda text: None) if is_json else (lambda text: print(text, end="", flush=True))
    )
    ids, pieces = [], []
    for token in tokens:
        ids.append(token)
        pieces.append(detokenizer.push(token))
        show(pieces[-1])
    pieces.append(detokenizer.finish())
    show(pieces[-1] + "\n")
    if is_json:
        told = {"text": "".join(pieces), "token_ids": ids, "prompt_tokens": num_before}
        print(json.dumps(told), flush=True)
