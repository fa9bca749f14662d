"""A pass-through hop at the client, between two servers that can't reach each other.

It is a hop without blocks: what comes in is logged and sent on as it is.
"""

from __future__ import annotations

from shoal.base.ids import PeerId, SessionId
from shoal.link.inbound import Inbound, Verdict
from shoal.link.log import Log
from shoal.link.outbound import Outbound
from shoal.wire.frames import Buffer
from shoal.wire.messages import Ack, Entry, Gap, Stale


class Relay:
    """The state of one border that the client relays over."""

    def __init__(self, session: SessionId, border: int, log: Log | None = None) -> None:
        self.inbound = Inbound(session, border)
        self.log = log or Log()
        self.inbound.have = self.log.end
        self.outbound = Outbound(session, border, self.log)

    def reroute(self, before: PeerId, after: PeerId, epoch: int) -> None:
        """Follow a new epoch."""
        self.inbound.reroute(before, epoch)
        self.outbound.reroute(after, epoch)

    def on_entry(self, peer: PeerId, entry: Entry, payload: Buffer) -> Gap | Ack | Stale:
        """Take rows over into the log."""
        admission = self.inbound.admit(peer, entry, payload)
        if admission.cuts:
            self.log.cut(entry.rev, admission.cuts)
            self.outbound.on_cut()
        if admission.verdict is Verdict.STALE:
            return self.inbound.stale_message()
        if admission.verdict is Verdict.GAP:
            return self.inbound.gap_message()
        if admission.verdict is Verdict.ACCEPTED and admission.entry is not None:
            self.log.append(admission.entry)
        return self.inbound.ack_message(self.log.end)
