"""The client side of the recovery benchmarks: one process, one session, known tokens.

A context of n tokens is half prompt and half answer. When the answer is known (it was
generated once before), its tokens are sent one entry each without waiting for their rows:
servers then hold exactly what they hold after decoding them, in a fraction of the time.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from fixed_text import FIXED_TEXT
from recovery_servers import Fleet
from shoal.base.ids import peer_text
from shoal.base.spans import Span
from shoal.cli.joining import SwarmChoice, visit, wall_clock
from shoal.cli.models import OpenModel
from shoal.client.chain_session import ChainSession
from shoal.client.client import Client, open_client
from shoal.client.config import ClientConfig
from shoal.client.tending import TendConfig
from shoal.hf.head import Head, load_head
from shoal.wire.messages import WANT_LAST, WANT_NONE

JOIN_S_MAX: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is served, how, and what the client needs of it."""

    model: OpenModel
    head: Head
    dtype: str
    spans: tuple[Span, ...]
    """Of the chain, in order."""

    def prompt(self, count: int) -> list[int]:
        """So many tokens of a real text, again and again."""
        ids = [int(token) for token in self.model.source.tokenizer()(FIXED_TEXT)["input_ids"]]
        return (ids * (count // len(ids) + 1))[:count]


def load_setting(model: OpenModel, dtype: str, num_stages: int) -> Setting:
    """With the head loaded and the blocks shared evenly."""
    borders = [model.num_blocks * index // num_stages for index in range(num_stages + 1)]
    return Setting(
        model=model, head=load_head(model.source, dtype=dtype), dtype=dtype,
        spans=tuple(map(Span, borders, borders[1:])),
    )  # fmt: skip


@asynccontextmanager
async def joined(
    fleet: Fleet, setting: Setting, *, standby: int = 0, kind: type[Client] | None = None
) -> AsyncIterator[Client]:
    """A new client that knows every server of the fleet, as it is now."""
    model = setting.model
    config = ClientConfig(
        model=model.name, num_blocks=model.num_blocks, hidden_size=model.hidden_size,
        tending=TendConfig(standby=standby),
    )  # fmt: skip
    async with visit(SwarmChoice.parse(fleet.joins, None, None)) as visitor:
        await _until_known(visitor.directory, {m.peer: m.address for m in fleet.members.values()})
        given = (
            visitor.identity, visitor.transport, visitor.swarm_pass, visitor.directory, config,
        )  # fmt: skip
        rng = random.SystemRandom()
        if kind is None:
            async with open_client(*given, rng=rng, wall_clock=wall_clock) as client:
                yield client
            return
        special = kind(*given, rng, wall_clock)
        special.start()
        try:
            yield special
        finally:
            await special.stop()


async def _until_known(directory: Any, addresses: dict[str, str]) -> None:
    async with asyncio.timeout(JOIN_S_MAX):
        while True:
            snapshot = directory.snapshot()
            online = {
                peer_text(one.record.peer): one.record.addresses
                for one in snapshot.records
                if one.record.state == "online"
            }
            if all(address in online.get(peer, ()) for peer, address in addresses.items()):
                return
            await directory.changed(snapshot.version)


class Decoding:
    """One greedy answer, token by token, with the time at which each came."""

    def __init__(self, session: ChainSession, setting: Setting) -> None:
        self.session = session
        self.ids: list[int] = []
        """Prompt and answer; the last one is not at the servers yet."""
        self.came_s: list[float] = []
        """Monotonic time of each token of the answer that was waited for."""
        self._head = setting.head

    async def prefill(self, prompt: Sequence[int], known: Sequence[int] = ()) -> None:
        """Send the prompt, and the tokens known to follow, as if they had been decoded."""
        session, start = self.session, self.session.length
        self.ids += prompt
        session.append(self._rows, len(prompt), want=WANT_NONE if known else WANT_LAST)
        for index, token in enumerate(known):
            self.ids.append(token)
            session.append(self._rows, 1, want=WANT_LAST if index + 1 == len(known) else WANT_NONE)
        self._take(await session.rows(start, session.length))

    async def step(self) -> float:
        """One more token; how long it took, in seconds."""
        started_s = time.monotonic()
        self._take(await self.session.step(self._rows, 1))
        return time.monotonic() - started_s

    def _take(self, rows: bytes) -> None:
        scores = self._head.logits(rows, self.session.encoding)[-1]
        self.ids.append(int(scores.argmax()))
        self.came_s.append(time.monotonic())

    def _rows(self, position: int, count: int) -> bytes:
        ids = self.ids[position : position + count]
        return self._head.embed(ids, self.session.encoding, position)
