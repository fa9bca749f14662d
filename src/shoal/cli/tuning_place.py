"""Where the blocks of a run are that needs whole passes: at servers, or all of them here."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import dataclass

from shoal.cli.joining import SwarmChoice
from shoal.cli.models import OpenModel
from shoal.cli.options import DEFAULT_SWARM
from shoal.discovery.lan import find_on_lan, none_found
from shoal.hf.auto import AutoDistributedModelForCausalLM
from shoal.hf.connection import Joining
from shoal.hf.tuning_base import TuningBase
from shoal.hf.tuning_swarm import SwarmBase
from shoal.hf.tuning_whole import load_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the blocks are."""

    swarm: SwarmChoice | None
    """None: here, the whole model."""
    patience_s: float


def open_base(place: Place, model: OpenModel, stack: ExitStack) -> TuningBase:
    """The model there; `stack` leaves the swarm.

    Raises:
        ModelError: broken or unsupported.
        NoRouteError, PeerError: no swarm, or nobody has some of the blocks.
    """
    if place.swarm is None:
        return load_whole(model.source, model.name)
    choice = place.swarm
    joins = choice.joins
    if choice.is_lan:
        swarm = choice.name or DEFAULT_SWARM
        joins = (*joins, *asyncio.run(find_on_lan(swarm)))
        if not joins:
            raise none_found(swarm)
    opened = stack.enter_context(
        AutoDistributedModelForCausalLM.from_pretrained(
            model.source,
            join=Joining(joins=joins, swarm=choice.name, invite=choice.invite),
            patience_s=place.patience_s,
        )
    )
    return SwarmBase(opened)
