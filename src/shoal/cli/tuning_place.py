"""Where the blocks of a run are that needs whole passes: at servers, or all of them here."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import dataclass

from shoal.cli.joining import SwarmChoice
from shoal.cli.models import OpenModel, open_model
from shoal.cli.options import DEFAULT_SWARM
from shoal.cli.peer_weights import fetch_for_client
from shoal.client.training import TrainConfig
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
    limit_bytes: int | None = None
    """Of the store of weights from peers; None: the model is a copy of our own."""
    verify_rate: float = 0.0
    """Share of what servers compute that another one computes as well."""


def open_model_for(place: Place, given: str) -> OpenModel:
    """The model: embedding, norm, head and tokenizer come from peers if that was asked for.

    Raises:
        ModelError: unknown, broken or unsupported.
        ConfigError, PeerError: it can't be had from peers; says why.
    """
    if place.swarm is None or place.limit_bytes is None:
        return open_model(given)
    return asyncio.run(fetch_for_client(given, place.swarm, place.limit_bytes))


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
    opened.training_steps = TrainConfig(verify_rate=place.verify_rate)
    return SwarmBase(opened)
