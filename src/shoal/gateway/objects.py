"""Answers as OpenAI's objects. What they have no word for is under `shoal`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.base.ids import peer_text
from shoal.client.session import Recovery
from shoal.gateway.answering import ScoredToken
from shoal.gateway.engine import Begun, Done
from shoal.gateway.tools import FoundCall
from shoal.plan.view import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What all objects of one response say."""

    id: str
    kind: str
    model: str
    created: int
    """Unix time."""

    def wrap(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """One object."""
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }


def usage(dones: Sequence[Done]) -> dict[str, Any]:
    """Tokens read and written, of several prompts together."""
    prompt = sum(done.prompt_tokens for done in dones)
    answer = sum(done.answer_tokens for done in dones)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": sum(done.kept_tokens for done in dones)},
    }


def begun_facts(begun: Begun) -> dict[str, Any]:
    """Which servers answer, and how much of the prompt they had."""
    return {"chain": chain_facts(begun.chain), "kept_tokens": begun.kept_tokens}


def done_facts(done: Done) -> dict[str, Any]:
    """How the answer came about."""
    return {
        "chain": chain_facts(done.chain),
        "kept_tokens": done.kept_tokens,
        "recoveries": recovery_facts(done.recoveries),
        "numerics": done.numerics,
    }


def chain_facts(chain: Iterable[Stage]) -> list[dict[str, Any]]:
    """As `shoal generate --json` prints chains."""
    return [
        {"peer": peer_text(stage.peer), "blocks": [stage.span.start, stage.span.end]}
        for stage in chain
    ]


def recovery_facts(recoveries: Iterable[Recovery]) -> list[dict[str, Any]]:
    """As `shoal generate --json` prints repairs."""
    return [
        {
            "position": recovery.position,
            "lost": [peer_text(peer) for peer in recovery.lost],
            "replacement": [peer_text(peer) for peer in recovery.replacement],
            "replayed_tokens": recovery.replayed_tokens,
            "pause_s": recovery.pause_s,
        }
        for recovery in recoveries
    ]


def call_object(call: FoundCall, call_id: str) -> dict[str, Any]:
    """A tool call of a message."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call_id, "type": "function", "function": function}


def chat_logprobs(tokens: Iterable[ScoredToken], text_of: Callable[[int], str]) -> dict[str, Any]:
    """Log-probabilities as chat completions have them."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = text_of(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = [
        {
            **entry(token.id, token.chances.chosen),
            "top_logprobs": [entry(*best) for best in token.chances.best],
        }
        for token in tokens
        if token.chances is not None
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokens: Iterable[ScoredToken], text_of: Callable[[int], str], offset: int
) -> dict[str, Any]:
    """Log-probabilities as completions have them; `offset` is where the text begins."""
    told = [(text_of(token.id), token.chances) for token in tokens if token.chances is not None]
    offsets = []
    for text, _ in told:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": [text for text, _ in told],
        "token_logprobs": [chances.chosen for _, chances in told],
        "top_logprobs": [
            {text_of(token_id): logprob for token_id, logprob in chances.best}
            for _, chances in told
        ],
        "text_offset": offsets,
    }
