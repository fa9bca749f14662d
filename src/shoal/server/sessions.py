"""All sessions of a server: opening, forking, closing, and who gives way when it is full.

Victim order under pressure: sessions that have long been idle, then the youngest by
opening time, and never one that is older than who asks. The opening time is part of the
signed route and the same everywhere, so two servers never evict each other's sessions
in turn: whoever waits, waits for an older one, and the oldest of all goes on. It is only
what the owner says, though, so one owner may hold only a share of the cache, and so may all
owners of one address; within it their sessions give way to each other in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Final

from shoal.base.adapters import AdapterId
from shoal.base.backend import BackendFacts, BlockBackend, SequenceId
from shoal.base.errors import PeerBusy, SessionTooLong
from shoal.base.ids import PeerId, SessionId
from shoal.base.spans import Span
from shoal.net.origin import Origin
from shoal.server.pages import PageLedger
from shoal.server.quotas import RETRY_AFTER_S, SESSIONS_MAX, Line, Quotas, owners_over
from shoal.server.session import HopPlan, HopSession, SessionKey
from shoal.server.shares import left_for, room_for
from shoal.wire.messages import Fork

IDLE_VICTIM_S: Final = 30.0
"""Idle this long, a session gives way to any other: nobody waits for its next token."""

RETURN_MARGIN_TOKENS: Final = 64
"""An evicted session returns only when this much more than its length fits."""


class SessionTable:
    """The hops this server runs, and the cache they hold."""

    def __init__(
        self, backend: BlockBackend, *, window_bytes: int, quotas: Quotas | None = None
    ) -> None:
        self._backend = backend
        self._window_bytes = window_bytes
        self.quotas = quotas or Quotas()
        self.line = Line()
        self.num_opened = 0
        """Sessions opened, ever."""
        self.num_rebuilt = 0
        """Of these, those that a repair or a move brought: they are filled by replay."""
        self._hops: dict[SessionKey, HopSession] = {}
        self._by_border: dict[SessionKey, HopSession] = {}
        """The same hops by (session, end block)."""
        self._doomed: list[SequenceId] = []
        self._next_sequence = 0
        self.on_parked: Callable[[HopSession], None] = _nobody
        """Told of each hop whose cache was taken away."""
        facts = backend.facts
        self.ledger = PageLedger(facts.cache_tokens, facts.page_tokens)

    @property
    def facts(self) -> BackendFacts:
        """What the backend is."""
        return self._backend.facts

    def __iter__(self) -> Iterator[HopSession]:
        return iter(self._hops.values())

    def __len__(self) -> int:
        return len(self._hops)

    def find(self, key: SessionKey) -> HopSession | None:
        """The hop's state, if there is any."""
        return self._hops.get(key)

    def sending(self, session: SessionId, border: int) -> HopSession | None:
        """The hop that sends over this link, if it is here."""
        return self._by_border.get((session, border))

    def of_session(self, session: SessionId) -> list[HopSession]:
        """All hops of one session here."""
        return [hop for hop in self._hops.values() if hop.plan.session == session]

    def of_owner(self, owner: PeerId) -> list[HopSession]:
        """All hops of one client here."""
        return [hop for hop in self._hops.values() if hop.plan.owner == owner]

    def adapters(self) -> set[AdapterId]:
        """Those that sessions use."""
        return {hop.adapter for hop in self._hops.values() if hop.adapter is not None}

    def has_predecessor(self, peer: PeerId) -> bool:
        """Whether any hop here takes rows from this peer."""
        return any(hop.plan.predecessor == peer for hop in self._hops.values())

    def open(
        self,
        plan: HopPlan,
        parent: Fork | None,
        now_s: float,
        adapter: AdapterId | None = None,
        origin: Origin | None = None,
    ) -> HopSession:
        """A new hop, empty or forked; replaces an old one. Only while no engine iteration runs.

        `adapter` is the plan's in the backend; `origin` is where its owner connects from.

        Raises:
            PeerBusy: too many sessions, or no cache page is free and nobody here is
                younger or idle; says when to come back, and keeps a place until then.
        """
        self._check_count(plan, origin)
        hop = HopSession(plan, self._take_sequence(), window_bytes=self._window_bytes)
        hop.used_s, hop.adapter, hop.origin = now_s, adapter, origin
        self._enlist(hop)
        if not self._fork_from(parent, hop):
            self._find_place(hop, now_s)
            self.settle()
            try:
                self._backend.open(hop.sequence, plan.span, adapter)
            except BaseException:
                self.ledger.release(hop.sequence)
                raise
        old = self._hops.get(hop.key)
        if old is not None:
            self.close(old)
        self._hops[hop.key] = hop
        self._by_border[(plan.session, plan.span.end)] = hop
        self.num_opened += 1
        self.num_rebuilt += plan.epoch > 1
        return hop

    def _find_place(self, hop: HopSession, now_s: float) -> None:
        """Take the first page; free ones go to those first who wait in line for them.

        Raises:
            PeerBusy: there is none yet.
        """
        session = hop.plan.session
        ahead = self.line.ahead_of(session, now_s)
        is_taken = 0 < self.ledger.free <= ahead and not self._may_give_way(hop, now_s)
        if is_taken or self.make_room(hop, 1, now_s) is None:
            if hop.plan.is_standby:  # nobody waits for it: no place in line
                raise PeerBusy("all KV cache is in use", retry_after_s=RETRY_AFTER_S)
            if self._is_address_capped(hop, 1):  # its place would keep free pages from others
                raise PeerBusy(
                    "clients of your address hold all KV cache that they may (see --address-share)",
                    retry_after_s=RETRY_AFTER_S,
                )
            place, eta_s = self.line.wait(session, hop.plan.owner, now_s, hop.origin)
            raise PeerBusy(
                f"all KV cache is in use; place {place} in line, expected in {eta_s:.0f} s",
                retry_after_s=eta_s,
            )
        self.line.leave(session, hop.plan.owner)

    def called(self, now_s: float) -> list[tuple[PeerId, SessionId]]:
        """Who is first in line and may come now, if it was not told yet."""
        return self.line.call(min(1, self.ledger.free), now_s)

    def room_in_s(self, now_s: float) -> float:
        """In how many seconds a new session should find room; 0: there is some."""
        if self.ledger.free > len(self.line):
            return 0.0
        return self.line.room_in_s(now_s)

    def _check_count(self, plan: HopPlan, origin: Origin | None) -> None:
        if len(self._hops) >= SESSIONS_MAX:
            raise PeerBusy(f"{SESSIONS_MAX} sessions are open", retry_after_s=RETRY_AFTER_S)
        limit = self.quotas.sessions_per_client
        if len(self.of_owner(plan.owner)) >= limit:
            raise PeerBusy(
                f"you have {limit} sessions open here",
                retry_after_s=RETRY_AFTER_S,
            )
        left = left_for(
            origin,
            ((hop.origin, 1) for hop in self._hops.values()),
            total=SESSIONS_MAX,
            share=self.quotas.address_share,
            per_client=limit,
        )
        if left <= 0:
            raise PeerBusy(
                "clients of your address have enough sessions open here (see --address-share)",
                retry_after_s=RETRY_AFTER_S,
            )

    def close(self, hop: HopSession) -> None:
        """Forget the hop; its cache is freed before the next iteration."""
        if self._hops.get(hop.key) is hop:
            del self._hops[hop.key]
            border = (hop.plan.session, hop.plan.span.end)
            if self._by_border.get(border) is hop:
                del self._by_border[border]
            self.ledger.release(hop.sequence)
            self._doomed.append(hop.sequence)

    def settle(self) -> list[HopSession]:
        """Make all due closings and truncations; only while no engine iteration runs.

        Returns the hops that lost rows which must come again.
        """
        for sequence in self._doomed:
            self._backend.close(sequence)
        self._doomed.clear()
        shortened: list[HopSession] = []
        for hop in self._hops.values():
            length = hop.due_truncation()
            if length is None:
                continue
            actual = self._backend.truncate(hop.sequence, length)
            if hop.cache_was_cut(length, actual):
                shortened.append(hop)
            if not hop.is_parked:
                self.ledger.hold(hop.sequence, max(1, actual))
        return shortened

    def make_room(
        self, hop: HopSession, length: int, now_s: float, keep: Collection[SessionKey] = ()
    ) -> list[HopSession] | None:
        """Let `hop` hold `length` positions, parking others (but none of `keep`) if need be.

        Returns the hops that were parked, or None when it can't be done now.

        Raises:
            SessionTooLong: it would not fit even alone, or is more than one owner may hold.
        """
        self._check_length(hop, length)
        victims = self._victims(hop, length, now_s, keep)
        if victims is None:
            return None
        for victim in victims:
            self.park(victim)
        if self.ledger.pages(length) > self.ledger.held(hop.sequence):
            self.ledger.hold(hop.sequence, length)
        return victims

    def length_max(self, hop: HopSession) -> int:
        """Positions that it may hold here."""
        return self._owner_pages(hop) * self.ledger.page_tokens

    def _owner_pages(self, hop: HopSession) -> int:
        return max(1, int(self.ledger.total_for(hop.sequence) * self.quotas.cache_share))

    def _address_pages(self, hop: HopSession) -> int:
        """What sessions of the same address may hold together."""
        total, share = self.ledger.total_for(hop.sequence), self.quotas.address_share
        return room_for(total, share, self._owner_pages(hop))

    def _check_length(self, hop: HopSession, length: int) -> None:
        ledger = self.ledger
        total = ledger.total_for(hop.sequence)
        if ledger.pages(length) > total:
            raise SessionTooLong(
                f"{length} positions don't fit into this server's KV cache of "
                f"{total * ledger.page_tokens} (see --cache-tokens)"
            )
        if ledger.pages(length) > self._owner_pages(hop):
            raise SessionTooLong(
                f"{length} positions are more than the {self.length_max(hop)} that one client may "
                f"hold of this server's KV cache of {total * ledger.page_tokens} "
                "(see --cache-share)"
            )

    def is_capped(self, hop: HopSession, length: int) -> bool:
        """Whether older sessions of the owner, or of its address, hold what `hop` would need."""
        mine = self.ledger.pages(length) + sum(
            self.ledger.held(other.sequence)
            for other in self._older_beside(hop)
            if _is_of_owner(other, hop)
        )
        return mine > self._owner_pages(hop) or self._is_address_capped(hop, length)

    def _is_address_capped(self, hop: HopSession, length: int) -> bool:
        if hop.origin is None:
            return False
        near = self.ledger.pages(length) + sum(
            self.ledger.held(other.sequence)
            for other in self._older_beside(hop)
            if _is_of_address(other, hop)
        )
        return near > self._address_pages(hop)

    def _older_beside(self, hop: HopSession) -> Iterator[HopSession]:
        for other in self._hops.values():
            if other.seniority < hop.seniority and self.is_beside(other, hop):
                yield other

    def _victims(
        self, hop: HopSession, length: int, now_s: float, keep: Collection[SessionKey] = ()
    ) -> list[HopSession] | None:
        """Who must be parked so that `hop` may hold `length`; None: it can't be done."""
        lacking = self.ledger.lacking(hop.sequence, length)
        over, over_near = self._over_shares(hop, length)
        if max(lacking, over, over_near) <= 0:
            return []
        victims: list[HopSession] = []
        for victim in self._may_give_way(hop, now_s):
            is_own, is_near = _is_of_owner(victim, hop), _is_of_address(victim, hop)
            is_wanted = lacking > 0 or (over > 0 and is_own) or (over_near > 0 and is_near)
            if victim.key in keep or not is_wanted:
                continue
            victims.append(victim)
            pages = self.ledger.held(victim.sequence)
            lacking -= pages
            over -= pages * is_own
            over_near -= pages * is_near
        return victims if max(lacking, over, over_near) <= 0 else None

    def _over_shares(self, hop: HopSession, length: int) -> tuple[int, int]:
        """Pages that other sessions of the owner, and of its address, must give up for it."""
        mine = near = self.ledger.pages(length)
        for other in self._hops.values():
            if other is not hop and self.is_beside(other, hop):
                pages = self.ledger.held(other.sequence)
                mine += pages * _is_of_owner(other, hop)
                near += pages * _is_of_address(other, hop)
        over_near = 0 if hop.origin is None else near - self._address_pages(hop)
        return mine - self._owner_pages(hop), over_near

    def _may_give_way(self, hop: HopSession, now_s: float) -> list[HopSession]:
        """In the order in which they do: standbys, the idle, the younger.

        To a standby only younger standbys give way.
        """
        standbys: list[HopSession] = []
        idle: list[HopSession] = []
        younger: list[HopSession] = []
        for other in self._hops.values():
            if other is hop or not self.ledger.held(other.sequence):
                continue
            if not self.is_beside(other, hop):
                continue
            if other.plan.is_standby:
                if other.seniority > hop.seniority:
                    standbys.append(other)
            elif hop.plan.is_standby:
                continue
            elif not other.has_work and now_s - other.used_s > IDLE_VICTIM_S:
                idle.append(other)
            elif other.seniority > hop.seniority:
                younger.append(other)
        idle.sort(key=lambda other: other.used_s)
        for group in (standbys, younger):
            group.sort(key=lambda other: other.seniority, reverse=True)
        return standbys + idle + younger

    def _fork_from(self, parent: Fork | None, hop: HopSession) -> bool:
        """Start `hop` as a copy of its parent's cache and log; False when there is none."""
        if parent is None:
            return False
        source = self.find((SessionId(parent.session), hop.plan.span.start))
        if (
            source is None
            or source.is_parked
            or source.inbound.rev < parent.rev
            or source.plan.owner != hop.plan.owner
            or (source.plan.span, source.plan.encoding) != (hop.plan.span, hop.plan.encoding)
            or source.plan.adapter != hop.plan.adapter
        ):
            return False
        held = min(parent.length, source.settled_length, source.log.end)
        length = source.log.valid_length(parent.rev, held)
        is_retired = self.ledger.is_retired(source.sequence)
        self.ledger.assign(hop.sequence, is_retired=is_retired)
        over = max(self._over_shares(hop, length))
        if length == 0 or max(self.ledger.lacking(hop.sequence, length), over) > 0:
            self._enlist(hop)
            return False
        actual = self._backend.fork(source.sequence, hop.sequence, length)
        self.ledger.hold(hop.sequence, max(1, actual))
        hop.start_from(source.log.fork(parent.rev, actual))
        hop.adapter = source.adapter
        return True

    # --- a move to other blocks ----------------------------------------------------------

    @property
    def retired(self) -> list[HopSession]:
        """The hops that live in the cache of the blocks that we leave."""
        return [hop for hop in self._hops.values() if self.ledger.is_retired(hop.sequence)]

    def retire_all(self) -> None:
        """The backend has just got other blocks: all that run now stay with the old ones.

        Only while no engine iteration runs.
        """
        self.settle()
        sequences = [hop.sequence for hop in self._hops.values()]
        self.ledger.retire(sequences, self.facts.cache_tokens)

    def end_retirement(self) -> None:
        """None of them is left; only while no engine iteration runs."""
        self.settle()
        self.ledger.end_retirement()

    def runs(self, session: SessionId, span: Span) -> bool:
        """Whether a hop of the session runs just these blocks here."""
        hop = self.find((session, span.start))
        return hop is not None and hop.plan.span == span

    def _enlist(self, hop: HopSession) -> None:
        """A hop that is opened anew goes to the newest blocks, if they will do."""
        is_retired = not self.facts.span.covers(hop.plan.span)
        self.ledger.assign(hop.sequence, is_retired=is_retired)

    def is_beside(self, one: HopSession, other: HopSession) -> bool:
        """Whether both live in the same cache."""
        return self.ledger.is_retired(one.sequence) == self.ledger.is_retired(other.sequence)

    def bound_logs(self) -> None:
        """Let those with most give up acknowledged rows when all logs together are too long."""
        held: dict[PeerId, int] = {}
        for hop in self._hops.values():
            held[hop.plan.owner] = held.get(hop.plan.owner, 0) + hop.log.num_bytes
        if sum(held.values()) <= self.quotas.log_bytes_max:
            return
        for owner in owners_over(held, self.quotas.log_bytes_max):
            for hop in self.of_owner(owner):
                hop.shorten_log(hop.log.num_bytes // 2)

    def park(self, hop: HopSession) -> None:
        """Take the hop's cache away; it returns by replay when there is room."""
        hop.parked_length = max(hop.inbound.have, hop.parked_length)
        hop.wants_return = hop.wants_return or hop.has_work
        hop.is_parked = hop.is_rebuilding = True
        hop.lose_cache(0)
        self.ledger.release(hop.sequence)
        self.on_parked(hop)

    def park_all(self) -> list[HopSession]:
        """Take every cache away that the engine does not work on; returns whose."""
        parked = [hop for hop in self._hops.values() if not hop.is_parked and not hop.running]
        for hop in parked:
            self.park(hop)
        return parked

    def returning(self) -> list[HopSession]:
        """Parked hops that have work, oldest first."""
        waiting = [hop for hop in self._hops.values() if hop.is_parked and hop.wants_return]
        return sorted(waiting, key=lambda hop: hop.seniority)

    def _take_sequence(self) -> SequenceId:
        self._next_sequence += 1
        return SequenceId(self._next_sequence)


def _is_of_owner(one: HopSession, other: HopSession) -> bool:
    return one.plan.owner == other.plan.owner


def _is_of_address(one: HopSession, other: HopSession) -> bool:
    return one.origin is not None and one.origin == other.origin


def _nobody(hop: HopSession) -> None:
    """Nobody wants to hear of it."""
