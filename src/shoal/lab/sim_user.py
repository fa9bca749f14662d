"""One request on the real client: opens a session, prompts, reads token by token, checks.

Used on virtual time by fidelity C and on real time by benchmarks; servers run cost-model
blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass

from shoal.base.errors import ShoalError
from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.client.chain_session import ChainSession
from shoal.client.client import Client
from shoal.client.dispatch import Dispatcher
from shoal.lab.cost_backend import ENCODINGS, CostSequence, number_of, prompt_number, row_of
from shoal.lab.script import WrongText
from shoal.lab.sim_result import Served
from shoal.lab.sim_scenario import Request
from shoal.plan.cost import Chain, Hop
from shoal.plan.view import Stage

ENCODING = ENCODINGS[0]
"""Of rows on all links."""


@dataclass(slots=True)
class User:
    """One request on its way; times are the scenario's."""

    request: Request
    has_come: bool = False
    start_s: float = math.inf
    first_s: float = math.inf
    end_s: float = math.inf
    chain: Chain = ()
    repairs: int = 0
    error: str = ""

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.end_s < math.inf or bool(self.error)

    def result(self) -> Served:
        """What came of it."""
        request = self.request
        error = self.error
        if not self.is_over:
            error = "not answered when time was over"
        return Served(
            client=request.client,
            at_s=request.at_s,
            tokens_in=request.tokens_in,
            tokens_out=request.tokens_out,
            start_s=self.start_s,
            first_s=self.first_s,
            end_s=self.end_s,
            chain=self.chain,
            repairs=self.repairs,
            error=error,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a user sits."""

    client: Client
    servers: Mapping[PeerId, int]
    """Their numbers in the problem."""
    now: Callable[[], float]
    """The scenario's time."""
    dispatcher: Dispatcher | None = None
    """None: each session finds its way by itself."""


async def ask(user: User, place: Place) -> None:
    """Play the request to its end; what goes wrong with servers is told in `user.error`.

    Raises:
        WrongText: the answer is not what one machine would have said.
    """
    user.has_come = True
    try:
        async with AsyncExitStack() as stack:
            chain: tuple[Stage, ...] = ()
            if place.dispatcher is not None:
                seat = await stack.enter_async_context(place.dispatcher.seat())
                chain = seat.chain
            session = await place.client.open_session(ENCODING, chain=chain)
            await stack.enter_async_context(session)
            if place.dispatcher is not None:
                seat.follow(session)
            user.start_s = place.now()
            await _converse(user, place, session)
    except WrongText:
        raise
    except ShoalError as error:
        user.error = f"{type(error).__name__}: {error}"


async def warm_up(client: Client) -> None:
    """A session of one row: links are dialled, round trips measured."""
    async with await client.open_session(ENCODING) as session:
        await session.step(row_of(prompt_number(0), client.config.hidden_size, ENCODING), 1)


async def _converse(user: User, place: Place, session: ChainSession) -> None:
    config = place.client.config
    reference = CostSequence(Span(0, config.num_blocks))

    async def step(numbers: list[int]) -> int:
        rows = b"".join(row_of(number, config.hidden_size, ENCODING) for number in numbers)
        answer = number_of(await session.step(rows, len(numbers)), ENCODING)
        if answer != [reference.push(number) for number in numbers][-1]:
            raise WrongText(f"wrong row behind position {session.length - 1}")
        return answer

    number = await step([prompt_number(token) for token in range(user.request.tokens_in)])
    user.first_s = place.now()
    for _ in range(user.request.tokens_out - 1):
        number = await step([number])
    user.end_s = place.now()
    user.repairs = len(session.recoveries)
    user.chain = tuple(Hop(place.servers[stage.peer], stage.span) for stage in session.chain)
