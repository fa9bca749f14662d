"""A dispatcher before a client's sessions: each joins the fastest chain with a free seat.

For whoever opens many sessions for others: gateways. Sessions that choose for themselves all
run to the best servers and share them; a dispatcher knows them all, fills chains in order, and
has the rest wait in one line rather than at servers. Which chains there are and which one is
next is decided in `shoal.plan.dispatching`; a session whose chain fails is repaired as ever.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from shoal.base.errors import NoRouteError, PeerBusy, ShoalError
from shoal.base.ids import PeerId
from shoal.client import asking
from shoal.client.client import Client
from shoal.net.tasks import TaskSet
from shoal.plan.dispatching import Composition, Stages, compose_live
from shoal.plan.live_problem import SESSION_TOKENS
from shoal.plan.routing import ANY_SERVER, Wanted
from shoal.plan.view import Experience, SwarmView

logger = logging.getLogger(__name__)

RECOMPOSE_S: Final = 30.0
"""Chains are composed anew after this though nobody came or went: round trips are known better."""

COMPOSING_SHARE: Final = 0.2
"""Of the time may go into composing: in a large swarm some record is always new."""

ASKED_MAX: Final = 32
"""Servers whose round trip is measured at once when chains are composed."""

ASK_S: Final = 2.0
"""Who takes longer to answer is not asked again before the next composition."""


Composer = Callable[[Callable[[], Composition]], Awaitable[Composition]]
"""Carries out what it is given: here, or in a thread, for it takes a second in large swarms."""


async def compose_here(work: Callable[[], Composition]) -> Composition:
    """On the event loop."""
    return work()


class HasChain(Protocol):
    """What is needed of a session."""

    @property
    def chain(self) -> Stages:
        """Who runs which blocks now."""


class Seat(Protocol):
    """A place for some sessions of one request."""

    @property
    def chain(self) -> Stages:
        """Where the first session should begin; empty: wherever it likes."""

    def follow(self, session: HasChain) -> None:
        """The session has opened: its chain counts as it is from now on, repairs included."""


@dataclass(slots=True, eq=False)
class _Taken:
    """A seat that is taken."""

    chain: Stages
    sessions: int
    session: HasChain | None = None

    def follow(self, session: HasChain) -> None:
        """Count the session where it runs."""
        self.session = session

    @property
    def runs_on(self) -> Stages:
        """Its chain now."""
        return self.chain if self.session is None else self.session.chain


@dataclass(slots=True, eq=False)
class _Waiter:
    sessions: int
    turn: asyncio.Future[_Taken]


class Dispatcher:
    """Seats on the chains of one client's swarm. Use `open_dispatcher`."""

    def __init__(
        self, client: Client, wanted: Wanted, session_tokens: int, composer: Composer
    ) -> None:
        self._client = client
        self._composer = composer
        self._session_tokens = session_tokens
        self._wanted = wanted
        self._taken: list[_Taken] = []
        self._line: deque[_Waiter] = deque()
        self._composition: Composition | None = None
        self._composed_of: tuple[SwarmView, frozenset[PeerId]] | None = None
        self._composed_s = 0.0
        self._pause_s = 0.0
        """From one composing to the next, at least."""
        self._is_composing = False
        self._waits = asyncio.Event()
        self._tasks = TaskSet("dispatcher")

    @property
    def num_waiting(self) -> int:
        """Requests in the line."""
        return len(self._line)

    @property
    def num_seats(self) -> int:
        """Sessions that all chains hold together, as last composed; 0: nobody serves all blocks."""
        composition = self._current()
        return 0 if composition is None else composition.seats

    async def start(self) -> None:
        """Measure the way to servers, compose chains, and watch the swarm for those who wait."""
        await self._measure()
        await self._compose()
        self._tasks.spawn(self._watch(), "watch")

    async def close(self) -> None:
        """Send everybody who waits away."""
        await self._tasks.close()
        for waiter in self._line:
            waiter.turn.cancel()

    @asynccontextmanager
    async def seat(self, sessions: int = 1) -> AsyncIterator[Seat]:
        """A seat for a request with so many sessions, all on one chain; waits for one.

        Raises:
            PeerBusy: none became free within the client's patience.
        """
        taken = await self._take(sessions)
        try:
            yield taken
        finally:
            self._taken.remove(taken)
            self._call()

    @contextmanager
    def beside(self, session: HasChain, sessions: int = 1) -> Iterator[None]:
        """Count a session that is there already and works again: it can't choose any more."""
        taken = _Taken(session.chain, sessions, session)
        self._taken.append(taken)
        try:
            yield
        finally:
            self._taken.remove(taken)
            self._call()

    async def _take(self, sessions: int) -> _Taken:
        taken = None if self._line else self._try(sessions)
        if taken is not None:
            return taken
        waiter = _Waiter(sessions, asyncio.get_running_loop().create_future())
        self._line.append(waiter)
        self._waits.set()
        try:
            async with asyncio.timeout(self._client.patience_s):
                return await waiter.turn
        except BaseException as error:
            self._give_up(waiter)
            if isinstance(error, TimeoutError):
                raise PeerBusy(
                    f"no chain had a free place within {self._client.patience_s:g} s: "
                    "start more servers, or try again later"
                ) from None
            raise

    def _give_up(self, waiter: _Waiter) -> None:
        """Out of the line, or of the seat that came at the same moment."""
        if waiter in self._line:
            self._line.remove(waiter)
        elif waiter.turn.done() and not waiter.turn.cancelled():
            self._taken.remove(waiter.turn.result())
        self._call()

    def _try(self, sessions: int) -> _Taken | None:
        """A seat, if there is one. Where nobody serves all blocks sessions wait by themselves."""
        composition = self._current()
        chain: Stages | None = ()
        if composition is not None:
            running = [one.runs_on for one in self._taken for _ in range(one.sessions)]
            chain = composition.choose(running)
        if chain is None:
            return None
        taken = _Taken(chain, sessions)
        self._taken.append(taken)
        return taken

    def _call(self) -> None:
        """Seat those who wait, in order."""
        while self._line:
            if self._line[0].turn.done():  # given up, and its task did not run since
                self._line.popleft()
                continue
            taken = self._try(self._line[0].sessions)
            if taken is None:
                return
            self._line.popleft().turn.set_result(taken)

    # --- chains --------------------------------------------------------------------------

    def _current(self) -> Composition | None:
        """The chains as last composed; None: some block is served by nobody.

        Where the swarm is another by now, chains are composed anew, and these serve meanwhile:
        a session whose chain is gone finds its own way.
        """
        is_due = not (self._is_composing or self._tasks.is_closed)
        if is_due and self._is_outdated(*self._seen()):
            self._is_composing = True
            self._tasks.spawn(self._compose_anew(), "compose")
        return self._composition

    def _seen(self) -> tuple[SwarmView, Experience]:
        now_s = asyncio.get_running_loop().time()
        return self._client.view(), self._client.experience.snapshot(now_s)

    def _is_outdated(self, view: SwarmView, experience: Experience) -> bool:
        if (view, experience.avoid) != self._composed_of:
            return True
        return asyncio.get_running_loop().time() - self._composed_s >= RECOMPOSE_S

    async def _compose_anew(self) -> None:
        try:
            passed_s = asyncio.get_running_loop().time() - self._composed_s
            await asyncio.sleep(max(0.0, self._pause_s - passed_s))
            await self._compose()
        finally:
            self._is_composing = False
        self._call()

    async def _compose(self) -> None:
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        view, experience = self._seen()
        work = partial(compose_live, view, experience, self._wanted, self._session_tokens)
        try:
            self._composition = await self._composer(work)
        except NoRouteError as error:
            logger.info("no chains reason=%s", error)
            self._composition = None
        self._composed_of, self._composed_s = (view, experience.avoid), loop.time()
        self._pause_s = (self._composed_s - start_s) * (1 / COMPOSING_SHARE - 1)

    async def _watch(self) -> None:
        """While somebody waits: servers that come may seat them."""
        while True:
            await self._waits.wait()
            self._waits.clear()
            while self._line:
                await self._client.wait_for_news(RECOMPOSE_S)
                self._call()

    async def _measure(self) -> None:
        """Ask servers that were never asked: how far away they are is part of the price."""
        view, book = self._client.view(), self._client.experience
        known = book.snapshot(asyncio.get_running_loop().time()).rtt_s
        fresh = [one.peer for one in view.servers if one.peer not in known][:ASKED_MAX]

        async def ask(peer: PeerId) -> None:
            try:
                async with asyncio.timeout(ASK_S):
                    await asking.decode_s_per_block(self._client.link(peer), book)
            except (ShoalError, TimeoutError) as error:
                logger.info("does not answer peer=%s reason=%r", peer.hex()[:8], error)

        await asyncio.gather(*map(ask, fresh))


@asynccontextmanager
async def open_dispatcher(
    client: Client,
    wanted: Wanted = ANY_SERVER,
    session_tokens: int = SESSION_TOKENS,
    composer: Composer = compose_here,
) -> AsyncIterator[Dispatcher]:
    """A running dispatcher over all blocks of the client's model.

    Sessions are expected to become `session_tokens` long: so much room each is reckoned to take.
    Who has other things to do on its event loop hands in `asyncio.to_thread` as `composer`.
    """
    dispatcher = Dispatcher(client, wanted, session_tokens, composer)
    await dispatcher.start()
    try:
        yield dispatcher
    finally:
        await dispatcher.close()
