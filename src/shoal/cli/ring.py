"""`shoal ring`: one model over small machines on one network, each with a part of it."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from shoal.base.errors import ConfigError
from shoal.cli import ring_run
from shoal.cli.interrupts import noticing_interrupts
from shoal.cli.joining import SwarmChoice
from shoal.cli.options import CacheLimitOption, InviteOption, JsonOption
from shoal.cli.ring_config import AUTO, RingConfig, parse_split, read_config
from shoal.cli.ring_file import RingOption, find_ring, ring_path
from shoal.cli.ring_memory import give_back_early
from shoal.cli.sizes import parse_size
from shoal.cli.threads import set_threads

CACHE_TOKENS = 4096
WEIGHTS_RATE = "100MiB"
JOIN_PATIENCE_S = 600.0
DRAIN_S = 30.0
"""As `shoal serve`: long enough to fetch and load some blocks, and to replay some samples."""

MemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="What this process may take in all (default: what is free, or as its limits allow).",
    ),
]
OneThreadOption = Annotated[
    int | None, typer.Option(metavar="N", help="Compute threads (default: 1).")
]
ListenNearOption = Annotated[
    str | None,
    typer.Option(
        metavar="tcp://HOST:PORT",
        help="Where to listen (default: this machine's address in its network).",
    ),
]
AnnounceNearOption = Annotated[
    str | None,
    typer.Option(
        metavar="tcp://HOST:PORT",
        help="Address to tell others if it is not the one listened on; port 0 means the same port.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(
        help="One model over small machines on one network.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    group.callback()(_group)
    group.command("up")(up)
    group.command("join")(join)
    group.command("status")(status)
    ring_run.register(group)
    app.add_typer(group, name="ring")


def _group() -> None:
    """One model over small machines on one network: each holds a part of the blocks.

    \b
    On the machine with the model (the starter):
      shoal ring up --model smollm2-135m-instruct --nodes 2
    On each other one, with the line that it prints:
      shoal ring join --starter tcp://PEERID@10.0.0.5:4270 --invite shoal-invite-1-...
    On the starter, when the ring is up:
      shoal ring run --prompt "The sea is" --samples 4
    """


def up(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RING.TOML]",
            help="A file with these options as keys (cache_tokens = 8192), or a nodes JSON of "
            "MDI-LLM; options given here come before it.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="As for shoal serve: a directory, a file, a name."),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Machines to wait for, this one not counted."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Blocks by node in the order of joining; one number more than nodes: the first "
            "is the starter's. Default: by measured speed and free memory.",
        ),
    ] = None,
    starter_blocks: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="First blocks that this machine keeps itself (default: 0); auto: its share.",
        ),
    ] = None,
    lan: Annotated[
        bool, typer.Option("--lan", help="Let nodes find this starter by multicast DNS.")
    ] = False,
    listen: ListenNearOption = None,
    announce: AnnounceNearOption = None,
    swarm: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Let anybody in who knows this name, instead of those with the invite.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 (default), bfloat16 or float16.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(metavar="KIND", help="Smaller weights at nodes: int8 or int4.")
    ] = None,
    exact: Annotated[
        str | None, typer.Option(metavar="WHEN", help="As for shoal serve: auto, always, never.")
    ] = None,
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"Positions that each node keeps, over all samples (default: {CACHE_TOKENS}).",
        ),
    ] = None,
    weights_rate: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help=f"Bytes per second at which weights go out (default: {WEIGHTS_RATE}).",
        ),
    ] = None,
    auto_resplit: Annotated[
        bool,
        typer.Option(
            "--auto-resplit", help="Change the split when a node has become slower than planned."
        ),
    ] = False,
    threads: OneThreadOption = None,
    memory: MemoryOption = None,
    ring: RingOption = None,
) -> None:
    """Bring a ring up and keep it up: the starter.

    It waits for nodes, gives each its part of the blocks and exactly their weights, and prints
    a line when all are served. A node that dies is replaced by one that joined besides, or its
    blocks are taken over by the others; answers that run go on with the same text. Prompts and
    texts stay on this machine: nodes see hidden states only (from which prompts can be guessed).

    Ctrl-C ends the ring; its nodes give their blocks up and wait for the next one.

    \b
    Examples:
      shoal ring up --model smollm2-135m-instruct --nodes 2
      shoal ring up --model ./my-model --nodes 3 --starter-blocks auto --quantize int8
      shoal ring up --model ./my-model --nodes 2 --split 10,12 --lan
      shoal ring up ring.toml
    """
    given = RingConfig(
        model=model,
        nodes=nodes,
        split=None if split is None else parse_split(split),
        starter_blocks=starter_blocks,
        listen=listen,
        announce=announce,
        lan=lan or None,
        swarm=swarm,
        dtype=dtype,
        quantize=quantize,
        exact=exact,
        cache_tokens=cache_tokens,
        weights_rate=weights_rate,
        auto_resplit=auto_resplit or None,
        threads=threads,
        memory=memory,
    )
    said = given if config is None else given.over(read_config(config))
    _stopped_by_signals(lambda: _up(said, ring))


def _up(said: RingConfig, ring: Path | None) -> Coroutine[Any, Any, None]:
    if said.model is None:
        raise ConfigError("no model named: give --model MODEL, or model = in ring.toml")
    if said.nodes is None:
        raise ConfigError("how many machines will join? give --nodes N, or nodes = in ring.toml")
    starter_blocks = _starter_blocks(said.starter_blocks or "0")
    if not said.nodes and starter_blocks == 0:
        raise ConfigError("a ring of 0 nodes: add --starter-blocks auto, or nodes")
    thread_count = set_threads(said.threads or 1)
    give_back_early()
    from shoal.cli.models import open_model
    from shoal.cli.ring_host import HostSettings
    from shoal.cli.ring_up import UpSettings, keep_up
    from shoal.model.quantize import quantization
    from shoal.model.rows import torch_dtype
    from shoal.server.ring_keeper import RingWish

    torch_dtype(said.dtype or "float32")
    quantization(said.quantize or "none")
    settings = UpSettings(
        wish=RingWish(
            num_nodes=said.nodes,
            split=said.split or (),
            starter_blocks=starter_blocks,
            is_resplitting=bool(said.auto_resplit),
        ),
        listen=said.listen,
        announce=said.announce,
        is_lan=bool(said.lan),
        swarm=said.swarm,
        dtype=said.dtype or "float32",
        quantize=said.quantize or "none",
        exact=said.exact or "auto",
        cache_tokens=said.cache_tokens or CACHE_TOKENS,
        weights_bytes_per_s=parse_size(said.weights_rate or WEIGHTS_RATE, "--weights-rate"),
        host=HostSettings(threads=thread_count, memory_bytes=_memory(said.memory)),
        ring_path=ring_path(ring),
    )
    return keep_up(settings, open_model(said.model))


def join(
    starter: Annotated[
        list[str] | None,
        typer.Option(metavar="ADDR", help="The starter's address, as shoal ring up prints it."),
    ] = None,
    lan: Annotated[bool, typer.Option("--lan", help="Find the starter by multicast DNS.")] = False,
    invite: InviteOption = None,
    swarm: Annotated[
        str | None, typer.Option(metavar="NAME", help="The name that shoal ring up was given.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What it is called (default: host name).")
    ] = None,
    listen: ListenNearOption = None,
    announce: AnnounceNearOption = None,
    threads: OneThreadOption = None,
    memory: MemoryOption = None,
    cache_limit: CacheLimitOption = "50GB",
    patience: Annotated[
        float, typer.Option(metavar="S", min=0, help="Seconds to look for the starter.")
    ] = JOIN_PATIENCE_S,
    once: Annotated[
        bool, typer.Option("--once", help="Leave when the ring ends; default: wait for the next.")
    ] = False,
    drain: Annotated[
        float,
        typer.Option(
            metavar="S",
            min=0,
            help="Seconds for others to take its blocks and samples when it is told to stop; "
            "0: stop at once, and samples are repaired.",
        ),
    ] = DRAIN_S,
) -> None:
    """Offer this machine to a ring: a node.

    It needs no copy of the model and no file: it measures how fast one block runs here and how
    much memory is free, is told its blocks, fetches their weights from the starter (each tensor
    checked against its hash; what was fetched before stays on the disk), and serves them.
    Ctrl-C or SIGTERM stops it: if samples run here, others take its blocks first, and samples go
    on there without a pause; again: at once.

    \b
    Examples:
      shoal ring join --starter tcp://PEERID@10.0.0.5:4270 --invite shoal-invite-1-...
      shoal ring join --lan --invite shoal-invite-1-... --memory 700MB
    """
    stop = asyncio.Event()
    _stopped_by_signals(
        lambda: _join(
            SwarmChoice.parse(starter, swarm, invite, lan), name, listen, announce, threads,
            memory, cache_limit, patience, once, drain, stop,
        ),
        stop,
    )  # fmt: skip


def _join(
    choice: SwarmChoice,
    name: str | None,
    listen: str | None,
    announce: str | None,
    threads: int | None,
    memory: str | None,
    cache_limit: str,
    patience_s: float,
    is_once: bool,
    drain_s: float,
    stop: asyncio.Event,
) -> Coroutine[Any, Any, None]:
    if not choice.joins and not choice.is_lan:
        raise ConfigError("no starter named: give --starter ADDR, as shoal ring up prints it")
    if choice.name is None and choice.invite is None:
        raise ConfigError("add --invite TEXT, as shoal ring up prints it: rings are private")
    thread_count = set_threads(threads or 1)
    give_back_early()
    from shoal.cli.ring_host import HostSettings
    from shoal.cli.ring_join import JoinSettings, join_until_over

    return join_until_over(
        JoinSettings(
            swarm=choice,
            name=name,
            listen=listen,
            announce=announce,
            host=HostSettings(threads=thread_count, memory_bytes=_memory(memory)),
            cache_limit_bytes=parse_size(cache_limit, "--cache-limit"),
            patience_s=patience_s,
            is_once=is_once,
            drain_s=drain_s,
        ),
        stop,
    )


def status(ring: RingOption = None, as_json: JsonOption = False) -> None:
    """Show the ring that is up on this machine: nodes, blocks, memory, speed.

    Busy is the share of time since a node serves in which its engine worked.

    \b
    Examples:
      shoal ring status
      shoal ring status --json
    """
    from shoal.cli.ring_show import show

    show(find_ring(ring), as_json=as_json)


def _stopped_by_signals(
    make: Callable[[], Coroutine[Any, Any, None]], stop: asyncio.Event | None = None
) -> None:
    """Run what `make` makes until it ends, or until Ctrl-C or SIGTERM; a second one is at once.

    The first one sets `stop`, if there is one, and the work ends itself.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with noticing_interrupts(signal.SIGINT, signal.SIGTERM):
            work = make()
        asyncio.run(_until_stopped(work, stop))
    except KeyboardInterrupt:
        pass  # before the event loop took the signals over
    finally:
        signal.signal(signal.SIGTERM, before)
    print("stopped", file=sys.stderr)


async def _until_stopped(work: Coroutine[Any, Any, None], stop: asyncio.Event | None) -> None:
    loop = asyncio.get_running_loop()
    task = loop.create_task(work, name="ring")

    def end() -> None:
        if stop is None or stop.is_set():
            task.cancel()
        else:
            stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    try:
        await task
    except asyncio.CancelledError:
        pass  # how a ring, or a membership, ends
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _starter_blocks(text: str) -> int | None:
    if text == AUTO:
        return None
    if not text.isdigit():
        raise ConfigError(f"--starter-blocks {text!r}: a number of blocks, or {AUTO}")
    return int(text)


def _memory(text: str | None) -> int | None:
    return None if text is None else parse_size(text, "--memory")
