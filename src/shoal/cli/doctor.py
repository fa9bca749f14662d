"""`shoal doctor`: what works here, what does not, and what to do about it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from shoal.cli.findings import Finding
from shoal.cli.joining import SwarmChoice
from shoal.cli.options import InviteOption, JsonOption, LanOption, SwarmOption
from shoal.cli.threads import set_threads

OptionalModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="A model to look at too: a directory, a .gguf file, a known name or a hub id (then "
        "only its config and tokenizer are fetched).",
    ),
]
JoinsOption = Annotated[
    list[str] | None,
    typer.Option(metavar="ADDR", help="A server to reach, and its swarm; repeat for more."),
]
ListenOption = Annotated[
    str,
    typer.Option(metavar="tcp://HOST:PORT", help="Where a server of yours would listen."),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor)


def doctor(
    model: OptionalModelArgument = None,
    join: JoinsOption = None,
    lan: LanOption = False,
    listen: ListenOption = "tcp://127.0.0.1:0",
    swarm: SwarmOption = None,
    invite: InviteOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check this machine, a model and the way to a swarm; each problem comes with its fix.

    Looks at packages, device, threads, memory, disk, the limit of open files, the clock and
    the port; with MODEL at how it can be served here; with --join or --lan at the servers.
    Nothing is changed. The exit code is 1 if something failed; warnings don't count.

    With --json the last line is an object: findings (each with name, level ok, warn or fail,
    text, fix) and ok (whether nothing failed).

    \b
    Examples:
      shoal doctor
      shoal doctor smollm2-135m-instruct --join tcp://PEERID@10.0.0.5:4001
      shoal doctor --listen tcp://0.0.0.0:4001 --json
    """
    choice = SwarmChoice.parse(join, swarm, invite, lan)
    omp = os.environ.get("OMP_NUM_THREADS")
    set_threads(None)
    from shoal.cli.examining import (
        examine_machine,
        examine_model,
        examine_port,
        examine_swarm,
    )

    findings = examine_machine(omp)
    findings.append(asyncio.run(examine_port(listen)))
    if model is not None:
        findings += examine_model(model)
    if choice.joins or choice.is_lan:
        findings += asyncio.run(examine_swarm(choice))
    is_ok = all(finding.level != "fail" for finding in findings)
    if as_json:
        print(json.dumps({"findings": [asdict(one) for one in findings], "ok": is_ok}), flush=True)
    else:
        _print(findings)
    if not is_ok:
        raise typer.Exit(1)


def _print(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 1000, soft_wrap=True)
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        level = Text(f"{finding.level:<5}", style=styles[finding.level])
        console.print(level + Text(f" {finding.name:<{width}}  {finding.text}"))
        if finding.fix:
            console.print(Text(f"{'':5} {'':<{width}}  fix: {finding.fix}"))
    counts = Counter(finding.level for finding in findings)
    console.print(f"{counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failures")
