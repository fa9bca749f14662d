"""A live swarm as a problem of placement: what its records, loads and round trips say.

A record tells a server's speed, its span and its cache, not its whole memory: planning
gives it as much as it uses now. Round trips are measured from here, those between servers
estimated from the coordinates in their records; where most have none, chains are priced
through the client (the hub).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from shoal.base.content import is_hash
from shoal.base.errors import ConfigError, ModelUnknown, NoRouteError
from shoal.base.ids import peer_text
from shoal.base.spans import Span
from shoal.cli.plan_file import TOKENS_IN, TOKENS_OUT, Asked, Cluster, PlannedServer
from shoal.cli.plan_model import BLOCKS_MAX, DTYPE_BYTES, PlannedModel, named_model
from shoal.cli.status import Seen
from shoal.discovery.coordinates import from_wire
from shoal.net.address import parse_address
from shoal.plan.change import LOAD_BYTES_PER_S
from shoal.plan.cost import DECODE_UNKNOWN_S
from shoal.plan.devices import decode_between
from shoal.plan.live_problem import known_links
from shoal.plan.memory import mha
from shoal.plan.placement import Placement
from shoal.plan.spec import DecodeTimes, Problem, ServerSpec, Workload, uniform_model
from shoal.plan.ways import Place, trusted_rate

PARAMS_SHARE: Final = 12
"""Weights of a plain block, in squares of its hidden size: a guess where none is given."""

NAME_CHARS: Final = 8
"""Of a peer's id, as `shoal status` shows it."""


def observed(seen: Sequence[Seen], wanted: str | None, asked: Asked) -> Cluster:
    """The swarm of one model, as it is now.

    `wanted` names the model: its hash or the beginning of it, or a model of this machine,
    whose block sizes are then exact. None: the only one.

    Raises:
        NoRouteError: nobody serves it.
        ConfigError: several models, and none named.
    """
    name, given = _choose(seen, wanted)
    mine = [one for one in seen if one.record.model == name]
    shape = Counter(_shape(one) for one in mine).most_common(1)[0][0]
    usable = [
        one
        for one in mine
        if not one.error and one.record.state != "draining" and _shape(one) == shape
    ]
    if not usable:
        raise NoRouteError(f"no server of model {name} answers and stays")
    if shape[0] > BLOCKS_MAX:
        raise ConfigError(
            f"model {name} has {shape[0]} blocks; planning takes {BLOCKS_MAX} at most"
        )
    model = _model(usable, given)
    specs = tuple(_spec(one, model, is_guess=given is None) for one in usable)
    running = max((one.load.sessions for one in usable if one.load is not None), default=1)
    problem = Problem(
        model=model.spec,
        servers=specs,
        links=known_links([_place(one) for one in usable]),
        workload=Workload(
            tokens_in=asked.tokens_in or TOKENS_IN,
            tokens_out=asked.tokens_out or TOKENS_OUT,
            requests_per_s=asked.requests_per_s or 0.0,
            sessions=asked.sessions or max(1, running),
        ),
    )
    return Cluster(
        problem=problem,
        model=model,
        servers=tuple(_server(one) for one in usable),
        load_bytes_per_s=(LOAD_BYTES_PER_S,) * len(usable),
        present=Placement(spans=tuple(Span(one.record.start, one.record.end) for one in usable)),
        objective=None,
        notes=_notes(mine, usable, is_guess=given is None, is_push=problem.links.flow == "push"),
    )


def _place(one: Seen) -> Place:
    there = from_wire(one.record.coordinate)
    if one.rtt_s is None:
        return Place(coordinate=there)
    return Place(rtt_s=one.rtt_s, is_measured=True, coordinate=there)


def _shape(one: Seen) -> tuple[int, int]:
    return one.record.num_blocks, one.record.hidden_size


def _choose(seen: Sequence[Seen], wanted: str | None) -> tuple[str, str | None]:
    """(hash, name on this machine or None)."""
    models = sorted({one.record.model for one in seen})
    if not models:
        raise NoRouteError("the swarm has no servers")
    if wanted is None:
        if len(models) > 1:
            raise ConfigError(
                f"the swarm serves {len(models)} models ({', '.join(models)}): add --model"
            )
        return models[0], None
    found = [name for name in models if name.startswith(wanted)]
    if len(found) == 1:
        return found[0], None
    if is_hash(wanted) or len(found) > 1:
        raise ConfigError(f"--model {wanted}: the swarm serves {', '.join(models)}")
    from shoal.cli.models import open_model

    try:
        name = open_model(wanted).name
    except ModelUnknown as error:
        served = ", ".join(models)
        raise ConfigError(f"--model {wanted}: the swarm serves {served}; {error.detail}") from error
    if name not in models:
        raise ConfigError(f"--model {wanted} is model {name}; the swarm serves {', '.join(models)}")
    return name, wanted


def _model(usable: Sequence[Seen], given: str | None) -> PlannedModel:
    record = usable[0].record
    dtype = next((one for one in record.encodings if one in DTYPE_BYTES), "float32")
    if given is not None:
        exact = named_model(given, dtype, "none")
        return replace(exact, spec=replace(exact.spec, keeps_logs=False))
    width = DTYPE_BYTES[dtype]
    params = PARAMS_SHARE * record.hidden_size**2
    return PlannedModel(
        given=None,
        spec=uniform_model(
            record.num_blocks,
            params * width,
            mha(1, record.hidden_size, width),
            hidden_size=record.hidden_size,
            row_bytes=record.hidden_size * width,
        ),
        params_per_block=float(params),
        dtype=dtype,
        quantize="none",
        active=1.0,
    )


def _spec(one: Seen, model: PlannedModel, *, is_guess: bool) -> ServerSpec:
    """A server with the memory that its blocks and its cache take now."""
    record, span = one.record, Span(one.record.start, one.record.end)
    blocks = range(span.start, span.end)
    tokens = record.cache_tokens
    row_s = record.prefill_s_per_block_token
    decode = DecodeTimes(points=((1, record.decode_s_per_block or DECODE_UNKNOWN_S),))
    if record.decode_s_by_batch:
        decode = DecodeTimes(points=tuple(record.decode_s_by_batch))
    elif row_s > 0:
        decode = decode_between(decode.at(1), row_s)
    memory = sum(model.spec.weight_bytes[block] for block in blocks)
    memory += sum(model.spec.caches[block].session_bytes(tokens) for block in blocks)
    return ServerSpec(
        name=peer_text(record.peer)[:NAME_CHARS],
        memory_bytes=memory,
        decode=decode,
        prefill_s_per_block_token=row_s,
        uplink_bytes_per_s=trusted_rate(record.sent_bytes_per_s),
        num_blocks_max=len(span) if is_guess else None,
    )


def _server(one: Seen) -> PlannedServer:
    """It would listen where it does now."""
    address = parse_address(one.record.addresses[0])
    host = address.host if address.host.startswith("127.") else "0.0.0.0"
    return PlannedServer(
        name=peer_text(one.record.peer)[:NAME_CHARS],
        listen=f"tcp://{host}:{address.port}",
        address=one.record.addresses[0],
    )


def _rates_note(usable: Sequence[Seen]) -> str:
    known = sum(one.record.sent_bytes_per_s > 0 for one in usable)
    if known == len(usable):
        return "Rates of links are those at which servers were seen to send."
    return (
        f"{known} of {len(usable)} servers have sent enough to know how fast their links are: "
        "those of the others are taken to be unlimited."
    )


def _notes(
    mine: Sequence[Seen], usable: Sequence[Seen], *, is_guess: bool, is_push: bool
) -> tuple[str, ...]:
    between = "those between servers are estimated from their coordinates"
    if not is_push:
        between = "servers don't know their places yet, so chains are priced through this client"
    notes = [
        f"Memory is what each server uses now; round trips are those from here, and {between}.",
        _rates_note(usable),
    ]
    left_out = len(mine) - len(usable)
    if left_out:
        notes.append(f"{left_out} servers that leave, don't answer or say odd things are left out.")
    unmeasured = sum(
        not (one.record.decode_s_per_block or one.record.decode_s_by_batch) for one in usable
    )
    if unmeasured:
        notes.append(
            f"{unmeasured} servers have not measured their speed: "
            f"{DECODE_UNKNOWN_S * 1e3:g} ms per block is assumed."
        )
    if is_guess:
        notes.append(
            "Block sizes are guessed from the hidden size, and no server is given more blocks "
            "than it has: name the model with --model for exact sizes."
        )
    return tuple(notes)
