"""Handing out weights: what is answered, and how little a stranger can take."""

from __future__ import annotations

import asyncio

import pytest

from shoal.base.errors import ConfigError, PeerError
from shoal.lab.clock import run_virtual
from shoal.net.channel import Channel
from shoal.server.weights import WeightsConfig, hand_out_nothing
from shoal.wire.messages import Error, Ping
from shoal.wire.weights import GetHoldings, GetPiece, Holdings, Piece
from tests.unit.weights_cases import MODEL, TENSORS, items, shelf, swarm

BIG = 5


async def read_to_the_end(channel: Channel) -> None:
    while True:
        await channel.receive()


def test_a_stream_answers_what_it_can_and_ends_on_nonsense() -> None:
    async def work() -> None:
        async with swarm(shelf(held=[3])) as peers:
            channel = await peers.dial(peers.places[0].addresses[0])
            there, gone = items(3)[0].content, items(2)[0].content
            await channel.send(GetPiece(1, there, 10, 20))
            answer, payload = await channel.receive()
            assert (answer, bytes(payload)) == (Piece(1), TENSORS[3][10:30])
            for call, wish in enumerate((GetPiece(2, gone, 0, 1), GetPiece(3, there, 299_999, 2))):
                await channel.send(wish)
                answer, _ = await channel.receive()
                assert isinstance(answer, Error)
                assert (answer.call, answer.code) == (call + 2, "model_unknown")
            await channel.send(Ping(1))
            answer, _ = await channel.receive()
            assert isinstance(answer, Error)
            assert (answer.call, answer.code) == (0, "protocol")

    run_virtual(work())


def test_streams_are_counted_in_all_and_per_peer() -> None:
    async def work() -> None:
        async with swarm(shelf()) as peers:
            address = peers.places[0].addresses[0]
            held = [await peers.dial(address) for _ in range(3)]
            await held[2].send(GetHoldings(1, bytes.fromhex(MODEL)))
            answer, _ = await held[2].receive()
            assert isinstance(answer, Error)
            assert (answer.code, answer.retry_after_s) == ("busy", 5.0)
            held[0].close()
            await asyncio.sleep(0.1)
            again = await peers.dial(address)
            await again.send(GetHoldings(1, bytes.fromhex(MODEL)))
            assert isinstance((await again.receive())[0], Holdings)

    run_virtual(work())


def test_who_hands_out_nothing_says_so() -> None:
    async def work() -> None:
        async with swarm(hand_out_nothing) as peers:
            channel = await peers.dial(peers.places[0].addresses[0])
            await channel.send(GetHoldings(1, bytes.fromhex(MODEL)))
            answer, _ = await channel.receive()
            assert isinstance(answer, Error)
            assert answer.code == "refused"
            silent = await peers.dial(peers.places[0].addresses[0])
            with pytest.raises(PeerError):
                await silent.receive()

    run_virtual(work())


def test_an_idle_stream_is_closed() -> None:
    async def work() -> None:
        async with swarm(shelf()) as peers:
            channel = await peers.dial(peers.places[0].addresses[0])
            with pytest.raises(PeerError):
                await channel.receive()
            assert 50 < asyncio.get_running_loop().time() < 70

    run_virtual(work())


@pytest.mark.parametrize("fields", [{"rate_bytes_per_s": 1}, {"busy_share": 0.0}])
def test_rates_that_cannot_be_are_refused(fields) -> None:
    with pytest.raises(ConfigError):
        WeightsConfig(**fields)


def test_a_peer_that_takes_no_piece_is_let_go() -> None:
    async def work() -> None:
        async with swarm(shelf()) as peers:
            channel = await peers.dial(peers.places[0].addresses[0])
            for call in range(40):  # 10 MB, far more than the buffers hold
                await channel.send(GetPiece(call, items(BIG)[0].content, 0, 262_144))
            await asyncio.sleep(100.0)
            with pytest.raises(PeerError):
                await read_to_the_end(channel)

    run_virtual(work())
