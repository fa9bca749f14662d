"""Making a route known: sign it, send it to every hop, see who follows."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from shoal.base.errors import ShoalError
from shoal.base.ids import PeerId
from shoal.client.server_link import ServerLink
from shoal.net.identity import ROUTE, Identity
from shoal.plan.view import Stage, Standby
from shoal.wire import messages as wire
from shoal.wire.messages import Fork, Hop, Route, RouteBody, Routed, encode


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteFacts:
    """What stays the same in all routes of a session."""

    nonce: bytes
    model: str
    opened_ms: int
    encoding: str
    """Of the last hop's answers; the client's own rows come in it too."""
    inner_encoding: str
    """Of the links between servers."""
    parent: Fork | None = None
    adapter: bytes = b""
    """Name of the adapter that the rows go through; empty: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedRoute:
    """A route's body and its owner's signature."""

    body: bytes
    signature: bytes
    records: list[bytes]

    def message(self, call: int) -> Route:
        """The request for one hop."""
        return Route(call, self.body, self.signature, self.records)


def senders_to(me: PeerId, chain: Sequence[Stage]) -> frozenset[PeerId]:
    """Who of the chain sends to `me`: its last server, and those before links via the client."""
    ends = (*chain[1:], None)
    return frozenset(
        stage.peer
        for stage, after in zip(chain, ends, strict=True)
        if after is None or after.peer == me
    )


def sign_route(
    identity: Identity,
    facts: RouteFacts,
    epoch: int,
    chain: Sequence[Stage],
    records: Iterable[bytes],
    fresh: Collection[PeerId] = (),
    standbys: Sequence[Standby] = (),
) -> SignedRoute:
    """The signed route over `chain`; the `fresh` peers must forget what they hold."""
    end = chain[-1].span.end
    body = RouteBody(
        owner=identity.peer,
        nonce=facts.nonce,
        epoch=epoch,
        model=facts.model,
        opened_ms=facts.opened_ms,
        hops=[
            Hop(
                stage.peer,
                stage.span.start,
                stage.span.end,
                facts.encoding if index + 1 == len(chain) else facts.inner_encoding,
                stage.peer in fresh,
            )
            for index, stage in enumerate(chain)
        ],
        parent=facts.parent,
        adapter=facts.adapter,
        standbys=[
            wire.Standby(
                standby.stage.peer,
                standby.stage.span.start,
                standby.stage.span.end,
                facts.encoding if standby.stage.span.end == end else facts.inner_encoding,
                standby.lag_rows,
            )
            for standby in standbys
        ],
    )
    data = encode(body)
    return SignedRoute(body=data, signature=identity.sign(ROUTE, data), records=list(records))


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """Who follows a route, with what they held, and who doesn't, and why."""

    held: dict[tuple[PeerId, int], int]
    """Positions held, by (peer, start block)."""
    ready: dict[tuple[PeerId, int], int]
    """Those that went through the blocks; the others wait there."""
    refused: dict[PeerId, ShoalError]


async def send_route(
    route: SignedRoute, links: Iterable[ServerLink], receive_from: frozenset[PeerId]
) -> Followed:
    """Send the route to all hops at once; `receive_from` are those that send us rows."""
    links = list(links)

    async def send_to(link: ServerLink) -> Routed | ShoalError:
        try:
            await link.connect(rows=link.peer in receive_from)
            answer = await link.request(route.message)
        except ShoalError as error:
            return error
        if not isinstance(answer, Routed):
            return ShoalError(f"{type(answer).__name__} is no answer to a route")
        return answer

    answers = await asyncio.gather(*(send_to(link) for link in links))
    held: dict[tuple[PeerId, int], int] = {}
    ready: dict[tuple[PeerId, int], int] = {}
    refused: dict[PeerId, ShoalError] = {}
    for link, answer in zip(links, answers, strict=True):
        if isinstance(answer, ShoalError):
            refused[link.peer] = answer
        else:
            held.update({(link.peer, item.start): item.length for item in answer.held})
            ready.update({(link.peer, item.start): item.ready for item in answer.held})
    return Followed(held=held, ready=ready, refused=refused)
