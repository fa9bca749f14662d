"""Which server's head a thin client asks: a pure decision over what records say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from shoal.base.ids import PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadOffer:
    """A server that answers thin clients."""

    peer: PeerId
    numerics: str
    """Heads of equal classes choose the same tokens."""
    is_leaving: bool = False


def choose_head(
    offers: Sequence[HeadOffer],
    *,
    avoid: Collection[PeerId] = (),
    numerics: str = "",
    sessions: Mapping[PeerId, int] | None = None,
) -> PeerId | None:
    """The head for a session; None: nobody but those to avoid, or nobody at all.

    In this order: who stays, the class that the session had before (`numerics`), the class
    that most heads have (so that another one can go on), fewest of our own sessions. Among
    equals the first: the caller's order is chance.
    """
    common = Counter(offer.numerics for offer in offers)
    used = sessions or {}
    free = [offer for offer in offers if offer.peer not in avoid]
    if not free:
        return None
    return min(
        free,
        key=lambda offer: (
            offer.is_leaving,
            offer.numerics != numerics if numerics else False,
            -common[offer.numerics],
            used.get(offer.peer, 0),
        ),
    ).peer
