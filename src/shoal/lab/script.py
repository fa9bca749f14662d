"""What a simulated user does with a session, and the reference it is compared with.

A script is a list of acts, drawn from a seed. The reference runs all blocks in one
place; every row that comes back must equal its row.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Literal

from shoal.base.adapters import AdapterPart
from shoal.base.errors import InternalError
from shoal.base.spans import Span
from shoal.client.chain_session import ChainSession
from shoal.client.client import Client
from shoal.lab.toy_adapters import toy_contents
from shoal.lab.toy_blocks import ToySequence, toy_embedding, toy_next_token
from shoal.wire.messages import WANT_ALL, WANT_LAST

ENCODING = "float32"


class WrongText(InternalError):
    """A session answered something else than one machine would."""


ActKind = Literal["prefill", "decode", "verify", "cut", "fork"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """One thing a user does.

    prefill: `count` new tokens at once. decode: `count` tokens one by one. verify: draft
    `count` tokens, send all, keep only the first (a truncation). cut: forget the last
    `count`. fork: go on with a copy of all but the last `count`, and forget the original.
    """

    kind: ActKind
    count: int
    pause_s: float = 0.0
    """The user thinks this long before."""


def draw_script(rng: random.Random) -> tuple[Act, ...]:
    """A prompt, then a mixture of everything."""
    kinds: tuple[ActKind, ...] = (
        "decode", "decode", "decode", "prefill", "verify", "cut", "fork"
    )  # fmt: skip
    acts = [Act(kind="prefill", count=rng.randint(1, 40))]
    for _ in range(rng.randint(1, 8)):
        kind = rng.choice(kinds)
        pause_s = rng.choice((0.0, 0.0, rng.uniform(0, 3)))
        acts.append(Act(kind=kind, count=rng.randint(1, 12), pause_s=pause_s))
    acts.append(Act(kind="decode", count=rng.randint(1, 6)))
    return tuple(acts)


class Reference:
    """All blocks in one place, with the call shapes that the session used."""

    def __init__(
        self, num_blocks: int, *, mixes_call_shape: bool, adapter: AdapterPart | None = None
    ) -> None:
        self.adapter = adapter
        self._sequence = ToySequence(Span(0, num_blocks), adapter=toy_contents(adapter))
        self._mixes = mixes_call_shape
        self.tokens: list[int] = []
        self._shapes: list[int] = []

    def push(self, token: int, call_count: int) -> bytes:
        """The row that one machine answers for the next token."""
        shape = call_count if self._mixes else 0
        self.tokens.append(token)
        self._shapes.append(shape)
        return self._sequence.push(toy_embedding(token), shape=shape)

    def truncate(self, length: int) -> None:
        """Forget positions >= `length`."""
        del self.tokens[length:], self._shapes[length:]
        self._sequence.truncate(length)

    def copy_from(self, parent: Reference, length: int) -> None:
        """Begin as a fork: with the parent's first `length` positions."""
        self.tokens, self._shapes = parent.tokens[:length], parent._shapes[:length]
        self._sequence = parent._sequence.copy(length)

    def outputs_at(self, border: int) -> list[bytes]:
        """Every position's row behind block `border - 1`."""
        sequence = ToySequence(Span(0, border), adapter=toy_contents(self.adapter))
        return [
            sequence.push(toy_embedding(token), shape=shape)
            for token, shape in zip(self.tokens, self._shapes, strict=True)
        ]


class ScriptRunner:
    """Plays one script on one client."""

    def __init__(
        self, client: Client, script: tuple[Act, ...], rng: random.Random, reference: Reference
    ) -> None:
        self.session: ChainSession | None = None
        self.reference = reference
        self.checked_rows = 0
        self._client = client
        self._script = script
        self._rng = rng
        self._next_token = rng.randrange(1000)
        self._chunk_tokens = rng.choice((1, 5, 16, 256))

    async def run(self) -> None:
        """Play to the end and close the session.

        Raises:
            WrongText: an answer differs from the reference.
            ShoalError: the session ended with an error.
        """
        adapter = self.reference.adapter
        name = b"" if adapter is None else adapter.manifest.name
        self.session = await self._client.open_session(ENCODING, adapter=name)
        for act in self._script:
            await self.play(act)

    async def play(self, act: Act) -> None:
        """Do one act and compare what comes back; raises as `run`."""
        await asyncio.sleep(act.pause_s)
        session = self._session()
        length = session.length
        keep = max(1, length - act.count)
        match act.kind:
            case "prefill":
                await self._send([self._rng.randrange(1000) for _ in range(act.count)])
            case "decode":
                for _ in range(act.count):
                    await self._send([self._next_token])
            case "verify":
                await self._send([self._next_token, *range(act.count)], all_rows=True)
                self.truncate(length + 1)
            case "cut":
                self.truncate(keep)
            case "fork":
                fork = await session.fork(keep)
                session.close()
                self.session = fork
                self.reference.truncate(keep)

    def truncate(self, length: int) -> None:
        """Forget positions >= `length`, in the session and in the reference."""
        self._session().truncate(length)
        self.reference.truncate(length)

    async def _send(self, tokens: list[int], *, all_rows: bool = False) -> None:
        session = self._session()
        rows = b"".join(map(toy_embedding, tokens))
        want = WANT_ALL if all_rows else WANT_LAST
        got = await session.step(rows, len(tokens), want=want, chunk_tokens=self._chunk_tokens)
        expected = []
        for index, token in enumerate(tokens):
            chunk = index // self._chunk_tokens
            size = min(self._chunk_tokens, len(tokens) - chunk * self._chunk_tokens)
            expected.append(self.reference.push(token, size))
        right = b"".join(expected) if all_rows else expected[-1]
        if got != right:
            raise WrongText(f"wrong rows behind position {session.length - len(tokens)}")
        self.checked_rows += len(tokens)
        self._next_token = toy_next_token(expected[-1], vocabulary=1000)

    def _session(self) -> ChainSession:
        if self.session is None:
            raise InternalError("the script has not begun")
        return self.session
