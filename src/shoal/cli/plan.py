"""`shoal plan`: who should host which blocks, and what to expect of it."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from shoal.base.errors import ConfigError
from shoal.cli.c_output import c_prints_nothing
from shoal.cli.joining import SwarmChoice
from shoal.cli.logs import progress_bar
from shoal.cli.options import InviteOption, JoinOption, JsonOption, LanOption, SwarmOption

if TYPE_CHECKING:
    from shoal.cli.plan_file import Asked, Cluster
    from shoal.plan.proposal import Proposal

TIME_LIMIT_S: Final = 20.0
"""Enough for 60 servers by every rule."""

ClusterArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[CLUSTER.TOML]",
        show_default=False,
        help="Servers, links, model and workload (see: docs/planning.md, examples/clusters).",
    ),
]
ObjectiveOption = Annotated[
    str | None,
    typer.Option(
        metavar="GOAL",
        help="latency (seconds per token), response (seconds per request), throughput (tokens "
        "per second) or pareto (both ends and what is between); default: the file's, or latency.",
    ),
]
PolicyOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="One rule of placement (see: docs/placement.md), or auto: all of them, the best wins.",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="With --live: the model's hash or its beginning, or a model on this machine, whose "
        "block sizes are then exact.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("plan")(plan)


def plan(
    cluster: ClusterArgument = None,
    objective: ObjectiveOption = None,
    policy: PolicyOption = "auto",
    live: Annotated[
        bool, typer.Option("--live", help="Plan for the swarm as it is now instead of a file.")
    ] = False,
    join: JoinOption = None,
    lan: LanOption = False,
    swarm: SwarmOption = None,
    invite: InviteOption = None,
    model: ModelOption = None,
    tokens_in: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens of a prompt.")
    ] = None,
    tokens_out: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens of an answer.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(metavar="R", min=0.0, help="Requests per second.")
    ] = None,
    sessions: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Sessions at the same time.")
    ] = None,
    commands: Annotated[
        bool, typer.Option("--commands", help="Print the shoal serve lines instead.")
    ] = False,
    draw: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the plan: a .png or .svg file.")
    ] = None,
    as_json: JsonOption = False,
    seed: Annotated[int, typer.Option(metavar="S", min=0, help="Seed of rules that try.")] = 0,
    time_limit: Annotated[
        float, typer.Option(metavar="S", min=0.1, help="About how long to plan, in seconds.")
    ] = TIME_LIMIT_S,
) -> None:
    """Propose who hosts which blocks, and say what to expect.

    Prints the placement, speeds and response times, memory, replicas, how far the plan may be
    from the best possible, what changing to it takes, and whether fewer servers are faster.
    Speeds that the file does not give are estimated from data sheets.

    With --live the servers, their speeds and blocks come from the swarm, and the plan says
    what to change. The same seed gives the same plan unless the time runs out.

    \b
    Examples:
      shoal plan examples/clusters/home.toml
      shoal plan cluster.toml --objective response --rate 0.2 --draw plan.png
      shoal plan cluster.toml --commands > serve.txt
      shoal plan --live --join tcp://PEERID@10.0.0.5:4001
    """
    from shoal.cli.plan_file import Asked

    if live == (cluster is not None):
        raise ConfigError("give either a cluster file or --live (see: shoal plan --help)")
    if commands and as_json:
        raise ConfigError("--commands and --json: give one")
    if draw is not None:
        from shoal.cli.plan_draw import check_picture

        check_picture(draw)
    asked = Asked(
        tokens_in=tokens_in, tokens_out=tokens_out, requests_per_s=rate, sessions=sessions
    )
    if cluster is not None:
        found = _from_file(cluster, asked)
    else:
        found = _from_swarm(SwarmChoice.to_visit(join, swarm, invite, lan), model, asked)
    proposal = _propose(found, objective, policy, seed, time_limit)
    if draw is not None:
        from shoal.cli.plan_draw import draw as draw_plan

        draw_plan(found, proposal, draw)
    _print(found, proposal, is_live=live, as_json=as_json, as_commands=commands)


def _from_file(path: Path, asked: Asked) -> Cluster:
    from shoal.cli.plan_file import read_cluster
    from shoal.cli.plan_reader import read_table

    return read_cluster(read_table(path), asked)


def _from_swarm(choice: SwarmChoice, model: str | None, asked: Asked) -> Cluster:
    from shoal.cli.plan_live import observed
    from shoal.cli.status import look

    return observed(asyncio.run(look(choice)), model, asked)


def _propose(
    cluster: Cluster, objective: str | None, policy: str, seed: int, limit_s: float
) -> Proposal:
    from shoal.plan.proposal import propose
    from shoal.plan.trying import OBJECTIVES, Budget

    wanted = objective or cluster.objective or "latency"
    goal = next((one for one in OBJECTIVES if one == wanted), None)
    if goal is None:
        raise ConfigError(f"--objective {wanted}: choose {', '.join(OBJECTIVES)}")
    budget = Budget(limit_s=limit_s, clock=time.monotonic, started_s=time.monotonic())
    with c_prints_nothing(), progress_bar() as progress:
        return propose(
            cluster.problem,
            goal,
            seed=seed,
            policy=policy,
            present=cluster.present,
            load_bytes_per_s=cluster.load_bytes_per_s,
            budget=budget,
            progress=progress,
        )


def _print(
    cluster: Cluster, proposal: Proposal, *, is_live: bool, as_json: bool, as_commands: bool
) -> None:
    if as_json:
        from shoal.cli.plan_report import as_dict

        print(json.dumps(as_dict(cluster, proposal)), flush=True)
    elif as_commands:
        from shoal.cli.plan_commands import command_lines, move_lines

        lines = (
            move_lines(cluster, proposal)
            if is_live
            else command_lines(cluster, proposal.best.placement)
        )
        print("\n".join(lines), flush=True)
        if not lines:
            print("nothing to move", file=sys.stderr)
    else:
        from shoal.cli.plan_show import show

        show(cluster, proposal)
