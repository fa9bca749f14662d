"""One session of a replay: sends as many rows as it did, when it did, and checks the answers."""

from __future__ import annotations

import asyncio
import random
from typing import Final

from shoal.base.errors import InternalError, ShoalError
from shoal.client.chain_session import ChainSession
from shoal.client.client import Client
from shoal.lab.script import ENCODING, Reference, WrongText
from shoal.lab.toy_blocks import HIDDEN_SIZE, toy_embedding
from shoal.lab.trace_guide import GUIDE, Guide
from shoal.lab.trace_past import Act, SessionPast
from shoal.server.events import session_name
from shoal.wire.messages import WANT_ALL, WANT_NONE
from shoal.wire.tensors import row_bytes

ACQUAINTED_S: Final = 1.0
"""A client knows its servers this long before the first route: no trace shows its dialling."""

MISSING_CHUNK: Final = 256
"""Rows of which no trace says how they were sent go in chunks of this."""


class Player:
    """One session: sends what it sent when it did, and checks what comes back."""

    def __init__(
        self,
        past: SessionPast,
        client: Client,
        guide: Guide,
        reference: Reference,
        rng: random.Random,
        parent: Player | None,
        delay_s: float,
    ) -> None:
        self.session: ChainSession | None = None
        self.reference = reference
        self.checked_rows = 0
        self.error: ShoalError | None = None
        self.name = ""
        self.opened = asyncio.Event()
        """It is there, or will never be."""
        self.children: list[Player] = []
        if parent is not None:
            parent.children.append(self)
        self._past = past
        self._client = client
        self._guide = guide
        self._rng = rng
        self._parent = parent
        self._delay_s = delay_s
        self._pending: list[bytes] = []
        self._answered = 0

    async def run(self) -> None:
        """From its opening until it was closed; an error that it ends with is kept."""
        GUIDE.set(self._guide)
        opened_s = self._past.epochs[0].at_s - self._delay_s
        await until(opened_s - ACQUAINTED_S)
        await asyncio.gather(*map(self._client.answers, self._guide.first))
        await until(opened_s)
        try:
            self.session = self._guide.session = await self._open()
            self.name = session_name(self.session.id)
            self.opened.set()
            for act in self._past.acts:
                await self._act(self.session, act)
            await self._take_rows(self.session)
        except InternalError:
            raise
        except ShoalError as error:
            self.error = error
        finally:
            self.opened.set()
        if self._past.closed_s is not None:
            await until(self._past.closed_s)
            for child in self.children:
                await child.opened.wait()
            self.close()

    def close(self) -> None:
        """The client is done with it."""
        if self.session is not None:
            self.session.close()

    async def _open(self) -> ChainSession:
        parent, length = self._parent, self._past.parent_length
        if parent is None or parent.session is None or parent.session.length < length:
            session = await self._client.open_session(ENCODING)
            if self._past.parent:
                await self._send(session, Act(kind="rows", at_s=0.0, count=max(1, length)))
            return session
        await parent.wait_for(length)
        session = await parent.session.fork(length)
        self.reference.copy_from(parent.reference, length)
        self._answered = min(length, session.length)
        return session

    async def wait_for(self, length: int) -> None:
        """Until the first `length` rows are answered."""
        if self.session is not None and self._answered < length:
            await self._take_rows(self.session)

    async def _act(self, session: ChainSession, act: Act) -> None:
        await until(act.at_s - self._delay_s)  # it was seen at a server
        if act.kind == "rows":
            await self._send(session, act)
            return
        await self._take_rows(session)
        session.truncate(min(act.count, session.length))
        self.reference.truncate(session.length)
        self._answered = session.length

    async def _send(self, session: ChainSession, act: Act) -> None:
        """One entry, after the answer to the last one that asked for one."""
        if self._pending and self._pending[-1]:
            await self._take_rows(session)
        rest = act.count
        while rest:
            count = rest if rest <= MISSING_CHUNK or act.want else MISSING_CHUNK
            rest -= count
            want = WANT_NONE if rest else act.want
            tokens = [self._rng.randrange(1000) for _ in range(count)]
            rows = b"".join(map(toy_embedding, tokens))
            session.append(rows, count, want=want, chunk_tokens=count)
            right = [self.reference.push(token, count) for token in tokens]
            wanted = right if want == WANT_ALL else right[-1:] if want else []
            self._pending.append(b"".join(wanted))

    async def _take_rows(self, session: ChainSession) -> None:
        """Wait for all answers that are due.

        Raises:
            WrongText: they are not those of one machine.
        """
        start, self._answered = self._answered, session.length
        got = await session.rows(start, session.length)
        right, self._pending = b"".join(self._pending), []
        if got != right:
            raise WrongText(f"{self._past.label}: wrong rows behind position {start}")
        self.checked_rows += len(right) // row_bytes(ENCODING, HIDDEN_SIZE)


async def until(time_s: float) -> None:
    """Wait for this virtual time."""
    delay_s = time_s - asyncio.get_running_loop().time()
    if delay_s > 0:
        await asyncio.sleep(delay_s)
