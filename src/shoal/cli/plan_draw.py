"""A placement as a picture: servers over blocks, chains through them, replicas below."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shoal.base.errors import ConfigError
from shoal.cli.plan_file import Cluster
from shoal.plan.advice import rate_text, seconds_text
from shoal.plan.proposal import Proposal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS: Final = (".png", ".svg")
CHAINS_DRAWN: Final = 4
"""More lines than this hide each other."""

BUSY: Final = "#4c78a8"
IDLE: Final = "#c6d5e6"
LINES: Final = ("#e45756", "#54a24b", "#b279a2", "#f58518")


def check_picture(path: Path) -> None:
    """See that a picture could be drawn before anything is planned.

    Raises:
        ConfigError: another kind of file, no such folder, or matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--draw {path}: name a file that ends in {' or '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--draw {path}: there is no folder {path.parent}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError("--draw needs matplotlib: pip install 'shoal[draw]'") from error


def draw(cluster: Cluster, proposal: Proposal, path: Path) -> None:
    """Draw a proposal to `path`.

    Raises:
        ConfigError: it can't be written there.
    """
    from matplotlib.figure import Figure

    servers = len(cluster.problem.servers)
    figure = Figure(figsize=(10, 2.2 + 0.32 * servers), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[max(2, servers), 1.5])
    _draw_servers(above, cluster, proposal)
    _draw_chains(above, proposal)
    _draw_replicas(below, proposal)
    outlook = proposal.best.outlook
    figure.suptitle(
        f"{proposal.best.policy}: {seconds_text(outlook.step_s)} per token, "
        f"{rate_text(outlook.rows_per_s)} tokens/s with full caches"
    )
    # No date and fixed ids: the same plan gives the same bytes.
    options: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
    try:
        figure.savefig(path, dpi=120, **options)
    except OSError as error:
        raise ConfigError(f"--draw {path}: {error}") from error


def _draw_servers(axes: Axes, cluster: Cluster, proposal: Proposal) -> None:
    names = []
    for row, use in enumerate(proposal.best.outlook.servers):
        names.append(cluster.problem.servers[row].name)
        if use.span is None:
            continue
        color = BUSY if use.sessions else IDLE
        axes.barh(row, len(use.span), left=use.span.start, height=0.7, color=color)
        taken = (use.weight_bytes + use.session_bytes) / use.memory_bytes
        middle = (use.span.start + use.span.end) / 2
        axes.text(middle, row, f"{use.span}  {taken:.0%} of memory", ha="center", va="center",
                  fontsize=8, color="white" if use.sessions else "black")  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, cluster.problem.num_blocks)


def _draw_chains(axes: Axes, proposal: Proposal) -> None:
    chains = proposal.best.outlook.chains[:CHAINS_DRAWN]
    for number, one in enumerate(chains):
        blocks, rows = [], []
        for hop in one.chain:
            blocks += [hop.span.start, hop.span.end]
            rows += [hop.server - 0.42 + 0.06 * number] * 2
        label = f"{one.seats} x {seconds_text(one.seconds)}"
        axes.plot(blocks, rows, color=LINES[number], linewidth=2, label=label)
    if chains:
        axes.legend(title="sessions x time per token", fontsize=8, loc="best")


def _draw_replicas(axes: Axes, proposal: Proposal) -> None:
    from matplotlib.ticker import MaxNLocator

    counts = proposal.best.outlook.replicas
    axes.bar([block + 0.5 for block in range(len(counts))], counts, width=1.0, color=IDLE)
    axes.set_ylabel("replicas")
    axes.set_xlabel("block")
    axes.set_ylim(0, max(counts) + 0.5)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
