"""`shoal serve`: host a span of a model's blocks until told to stop."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from shoal.base.spans import parse_span
from shoal.cli.adapters import (
    ADAPTER_MEMORY,
    AdapterMemoryOption,
    ServedAdaptersOption,
    parse_served,
)
from shoal.cli.bounds import (
    ADDRESS_SHARE,
    CACHE_SHARE,
    CLIENT_RATE,
    CLIENT_ROWS,
    CLIENT_SESSIONS,
    CLIENT_STREAMS,
    IDLE_TIMEOUT,
    LOG_MEMORY,
    QUEUE_MEMORY,
    SLOWDOWN,
    TRAINING_MEMORY,
    TRAINING_ROWS,
    AddressShareOption,
    AllowOption,
    CacheShareOption,
    ClientRateOption,
    ClientRowsOption,
    ClientSessionsOption,
    ClientStreamsOption,
    DenyOption,
    IdleTimeoutOption,
    LogMemoryOption,
    QueueMemoryOption,
    SlowdownOption,
    TrainingMemoryOption,
    TrainingRowsOption,
    parse_bounds,
)
from shoal.cli.interrupts import noticing_interrupts
from shoal.cli.joining import SwarmChoice
from shoal.cli.options import (
    CacheLimitOption,
    FromPeersOption,
    InviteOption,
    ModelArgument,
    SwarmOption,
    ThreadsOption,
)
from shoal.cli.sizes import parse_size
from shoal.cli.threads import set_threads
from shoal.cli.tracing import TRACE_LIMIT, TraceLimitOption, TraceOption, parse_trace

REBALANCE_S = 120.0
"""Petals' default."""

LISTEN = "tcp://127.0.0.1:0"
LISTEN_LAN = "tcp://0.0.0.0:0"

BlocksOption = Annotated[
    str | None, typer.Option(metavar="A:B", help="Blocks A to B-1 (default: all).")
]
NumBlocksOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Instead of --blocks: host N blocks, wherever they do the swarm most good, and "
        "move when that changes. Without --join it begins with the first N.",
    ),
]
PlacementOption = Annotated[
    str | None,
    typer.Option(
        metavar="RULE",
        help="How --num-blocks chooses: latency (short answers; the default), petals (as many "
        "rows per second for each block as for the next), or fixed (choose once, never move).",
    ),
]
RebalanceOption = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        help="How often a server that chose its blocks looks whether others would be better, on "
        "average; it moves only if all blocks stay covered. 0: never.",
    ),
]
ListenOption = Annotated[
    str,
    typer.Option(
        metavar="tcp://HOST:PORT",
        help="Where to listen; port 0 picks a free one. The default is for this machine "
        "only; tcp://0.0.0.0:PORT is for everybody who can reach it.",
    ),
]
AnnounceOption = Annotated[
    str | None,
    typer.Option(
        metavar="tcp://HOST:PORT",
        help="Address to tell others if it is not the one listened on (behind a router); port 0 "
        "means the same port. Without it 0.0.0.0 stands for this machine's own addresses.",
    ),
]
JoinsOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ADDR",
        help="Address of a server of the swarm, as its ready line prints it; repeat for "
        "more. Without it a new swarm begins.",
    ),
]
LanServeOption = Annotated[
    bool,
    typer.Option(
        "--lan",
        help="Announce this server in the local network and find others there (multicast DNS). "
        f"Without --listen it then listens on {LISTEN_LAN}.",
    ),
]
DtypeOption = Annotated[
    str, typer.Option(help="float32, bfloat16 or float16; float32 is the quick one on CPUs.")
]
QuantizeOption = Annotated[
    str,
    typer.Option(
        metavar="KIND",
        help="Smaller weights: int8 (close to bfloat16) or int4 (half of that, with a visible "
        "loss). Best with --dtype bfloat16, for few sessions at once.",
    ),
]
ExactOption = Annotated[
    str,
    typer.Option(
        metavar="WHEN",
        help="Repeat every bit of a session after a repair, whoever else is served: auto (where "
        "it costs nothing), always (mixtures of experts too, for a tenth or two of the speed) "
        "or never.",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
CacheOption = Annotated[
    int, typer.Option(metavar="N", help="Positions that the KV cache holds, over all sessions.")
]
IdentityOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Key file of this peer, made if it is missing (default: a new peer each time).",
    ),
]
WithHeadOption = Annotated[
    bool,
    typer.Option(
        "--with-head",
        help="Also run embedding, final norm and head for thin clients (--thin): they send tokens "
        "and get tokens. You then read their texts.",
    ),
]
MetricsOption = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Answer Prometheus at http://HOST:PORT/metrics; :PORT is for this machine only.",
    ),
]
DRAIN_S: Final = 30.0
"""Long enough to replay some thousand tokens elsewhere."""

DrainOption = Annotated[
    float,
    typer.Option(
        "--drain",
        metavar="S",
        min=0,
        help="Seconds for sessions to move to other servers, and for answers to thin clients to "
        "end, when this one is told to stop; 0: stop at once, and they are repaired.",
    ),
]
WeightsRateOption = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        help="Bytes per second at which other peers may fetch weights from here, a quarter of "
        "it while sessions are served; 0 hands out none.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve")(serve)


def serve(
    model: ModelArgument,
    blocks: BlocksOption = None,
    num_blocks: NumBlocksOption = None,
    placement: PlacementOption = None,
    rebalance: RebalanceOption = REBALANCE_S,
    listen: ListenOption = LISTEN,
    announce: AnnounceOption = None,
    join: JoinsOption = None,
    lan: LanServeOption = False,
    dtype: DtypeOption = "float32",
    quantize: QuantizeOption = "none",
    exact: ExactOption = "auto",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    cache_tokens: CacheOption = 8192,
    with_head: WithHeadOption = False,
    metrics: MetricsOption = None,
    weights_from_peers: FromPeersOption = False,
    cache_limit: CacheLimitOption = "50GB",
    weights_rate: WeightsRateOption = "32MiB",
    adapter: ServedAdaptersOption = None,
    adapter_memory: AdapterMemoryOption = ADAPTER_MEMORY,
    drain: DrainOption = DRAIN_S,
    identity: IdentityOption = None,
    swarm: SwarmOption = None,
    invite: InviteOption = None,
    allow: AllowOption = None,
    deny: DenyOption = None,
    client_sessions: ClientSessionsOption = CLIENT_SESSIONS,
    cache_share: CacheShareOption = CACHE_SHARE,
    address_share: AddressShareOption = ADDRESS_SHARE,
    client_streams: ClientStreamsOption = CLIENT_STREAMS,
    client_rate: ClientRateOption = CLIENT_RATE,
    client_rows: ClientRowsOption = CLIENT_ROWS,
    slowdown: SlowdownOption = SLOWDOWN,
    queue_memory: QueueMemoryOption = QUEUE_MEMORY,
    log_memory: LogMemoryOption = LOG_MEMORY,
    training_memory: TrainingMemoryOption = TRAINING_MEMORY,
    training_rows: TrainingRowsOption = TRAINING_ROWS,
    idle_timeout: IdleTimeoutOption = IDLE_TIMEOUT,
    trace: TraceOption = None,
    trace_limit: TraceLimitOption = TRACE_LIMIT,
) -> None:
    """Serve a span of a model's blocks.

    When it serves, one line goes to stdout:

    \b
      ready peer=<id> address=<addr> blocks=[A,B)

    The address works unchanged as --join. Ctrl-C or SIGTERM stops it: sessions that run here
    move to other servers with the same blocks first, without a pause, and it waits --drain
    seconds for that. A second Ctrl-C stops it at once.

    A server that was told --num-blocks may go to other blocks later. It loads them while it
    serves, and prints such a line again, with "moved" for "ready". Both spans must fit into
    memory for a while, or it stays.

    With --weights-from-peers this machine needs no copy of the model: only the blocks' own
    tensors are fetched, from several peers at once, and handed on to others. A download that
    was stopped goes on where it was.

    \b
    Examples:
      shoal serve smollm2-135m-instruct --blocks 0:15
      shoal serve smollm2-135m-instruct --blocks 15:30 --join tcp://PEERID@10.0.0.5:4001
      shoal serve smollm2-135m-instruct --num-blocks 10 --join tcp://PEERID@10.0.0.5:4001
      shoal serve smollm2-135m-instruct --num-blocks 10 --placement petals --join ADDR
      shoal serve 2150765b1495 --blocks 15:30 --join ADDR --weights-from-peers
      shoal serve smollm2-135m-instruct --blocks 15:30 --lan
      shoal serve smollm2-135m-instruct --blocks 0:15 --adapter poet=./my-lora
      shoal serve smollm2-135m-instruct --blocks 15:30 --join ADDR --with-head --metrics :9100
      shoal serve ./my-model --listen tcp://0.0.0.0:4001 --announce tcp://my.host:4001
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with noticing_interrupts(signal.SIGINT, signal.SIGTERM):
            thread_count = set_threads(threads)
            from shoal.cli.metrics_host import parse_where
            from shoal.cli.models import open_model
            from shoal.cli.placing import parse_place
            from shoal.cli.serving import ServeSettings, serve_until_stopped

            settings = ServeSettings(
                swarm=SwarmChoice.parse(join, swarm, invite, lan),
                listen=LISTEN_LAN if lan and listen == LISTEN else listen,
                announce=announce,
                identity=identity,
                span=None if blocks is None else parse_span(blocks),
                num_blocks=num_blocks,
                place=parse_place(
                    placement, rebalance, has_span=blocks is not None, num_blocks=num_blocks
                ),
                dtype=dtype,
                quantize=quantize,
                exact=exact,
                device=device,
                threads=thread_count,
                cache_tokens=cache_tokens,
                has_head=with_head,
                metrics=None if metrics is None else parse_where(metrics),
                drain_s=drain,
                adapters=parse_served(adapter),
                adapter_bytes=parse_size(adapter_memory, "--adapter-memory"),
                weights_bytes_per_s=parse_size(weights_rate, "--weights-rate"),
                bounds=parse_bounds(
                    allow=allow,
                    deny=deny,
                    client_sessions=client_sessions,
                    cache_share=cache_share,
                    address_share=address_share,
                    client_streams=client_streams,
                    client_rate=client_rate,
                    client_rows=client_rows,
                    slowdown=slowdown,
                    queue_memory=queue_memory,
                    log_memory=log_memory,
                    training_memory=training_memory,
                    training_rows=training_rows,
                    idle_timeout=idle_timeout,
                ),
                trace=parse_trace(trace, trace_limit),
            )
            limit_bytes = parse_size(cache_limit, "--cache-limit")
            if weights_from_peers:
                from shoal.cli.peer_weights import find_model
            else:
                opened = open_model(model)
        if weights_from_peers:
            opened = asyncio.run(find_model(model, settings.swarm, limit_bytes))
        asyncio.run(serve_until_stopped(settings, opened))
    except KeyboardInterrupt:
        pass  # before the event loop took the signals over; nothing to clean up yet
    finally:
        signal.signal(signal.SIGTERM, before)
    print("stopped", file=sys.stderr)
