"""One stream of a thin client: its sessions along the chain, and its questions."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from shoal.base.errors import (
    BadInput,
    InternalError,
    PeerBusy,
    PeerError,
    PeerUnreachable,
    ProtocolError,
    SessionError,
    SessionLost,
    ShoalError,
)
from shoal.base.ids import short
from shoal.base.limits import GOSSIP_BEAT_S
from shoal.client.chain_session import ChainSession, choose_chunk
from shoal.client.head_words import (
    Stretch,
    chosen_to_wire,
    from_options,
    read_question,
    stretches_of,
    told_chain,
)
from shoal.client.token_log import TokenLog
from shoal.net.channel import Channel, error_message
from shoal.net.tasks import TaskSet
from shoal.wire.gossip import Beat
from shoal.wire.head import AskTokens, EndTokens, Given, StopTokens, ToldChain
from shoal.wire.messages import WANT_LAST, WANT_NONE, Message

if TYPE_CHECKING:
    from shoal.client.head_service import HeadService

logger = logging.getLogger(__name__)

SEND_TIMEOUT_S: Final = 20.0
"""A guest that takes nothing for so long is gone."""

BUSY_RETRY_S: Final = 5.0

TURN_PARTS: Final = 64
"""Parts of a long replay that are appended before others get the event loop: a millisecond."""


class HeldSequence:
    """One session of a guest."""

    def __init__(self) -> None:
        self.chain: ChainSession | None = None
        self.parent: ChainSession | None = None
        """What it is forked from."""
        self.ids: list[int] = []
        """One for each position."""
        self.row: bytes | None = None
        """What the last block said of the last position."""
        self.num_expected = 0
        """Positions that it may grow to by the question at work."""
        self.call: int | None = None
        """The question at work."""
        self.task: asyncio.Task[None] | None = None
        self.used_s = 0.0
        self.told: tuple[object, ...] = ()
        """What the guest knows of the chain."""
        self.num_repairs = self.num_moves = 0
        """Of which the guest knows."""

    def close(self) -> None:
        if self.chain is not None:
            self.chain.close()
        self.chain, self.parent, self.row, self.ids = None, None, None, []


class Guest:
    """One stream: reads questions, answers each in a task of its own."""

    def __init__(self, service: HeadService, channel: Channel) -> None:
        self.peer = channel.peer
        self.sessions: dict[int, HeldSequence] = {}
        self._service = service
        self._channel = channel
        self._sending = asyncio.Lock()
        self._tasks = TaskSet(f"guest {short(channel.peer)}")
        self._clock = asyncio.get_running_loop().time

    @property
    def num_answers(self) -> int:
        return sum(one.call is not None for one in self.sessions.values())

    @property
    def num_positions(self) -> int:
        return sum(max(len(one.ids), one.num_expected) for one in self.sessions.values())

    async def run(self) -> None:
        self._tasks.spawn(self._beat(), "beat")
        try:
            while True:
                message, payload = await self._channel.receive()
                await self._take(message, payload)
        finally:
            await self._tasks.close()
            for one in self.sessions.values():
                one.close()
            self.sessions.clear()

    async def _take(self, message: Message, payload: memoryview) -> None:
        match message:
            case AskTokens():
                await self._asked(message, payload)
            case StopTokens():
                stopped = [one for one in self.sessions.values() if one.call == message.call]
                for one in stopped:  # sessions may come and go meanwhile
                    await _halt(one)
            case EndTokens():
                ended = self.sessions.pop(message.session, None)
                if ended is not None:
                    await _halt(ended)
                    ended.close()
            case _:
                raise ProtocolError(f"{type(message).__name__} on a head stream")

    async def _asked(self, ask: AskTokens, payload: memoryview) -> None:
        ids, allowed = read_question(ask, payload)
        one = self.sessions.get(ask.session)
        if one is not None:
            await _halt(one)  # whoever asks again has no use for the old answer
            one = self.sessions.get(ask.session)
        try:
            self._service.check_tokens(ids)
            one = self._admit(ask, one, len(ids))
        except ShoalError as error:
            with suppress(_GuestGone):
                await self._send(error_message(error, ask.call))
            return
        one.call, one.used_s = ask.call, self._clock()
        one.task = self._tasks.spawn(self._work(one, ask, ids, allowed), f"answer {ask.call}")

    def _admit(self, ask: AskTokens, one: HeldSequence | None, num_ids: int) -> HeldSequence:
        """The session that the question is about, which may be new.

        Raises:
            PeerBusy: over a limit, or leaving.
            BadInput: positions that are not there.
        """
        service, limits = self._service, self._service.limits
        if service.is_leaving:
            raise PeerBusy("is leaving", retry_after_s=BUSY_RETRY_S)
        if (
            service.num_answers >= limits.answers_max
            or self.num_answers >= limits.answers_per_guest
        ):
            raise PeerBusy("has enough answers at work", retry_after_s=BUSY_RETRY_S)
        grown = ask.start + num_ids + ask.count
        held = 0 if one is None else max(len(one.ids), one.num_expected)
        if service.tokens_of(self.peer) - held + grown > limits.tokens_per_guest:
            raise PeerBusy(
                f"you may have {limits.tokens_per_guest} positions here: end sessions",
                retry_after_s=BUSY_RETRY_S,
            )
        source, is_new = one, one is None
        if source is None and ask.parent is not None:
            source = self.sessions.get(ask.parent)
        if ask.start > (0 if source is None else len(source.ids)):
            raise SessionLost(f"there are no {ask.start} positions of session {ask.session} here")
        if one is None:
            if (
                service.num_sessions >= limits.sessions_max
                or service.sessions_of(self.peer) >= limits.sessions_per_guest
            ):
                raise PeerBusy("has enough sessions", retry_after_s=BUSY_RETRY_S)
            one = self.sessions[ask.session] = HeldSequence()
        if is_new and source is not None and ask.start:
            # Now: the parent's own answer may go on at once.
            one.parent = source.chain
            one.ids = source.ids[: ask.start]
            one.row = source.row if ask.start == len(source.ids) else None
        one.num_expected = grown
        return one

    # --- answers -----------------------------------------------------------------------

    async def _work(
        self, one: HeldSequence, ask: AskTokens, ids: list[int], allowed: bytes | None
    ) -> None:
        try:
            await self._answer(one, ask, ids, allowed)
        except _GuestGone:
            return  # `run` ends by it too
        except ShoalError as error:
            await self._fail(one, ask, error)
        except Exception:  # told to the guest; others' answers go on
            logger.exception("head failed guest=%s", short(self.peer))
            await self._fail(one, ask, InternalError("the head failed; its log says more"))
        finally:
            if one.chain is not None:
                self._service.waves.leave(one.chain.id)
            one.call, one.num_expected = None, len(one.ids)

    async def _fail(self, one: HeldSequence, ask: AskTokens, error: ShoalError) -> None:
        logger.info("answer failed guest=%s reason=%s", short(self.peer), error)
        if one.chain is not None:
            self._service.waves.leave(one.chain.id)
        one.close()
        if self.sessions.get(ask.session) is one:
            del self.sessions[ask.session]
        with suppress(_GuestGone):
            await self._send(error_message(error, ask.call))

    async def _answer(
        self, one: HeldSequence, ask: AskTokens, ids: list[int], allowed: bytes | None
    ) -> None:
        head = self._service.head
        chain = await self._ready(one, ask)
        log = TokenLog(head, chain.encoding, chain.length)
        if ids:
            log = await self._read(one, chain, ids, stretches_of(ask.parts))
        if not ask.count:
            await self._send(Given(ask.call, [], True, self._news(one, chain)))
            return
        if not one.ids:
            raise BadInput("an answer to nothing: give at least one token")
        if one.row is None:
            raise SessionLost("nothing to choose a token by: send the tokens again")
        turn = head.begin(
            from_options(ask.options), one.ids[: ask.answer_start], one.ids[ask.answer_start :]
        )
        waves = self._service.waves
        for left in range(ask.count - 1, -1, -1):
            chosen = await turn.choose(one.row, chain.encoding, chain.length, allowed)
            is_last = left == 0 or chosen.id in ask.end_ids
            self._service.num_tokens += 1
            await self._send(
                Given(ask.call, [chosen_to_wire(chosen)], is_last, self._news(one, chain))
            )
            if is_last:
                return
            log.append([chosen.id])
            one.ids.append(chosen.id)
            one.row = None
            if not waves.may_leave(chain):
                await waves.turn(chain)
            one.row = await chain.step(log.rows, 1)
            waves.came(chain.id)
            one.used_s = self._clock()

    async def _ready(self, one: HeldSequence, ask: AskTokens) -> ChainSession:
        """The session along the chain, holding the positions that are to be kept."""
        if one.chain is None and one.parent is not None:
            try:
                one.chain = await one.parent.fork(ask.start)
            except (SessionError, PeerError) as error:
                raise SessionLost(f"it could not be forked: {error.detail}") from error
        elif one.chain is None:
            inner = self._service.compressed if ask.is_compressed else None
            encoding = ask.encoding or self._service.head.facts.encoding
            one.chain = await self._service.open_session(
                encoding, inner_encoding=inner, adapter=ask.adapter
            )
        elif ask.start < len(one.ids):
            one.chain.truncate(ask.start)
            del one.ids[ask.start :]
            one.row = None
        if one.chain.adapter != ask.adapter:
            raise BadInput("a session keeps the adapter that it began with: begin another one")
        return one.chain

    async def _read(
        self, one: HeldSequence, chain: ChainSession, ids: list[int], stretches: list[Stretch]
    ) -> TokenLog:
        """Run tokens in the calls that the guest names; the last one's row stays."""
        head = self._service.head
        one.row = None
        log = TokenLog(head, chain.encoding, chain.length)
        start = 0
        for number, stretch in enumerate(stretches):
            new = ids[start : start + stretch.size]
            start += stretch.size
            one.ids.extend(new)
            log.append(new)
            if stretch.is_cut:
                _append_cut(chain, log, new[-1], stretch)
                log = TokenLog(head, chain.encoding, chain.length)
            elif start < len(ids):
                chain.append(log.rows, stretch.size, want=WANT_NONE)
            else:
                one.row = await chain.step(log.rows, stretch.size, want=WANT_LAST)
            if number % TURN_PARTS == TURN_PARTS - 1:
                await asyncio.sleep(0)
        return log

    def _news(self, one: HeldSequence, chain: ChainSession) -> ToldChain | None:
        """What the guest does not know of the chain yet; None: nothing."""
        repairs, moves = chain.recoveries[one.num_repairs :], chain.moves[one.num_moves :]
        told = (chain.chain, chain.numerics)
        if told == one.told and not repairs and not moves:
            return None
        one.told = told
        one.num_repairs, one.num_moves = len(chain.recoveries), len(chain.moves)
        return told_chain(chain, repairs, moves)

    async def _send(self, message: Message) -> None:
        async with self._sending:
            try:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await self._channel.send(message)
            except (TimeoutError, PeerUnreachable) as error:
                logger.debug("guest gone peer=%s reason=%r", short(self.peer), error)
                self._channel.close()
                raise _GuestGone from error

    async def _beat(self) -> None:
        """Let the guest see that we live, and end what it has forgotten."""
        while True:
            await asyncio.sleep(GOSSIP_BEAT_S)
            idle_s = self._service.limits.idle_s
            try:
                await self._send(Beat())
            except _GuestGone:
                return
            for number, one in list(self.sessions.items()):
                if one.call is None and self._clock() - one.used_s > idle_s:
                    one.close()
                    del self.sessions[number]


def _append_cut(chain: ChainSession, log: TokenLog, filler: int, stretch: Stretch) -> None:
    """The beginning of a call, in the shape of the whole: what was cut is run as `filler`.

    Only up to the end of the chunk that the cut is in; then it is cut again.
    """
    chunk = choose_chunk(stretch.whole)
    count = min(stretch.whole, -(-stretch.size // chunk) * chunk)
    log.append([filler] * (count - stretch.size))
    chain.append(log.rows, count, want=WANT_NONE, chunk_tokens=chunk)
    chain.truncate(chain.length - count + stretch.size)


async def _halt(one: HeldSequence) -> None:
    """End the answer at work; what was appended stays."""
    if one.task is not None and not one.task.done():
        one.task.cancel()
        await asyncio.gather(one.task, return_exceptions=True)
    one.task = None


class _GuestGone(Exception):
    """The guest's stream ended, or takes nothing."""
