"""Studies: published experiments run again on our own rules and simulator.

A study is a pure function from seeds to a `Report`: rows of figures, each of which says where it
comes from, and checks of what the study expects. Rules are those of `shoal.plan`, runs those of
`sim_slots` and its like; a study only sets the scene. `study_list.py` names them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Final, Literal

from shoal.base.errors import ConfigError
from shoal.lab.study_data import NO_DATA, Data

Origin = Literal["published", "simulated", "measured"]
"""Who says so: the paper; our rules and simulator; our own clock (times of solvers)."""

Given = Literal["rtts", "requests", "map"]
"""Recorded data that a user may give: round trips, requests, a map."""

ORIGINS: Final[tuple[Origin, ...]] = ("published", "simulated", "measured")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number."""

    name: str
    """What it is of, with its unit: `petals, s/token`."""
    value: float
    origin: Origin = "simulated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Figures of one setting."""

    table: str
    """Rows of one table have the same keys."""
    keys: tuple[tuple[str, str], ...]
    """What the setting is: (`requests/s`, `0.5`), ..."""
    figures: tuple[Figure, ...]

    def value(self, name: str, origin: Origin = "simulated") -> float:
        """The figure of that name.

        Raises:
            KeyError: there is none.
        """
        for figure in self.figures:
            if figure.name == name and figure.origin == origin:
                return figure.value
        raise KeyError(f"{name} ({origin})")

    def has(self, **keys: str) -> bool:
        """Whether it is of this setting."""
        own = dict(self.keys)
        return all(own.get(name) == value for name, value in keys.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Something that should come out."""

    name: str
    """What was published or measured before, with its tolerance."""
    found: str
    holds: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A figure to draw: bars of some columns of a table."""

    table: str
    figures: tuple[str, ...]
    label: str
    """Of the axis."""
    is_logarithmic: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came of a study."""

    rows: tuple[Row, ...]
    checks: tuple[Check, ...] = ()
    charts: tuple[Chart, ...] = ()
    notes: tuple[str, ...] = ()
    """What figures depend on, and why ours differ from those published."""

    def tables(self) -> dict[str, list[Row]]:
        """The rows by their table, in order."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.table, []).append(row)
        return found

    def row(self, table: str, **keys: str) -> Row:
        """The first row of a table with these keys.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if row.table == table and row.has(**keys):
                return row
        raise KeyError(f"{table}: {keys}")


Progress = Callable[[str, int, int], None]
"""Told (what is being done, done, total)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """How much of a study to run."""

    seeds: int
    is_quick: bool = False
    """Fewer settings, for a look and for tests."""
    progress: Progress = lambda what, done, total: None
    data: Data = NO_DATA
    """Recorded data that the user has; some studies show more with it."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError("a study needs at least 1 seed")

    def told(self, what: str, steps: Sequence[int] | range) -> Iterator[int]:
        """The steps, one after the other, with progress told before each."""
        for done, step in enumerate(steps):
            self.progress(what, done, len(steps))
            yield step


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A study by name."""

    name: str
    title: str
    source: str
    run: Callable[[Task], Report]
    seeds: int
    """Unless told otherwise,"""
    quick_seeds: int = 1
    """and with --quick."""
    takes: tuple[Given, ...] = ()
    """Recorded data with which it shows more."""


def within(name: str, found: float, expected: float, share: float) -> Check:
    """A check that a figure is what was expected, give or take a share of it."""
    return Check(
        name=f"{name}: {expected:.3g} (+-{share:.0%})",
        found=f"{found:.3g}",
        holds=abs(found - expected) <= share * abs(expected),
    )


def between(name: str, found: float, low: float, high: float) -> Check:
    """A check that a figure lies in a range."""
    return Check(
        name=f"{name}: {low:.3g} to {high:.3g}", found=f"{found:.3g}", holds=low <= found <= high
    )


def falling(name: str, values: Sequence[float], slack: float = 0.0) -> Check:
    """A check that each value is less than the one before, or above it by `slack` at most."""
    return Check(
        name=name,
        found=" > ".join(f"{value:.3g}" for value in values),
        holds=all(after <= before * (1 + slack) for before, after in pairwise(values)),
    )


def mean(values: Sequence[float]) -> float:
    """The mean.

    Raises:
        ConfigError: there are none: no seed gave a case that could be run.
    """
    if not values:
        raise ConfigError("no seed of this study gave a case that can be run; try more seeds")
    return fmean(values)
