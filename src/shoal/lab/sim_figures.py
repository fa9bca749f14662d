"""Pictures of simulated scenarios: who waits how long, how full servers are, who hosts what.

matplotlib draws; it is loaded when it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shoal.base.errors import ConfigError
from shoal.lab.sim_result import FIDELITIES, Fidelity, Result, names_of
from shoal.plan.placement import Placement
from shoal.plan.spec import Problem

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS: Final[dict[Fidelity, str]] = {"a": "#7f8c8d", "b": "#2471a3", "c": "#ca6f1e"}
BAR: Final = "#2471a3"
DPI: Final = 120
NAMES_MAX: Final = 40
"""More servers are drawn without their names."""

Results = Mapping[Fidelity, Sequence[Result]]
"""By fidelity: a run per seed."""


def draw_scenario(folder: Path, problem: Problem, results: Results) -> list[Path]:
    """All figures of a scenario as PNG files in `folder`; returns them.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    paths = [draw_responses(folder / "responses.png", results)]
    first = next(iter(results.values()))[0]
    paths.append(draw_placement(folder / "placement.png", problem, first))
    sampled = {fidelity: runs for fidelity, runs in results.items() if runs[0].samples}
    if sampled:
        paths.append(draw_occupancy(folder / "occupancy.png", problem, sampled))
    return paths


def draw_responses(path: Path, results: Results) -> Path:
    """The share of requests answered within so many seconds, over all seeds."""
    figure = _figure(7, 4)
    axes = figure.add_subplot()
    for fidelity, runs in results.items():
        seconds = sorted(one.response_s for run in runs for one in run.ended)
        total = sum(len(run.served) for run in runs)
        shares = [(index + 1) / total for index in range(len(seconds))]
        axes.step(seconds, shares, where="post", color=COLOURS[fidelity], label=_label(fidelity))
    axes.set_xlabel("response time, s")
    axes.set_ylabel("share of requests")
    axes.set_ylim(0, 1.02)
    axes.set_xlim(left=0)
    axes.legend(loc="lower right")
    return _saved(figure, path)


def draw_occupancy(path: Path, problem: Problem, results: Results) -> Path:
    """The first seed's sessions over time, and how full each server's memory is."""
    count = len(results)
    figure = _figure(9, 4.5 * count)
    for index, (fidelity, runs) in enumerate(results.items()):
        samples = runs[0].samples
        times = [sample.at_s for sample in samples]
        above = figure.add_subplot(2 * count, 1, 2 * index + 1)
        colour = COLOURS[fidelity]
        running = [sample.running for sample in samples]
        above.step(times, running, where="post", color=colour, label="running")
        waiting = [sample.waiting for sample in samples]
        above.step(times, waiting, where="post", color="#c0392b", label="waiting")
        above.set_title(_label(fidelity), fontsize=9)
        above.set_ylabel("sessions")
        above.legend(loc="upper right")
        below = figure.add_subplot(2 * count, 1, 2 * index + 2, sharex=above)
        edges = [*times, times[-1] + 1e-9]
        rows = [[sample.used[server] for sample in samples] for server in _indices(problem)]
        below.pcolormesh(
            edges, range(len(rows) + 1), rows, vmin=0, vmax=1, cmap="Blues", rasterized=True
        )
        _name_servers(below, problem, centre=0.5)
        below.invert_yaxis()
        below.set_xlabel("s")
    return _saved(figure, path)


def draw_placement(path: Path, problem: Problem, result: Result) -> Path:
    """Who hosts which blocks: at the start, and at the end where that differs."""
    first = result.history[0][1] if result.history else result.placement
    panels = [("at the start", first)]
    if result.placement.spans != first.spans:
        panels.append(("at the end", result.placement))
    figure = _figure(6 * len(panels), max(2.5, 0.28 * len(problem.servers) + 1.2))
    for index, (title, placement) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        _draw_spans(axes, problem, placement)
        axes.set_title(title, fontsize=9)
    return _saved(figure, path)


def _draw_spans(axes: Axes, problem: Problem, placement: Placement) -> None:
    for server, span in placement.hosted():
        axes.barh(server, len(span), left=span.start, height=0.8, color=BAR, edgecolor="white")
    axes.set_xlim(0, problem.num_blocks)
    axes.set_ylim(len(problem.servers) - 0.5, -0.5)
    axes.set_xlabel("block")
    _name_servers(axes, problem, centre=0.0)


def _name_servers(axes: Axes, problem: Problem, *, centre: float) -> None:
    names = names_of(problem)
    if len(names) <= NAMES_MAX:
        axes.set_yticks([server + centre for server in _indices(problem)], names, fontsize=7)
    else:
        axes.set_ylabel("server")


def _indices(problem: Problem) -> range:
    return range(len(problem.servers))


def _label(fidelity: Fidelity) -> str:
    return f"{fidelity}, {FIDELITIES[fidelity]}"


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError("figures need matplotlib: pip install 'shoal[draw]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _saved(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=DPI)
    return path
