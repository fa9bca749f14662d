"""A hostile peer with a proven identity: everything it may send, and everything it may not.

`python -m tests.e2e.fuzzing ADDRESS --seconds 300` attacks a running server.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import struct
import time
from collections import Counter
from typing import Any, get_args

import msgspec

from shoal.base.errors import ShoalError
from shoal.base.limits import PROTOCOL_VERSION
from shoal.net.address import Address, parse_address
from shoal.net.channel import PURPOSES
from shoal.net.identity import ROUTE, Identity
from shoal.net.tcp import TcpTransport
from shoal.wire import messages
from shoal.wire.messages import Hello, Hop, Ping, Route, RouteBody, encode

MESSAGE_TYPES: tuple[type[Any], ...] = get_args(messages.Message)
ATTACKERS = 6
BIG = (0, 1, 2, 63, 64, 65, 255, 4096, 2**31 - 1, 2**31, 2**53, 2**63 - 1)


class Fuzzer:
    """Attacks one server until told to stop; counts what it did."""

    def __init__(self, address: Address, seed: int, facts: dict[str, Any]) -> None:
        self.rng = random.Random(seed)
        self.address = address
        self.facts = facts
        """Of the server: model, num_blocks, hidden_size, encoding."""
        self.done: Counter[str] = Counter()

    async def run(self, seconds: float) -> None:
        """Attack from several sides for so long."""
        until_s = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for _ in range(ATTACKERS):
                group.create_task(self._attack_until(until_s))

    async def _attack_until(self, until_s: float) -> None:
        moves = [self.raw_bytes, self.no_hello, self.talk, self.talk, self.session, self.session]
        while time.monotonic() < until_s:
            move = self.rng.choice(moves)
            self.done[move.__name__] += 1
            try:
                async with asyncio.timeout(10):
                    await move()
            except (ShoalError, OSError, TimeoutError) as error:
                self.done[type(error).__name__] += 1

    # --- moves -------------------------------------------------------------------------

    async def raw_bytes(self) -> None:
        """No TLS at all, or silence."""
        _, writer = await asyncio.open_connection(self.address.host, self.address.port)
        try:
            if self.rng.random() < 0.8:
                writer.write(self.rng.randbytes(self.rng.choice((1, 5, 300, 20_000))))
                await writer.drain()
            await asyncio.sleep(self.rng.random() * 0.2)
        finally:
            writer.close()

    async def no_hello(self) -> None:
        """A proven identity, then something else than Hello."""
        async with self._transport() as transport:
            stream = await transport.dial(self.address)
            await stream.send(self.header(), self.rng.randbytes(self.rng.choice((0, 100))))
            await stream.receive()

    async def talk(self) -> None:
        """Hello for some purpose, then messages of all kinds, valid and broken."""
        async with self._transport() as transport:
            stream = await self._hello(transport, self.rng.choice(sorted(PURPOSES)))
            reading = asyncio.ensure_future(self._drain(stream))
            try:
                for _ in range(self.rng.choice((1, 5, 50, 300))):
                    payload = self.rng.randbytes(self.rng.choice((0, 0, 64, 5000)))
                    await stream.send(self.header(), payload)
                    await asyncio.sleep(0)  # hear of a stream that was closed meanwhile
                await asyncio.sleep(self.rng.random() * 0.1)
            finally:
                reading.cancel()

    async def session(self) -> None:
        """A valid session of its own, and rows for it that are anything but."""
        identity = Identity.generate()
        async with self._transport(identity) as transport:
            control = await self._hello(transport, "control")
            rows = await self._hello(transport, "rows-out")
            back = await self._hello(transport, "rows-in")
            body = self.route(identity)
            await control.send(encode(Route(1, body, identity.sign(ROUTE, body))))
            readers = [asyncio.ensure_future(self._drain(s)) for s in (control, rows, back)]
            try:
                position = 0
                for _ in range(self.rng.choice((1, 10, 60))):
                    count = self.rng.choice((1, 1, 3, 40))
                    entry, payload = self.entry(body, identity, position, count)
                    await rows.send(encode(messages.Rows([entry])), payload)
                    await asyncio.sleep(0)
                    position += count if self.rng.random() < 0.9 else self.rng.choice(BIG[:6])
                await asyncio.sleep(self.rng.random() * 0.3)
            finally:
                for reader in readers:
                    reader.cancel()

    # --- material ----------------------------------------------------------------------

    def header(self) -> bytes:
        """A valid message, a broken one, or noise."""
        data = bytearray(encode(self.value(self.rng.choice(MESSAGE_TYPES))))
        kind = self.rng.random()
        if kind < 0.4:
            return bytes(data)
        if kind < 0.8:
            for _ in range(self.rng.choice((1, 2, 8))):
                data[self.rng.randrange(len(data))] = self.rng.randrange(256)
            return bytes(data[: self.rng.randrange(1, len(data) + 1)])
        return self.rng.randbytes(self.rng.choice((1, 10, 1000)))

    def value(self, kind: type[Any]) -> Any:
        """A random message whose fields are within their limits."""
        info = msgspec.inspect.type_info(kind)
        assert isinstance(info, msgspec.inspect.StructType)
        return kind(**{field.name: self.field(field.type) for field in info.fields})

    def field(self, kind: msgspec.inspect.Type) -> Any:
        """A random value of a field."""
        rng = self.rng
        match kind:
            case msgspec.inspect.IntType(ge=low, le=high):
                low, high = low or 0, high if high is not None else 2**63 - 1
                return min(max(rng.choice(BIG), low), high)
            case msgspec.inspect.FloatType(ge=low, le=high):
                return min(max(rng.choice((0.0, 0.5, 1e9)), low or 0.0), high or 1e9)
            case msgspec.inspect.BytesType(min_length=low, max_length=high):
                return rng.randbytes(max(low or 0, min(high or 64, rng.choice((0, 16, 64, 900)))))
            case msgspec.inspect.StrType(max_length=high):
                return "".join(rng.choices("ab/\0ü", k=min(high or 9, rng.choice((0, 3, 200)))))
            case msgspec.inspect.BoolType():
                return rng.random() < 0.5
            case msgspec.inspect.NoneType():
                return None
            case msgspec.inspect.LiteralType(values=options):
                return rng.choice(list(options))
            case msgspec.inspect.UnionType(types=options):
                return self.field(rng.choice(list(options)))
            case msgspec.inspect.ListType(item_type=item, min_length=low, max_length=high):
                count = max(low or 0, min(high or 4, rng.choice((0, 1, 4, 60))))
                return [self.field(item) for _ in range(count)]
            case msgspec.inspect.TupleType(item_types=items):
                return tuple(self.field(item) for item in items)
            case msgspec.inspect.StructType(cls=cls):
                return self.value(cls)
        raise TypeError(f"no values known for {kind}: add a case")

    def route(self, identity: Identity) -> bytes:
        """A signed route over blocks of the server, or somewhat beyond."""
        facts, rng = self.facts, self.rng
        start, end = sorted(rng.sample(range(facts["num_blocks"] + 2), 2))
        if rng.random() < 0.7:
            start, end = facts["start"], facts["end"]
        hop = Hop(self.address.peer, start, end, facts["encoding"])
        return encode(
            RouteBody(
                identity.peer,
                rng.randbytes(16),
                rng.choice((1, 1, 2**40)),
                facts["model"],
                rng.choice((0, 1, 2**50)),
                [hop],
            )
        )

    def entry(
        self, body: bytes, identity: Identity, position: int, count: int
    ) -> tuple[messages.Entry, bytes]:
        """Rows of our session: good ones, NaN, the wrong size, the wrong place."""
        from shoal.base.ids import session_id

        rng, route = self.rng, messages.decode_route_body(body)
        size = count * self.facts["hidden_size"]
        fill = rng.choice((0.0, 0.5, float("nan"), float("inf"), 3e38))
        payload = struct.pack("<f", fill) * size
        if rng.random() < 0.2:
            payload = payload[: rng.randrange(len(payload))]
        return (
            messages.Entry(
                session=session_id(identity.peer, route.nonce),
                border=route.hops[0].start,
                epoch=route.epoch if rng.random() < 0.9 else rng.choice(BIG),
                rev=rng.choice((0, 0, 0, 1, 5)),
                base_rev=0,
                cuts=[messages.Cut(1, rng.choice((0, 3)))] if rng.random() < 0.1 else [],
                position=position,
                count=count,
                call_count=count if rng.random() < 0.9 else min(4096, count + 7),
                want=rng.choice((0, 1, 2)),
                encoding="float32" if rng.random() < 0.9 else "int8-block",
                payload_bytes=len(payload),
            ),
            payload,
        )

    # --- streams -----------------------------------------------------------------------

    def _transport(self, identity: Identity | None = None) -> Any:
        return _Closing(TcpTransport(identity or Identity.generate()))

    async def _hello(self, transport: TcpTransport, purpose: str) -> Any:
        stream = await transport.dial(self.address)
        await stream.send(encode(Hello(PROTOCOL_VERSION, "default", purpose, b"", "fuzz")))
        await stream.receive()
        if purpose == "control":
            await stream.send(encode(Ping(1)))
        return stream

    async def _drain(self, stream: Any) -> None:
        try:
            while True:
                await stream.receive()
        except ShoalError:
            return


class _Closing:
    def __init__(self, transport: TcpTransport) -> None:
        self._transport = transport

    async def __aenter__(self) -> TcpTransport:
        return self._transport

    async def __aexit__(self, *exc: object) -> None:
        await self._transport.close()


def main() -> None:
    """Attack a server from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    facts = facts_of(options.address)
    fuzzer = Fuzzer(parse_address(options.address), options.seed, facts)
    asyncio.run(fuzzer.run(options.seconds))
    print(dict(fuzzer.done))


def facts_of(address: str) -> dict[str, Any]:
    """What the server says about itself."""
    from shoal.cli.joining import SwarmChoice, visit

    async def look() -> dict[str, Any]:
        async with visit(SwarmChoice.parse([address], None, None)) as visitor:
            peer = parse_address(address).peer
            record = next(
                one.record
                for one in visitor.directory.snapshot().records
                if one.record.peer == peer
            )
            return {
                "model": record.model, "num_blocks": record.num_blocks,
                "hidden_size": record.hidden_size, "encoding": record.encodings[0],
                "start": record.start, "end": record.end,
            }  # fmt: skip

    return asyncio.run(look())


if __name__ == "__main__":
    main()
