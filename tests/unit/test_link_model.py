"""A small exhaustive model check of the session protocol. Read it as documentation.

The smallest world in which everything can go wrong: a client `C`, a hop `B`, its
replacement `R`, and the client again as the receiver behind the last hop.

    C --rows--> B --rows--> C          epoch 1
    C --rows--> R --rows--> C          after the client routed around B, which lives on
                                       as a zombie and still pushes

Every order of these events is tried, up to a bound on each kind:

    deliver     the oldest message of one channel arrives
    lose        ... vanishes instead (a link that was reset)
    repeat      ... arrives, and is still there (a duplicate)
    append      the client adds a row
    truncate    the client forgets its last row(s) and goes on with other ones
    replace     the client routes around B
    forget      the hop in the chain loses its cache and its log (an eviction, a restart)

After each event the invariant must hold: **whatever anybody holds at the current
revision is a prefix of what the client sent** - nothing twice, nothing old, no gap. And
from every state the system must still be able to finish: deliver everything, let the
client ask once what everybody has (a route with a new epoch over the same chain), deliver
everything again - then all rows are at the end.

The state machines are the real ones: Log, Outbound, Inbound, Relay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from shoal.base.ids import PeerId, SessionId
from shoal.client.relay import Relay
from shoal.link.inbound import Inbound, Verdict
from shoal.link.log import Log, LogEntry
from shoal.link.outbound import Outbound
from shoal.wire.messages import WANT_ALL, Ack, Entry, Gap, Have, Open, Stale

SESSION = SessionId(b"s" * 16)
C, B, R = PeerId(b"C" * 32), PeerId(b"B" * 32), PeerId(b"R" * 32)
NAMES = {C: "C", B: "B", R: "R"}
FIRST, LAST = 0, 0  # the borders: a hop without blocks has the same one on both sides
TO_HOP, TO_CLIENT = "rows in", "rows out"

Message = tuple[object, bytes]
Channel = tuple[PeerId, PeerId, str]


@dataclass
class Bounds:
    """How often each kind of event may still happen."""

    append: int
    truncate: int
    replace: int
    lose: int
    repeat: int
    forget: int


@dataclass
class World:
    """The whole system between two events."""

    bounds: Bounds
    epoch: int = 0
    hop: PeerId = B
    truth: list[bytes] = field(default_factory=list)
    next_row: int = 0
    log: Log = field(default_factory=Log)
    relays: dict[PeerId, Relay] = field(default_factory=dict)
    received: list[bytes] = field(default_factory=list)
    channels: dict[Channel, list[Message]] = field(default_factory=dict)
    routes: list[tuple[PeerId, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.out = Outbound(SESSION, FIRST, self.log)
        self.sink = Inbound(SESSION, LAST, is_final=True)
        self.route(B)

    # --- what the client does --------------------------------------------------------

    def route(self, hop: PeerId) -> None:
        """A new epoch over `hop`; the Route travels on its own and may come late."""
        self.epoch += 1
        self.hop = hop
        self.routes.append((hop, self.epoch))
        self.out.reroute(hop, self.epoch)
        self.sink.reroute(hop, self.epoch)
        self.put(C, hop, TO_HOP, Open(SESSION, FIRST, self.epoch))
        self.put(C, hop, TO_CLIENT, self.sink.have_message(1 << 20, 0))

    def append(self) -> None:
        row = bytes([self.next_row])
        self.next_row += 1
        self.truth.append(row)
        self.log.append(
            LogEntry(
                position=self.log.end, count=1, call_count=1, want=WANT_ALL,
                encoding="float32", num_rows=1, payload=row, payload_bytes=1,
            )
        )  # fmt: skip

    def truncate(self) -> None:
        length = len(self.truth) - 1
        rev = self.log.rev + 1
        self.log.cut(rev, [(rev, length)])
        self.out.on_cut()
        self.sink.lower(length)
        del self.truth[length:], self.received[length:]

    # --- what arrives ------------------------------------------------------------------

    def route_arrives(self, peer: PeerId, epoch: int) -> None:
        relay = self.relays.setdefault(peer, Relay(SESSION, FIRST))
        if epoch <= relay.inbound.epoch:
            return
        relay.reroute(C, C, epoch)
        self.put(peer, C, TO_HOP, relay.inbound.have_message(1 << 20, 0))
        self.put(peer, C, TO_CLIENT, Open(SESSION, LAST, epoch))

    def deliver(self, channel: Channel, message: Message) -> None:
        sender, receiver, link = channel
        content, payload = message
        if receiver == C and link == TO_CLIENT:
            answer = self.at_sink(sender, content, payload)
        elif receiver != C and link == TO_HOP:
            answer = self.at_hop(sender, receiver, content, payload)
        else:
            outbound = self.out if receiver == C else self.outbound_of(receiver)
            if outbound is not None and outbound.receiver == sender:
                self.at_sender(outbound, content)
            return
        if answer is not None:
            self.put(receiver, sender, link, answer)

    def outbound_of(self, peer: PeerId) -> Outbound | None:
        relay = self.relays.get(peer)
        return None if relay is None else relay.outbound

    def at_sender(self, outbound: Outbound, content: object) -> None:
        match content:
            case Have(epoch=epoch, rev=rev, length=length, window_bytes=window):
                outbound.on_have(epoch, rev, length, window, length)
            case Gap(epoch=epoch, rev=rev, length=length):
                outbound.on_gap(epoch, rev, length)
            case Ack(epoch=epoch, rev=rev, length=length):
                outbound.on_ack(epoch, rev, length)
            case Stale(epoch=epoch):
                outbound.on_stale(epoch)

    def at_hop(self, sender: PeerId, me: PeerId, content: object, payload: bytes) -> object:
        relay = self.relays.get(me)
        if relay is None:
            return Stale(SESSION, FIRST, 0)
        if isinstance(content, Open):
            if not relay.inbound.is_from_predecessor(sender, content.epoch):
                return relay.inbound.stale_message()
            return relay.inbound.have_message(1 << 20, 0)
        assert isinstance(content, Entry)
        if not relay.inbound.is_from_predecessor(sender, content.epoch):
            return relay.inbound.stale_message()
        return relay.on_entry(sender, content, payload)

    def at_sink(self, sender: PeerId, content: object, payload: bytes) -> object:
        if isinstance(content, Open):
            if not self.sink.is_from_predecessor(sender, content.epoch):
                return self.sink.stale_message()
            return self.sink.have_message(1 << 20, 0)
        assert isinstance(content, Entry)
        limit = self.log.valid_length(content.rev, 1 << 20)
        admission = self.sink.admit(sender, content, payload, limit)
        if admission.verdict is Verdict.STALE:
            return self.sink.stale_message()
        if admission.verdict is Verdict.GAP:
            return self.sink.gap_message()
        if admission.verdict is Verdict.ACCEPTED and admission.entry is not None:
            self.received.append(bytes(admission.entry.data()))
        return None

    def forget(self) -> None:
        """The hop in the chain starts from nothing, at the epoch it knows."""
        old = self.relays[self.hop]
        relay = self.relays[self.hop] = Relay(SESSION, FIRST)
        relay.reroute(C, C, old.inbound.epoch)
        self.put(self.hop, C, TO_HOP, relay.inbound.have_message(1 << 20, 0))
        self.put(self.hop, C, TO_CLIENT, Open(SESSION, LAST, old.inbound.epoch))

    # --- the machinery -----------------------------------------------------------------

    def put(self, sender: PeerId, receiver: PeerId, link: str, content: object) -> None:
        self.channels.setdefault((sender, receiver, link), []).append((content, b""))

    def pump(self) -> None:
        """Cursors send whatever they may."""
        links = [(C, self.out, TO_HOP)]
        links += [(peer, relay.outbound, TO_CLIENT) for peer, relay in self.relays.items()]
        for sender, outbound, link in links:
            while (item := outbound.next_entry()) is not None:
                channel = (sender, outbound.receiver, link)
                message = (item.header, bytes(item.entry.data()))
                self.channels.setdefault(channel, []).append(message)

    def check(self) -> None:
        """The invariant."""
        assert self.received == self.truth[: len(self.received)], "the client got wrong rows"
        assert len(self.received) == self.sink.have
        for peer, relay in self.relays.items():
            rows = [bytes(entry.data()) for entry in relay.log]
            assert relay.log.end == relay.inbound.have == len(rows), f"{NAMES[peer]} lost count"
            if relay.inbound.rev == self.log.rev:
                assert rows == self.truth[: len(rows)], f"{NAMES[peer]} holds wrong rows"

    def deliver_all(self) -> None:
        for _ in range(200):
            while self.routes:
                self.route_arrives(*self.routes.pop(0))
            self.pump()
            channel = next((key for key, queue in self.channels.items() if queue), None)
            if channel is None:
                return
            self.deliver(channel, self.channels[channel].pop(0))
            self.check()
        raise AssertionError("messages go round and round")

    def key(self) -> object:
        """Equal for worlds that behave equally."""

        def of_log(log: Log) -> object:
            return log.rev, tuple(log.cuts), tuple(bytes(entry.data()) for entry in log)

        def of_out(out: Outbound) -> object:
            return (out.receiver, out.epoch, out.is_open, out.is_stale, out.cursor,
                    out.receiver_rev)  # fmt: skip

        def of_in(one: Inbound) -> object:
            return one.epoch, one.predecessor, one.rev, one.have

        relays = tuple(
            (peer, of_log(relay.log), of_out(relay.outbound), of_in(relay.inbound))
            for peer, relay in sorted(self.relays.items())
        )
        channels = tuple(
            (key, tuple(map(repr, queue))) for key, queue in sorted(self.channels.items()) if queue
        )
        return (
            self.epoch, self.hop, tuple(self.truth), of_log(self.log), of_out(self.out),
            of_in(self.sink), relays, channels, tuple(self.routes), repr(self.bounds),
        )  # fmt: skip


def events(world: World) -> Iterator[tuple[str, Callable[[World], None]]]:
    """Everything that may happen next."""
    bounds = world.bounds

    def spend(kind: str) -> Callable[[World], None]:
        def act(w: World) -> None:
            setattr(w.bounds, kind, getattr(w.bounds, kind) - 1)

        return act

    def both(*acts: Callable[[World], object]) -> Callable[[World], None]:
        return lambda w: [act(w) for act in acts] and None

    for index, (peer, epoch) in enumerate(world.routes):
        yield (
            f"route {epoch} reaches {NAMES[peer]}",
            both(lambda w, i=index: w.route_arrives(*w.routes.pop(i))),
        )
    for channel, queue in world.channels.items():
        if not queue:
            continue
        name = f"{NAMES[channel[0]]}>{NAMES[channel[1]]} {type(queue[0][0]).__name__}"
        yield f"deliver {name}", lambda w, c=channel: w.deliver(c, w.channels[c].pop(0))
        if bounds.lose:
            yield f"lose {name}", both(spend("lose"), lambda w, c=channel: w.channels[c].pop(0))
        if bounds.repeat:
            yield (
                f"repeat {name}",
                both(spend("repeat"), lambda w, c=channel: w.deliver(c, w.channels[c][0])),
            )
    if bounds.append:
        yield "append", both(spend("append"), World.append)
    if bounds.truncate and world.truth:
        yield "truncate", both(spend("truncate"), World.truncate)
    if bounds.replace:
        yield "replace", both(spend("replace"), lambda w: w.route(R))
    if bounds.forget and world.hop in world.relays:
        yield "forget", both(spend("forget"), World.forget)


def check_everything(bounds: Bounds) -> int:
    """Visit every reachable state; returns how many there are."""
    start = World(bounds)
    start.append()
    start.deliver_all()  # an established chain with one row at the end
    seen = {start.key()}
    frontier: list[tuple[World, tuple[str, ...]]] = [(start, ())]
    while frontier:
        world, path = frontier.pop()
        for name, act in events(world):
            after = copy.deepcopy(world)
            try:
                act(after)
                after.pump()
                after.check()
                key = after.key()
                if key in seen:
                    continue
                finish(copy.deepcopy(after))
            except AssertionError as error:
                steps = "\n  ".join((*path, name))
                raise AssertionError(f"{error}, after:\n  {steps}") from error
            seen.add(key)
            frontier.append((after, (*path, name)))
    return len(seen)


def finish(world: World) -> None:
    """From here the system must be able to deliver everything."""
    world.deliver_all()
    world.route(world.hop)
    world.deliver_all()
    assert world.received == world.truth, "rows are missing at the end"


def test_a_zombie_and_a_truncation_in_every_order() -> None:
    # append=2, truncate=2 has 300,226 states and takes 7 minutes; last run by hand, passed
    count = check_everything(Bounds(append=1, truncate=1, replace=1, lose=0, repeat=0, forget=0))
    assert count > 5000


def test_loss_and_duplication_in_every_order() -> None:
    count = check_everything(Bounds(append=2, truncate=2, replace=0, lose=1, repeat=1, forget=0))
    assert count > 1000


def test_a_hop_that_forgets_in_every_order() -> None:
    count = check_everything(Bounds(append=2, truncate=1, replace=0, lose=0, repeat=0, forget=1))
    assert count > 1000
