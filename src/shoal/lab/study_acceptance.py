"""The 13 figures that Shoal's rules and simulator are held to, and which studies show them.

Tolerances are those of the studies' checks. A figure holds when all its checks do; in quick runs
some checks are wider, or fewer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shoal.lab.study import Check
from shoal.lab.study_kept import Kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What must come out."""

    number: int
    title: str
    study: str
    """That shows it; empty: none does."""
    words: tuple[str, ...] = ("",)
    """Its checks have one of these in their names."""
    elsewhere: str = ""
    """What shows it instead, or the part that no study shows."""

    def checks(self, checks: Sequence[Check]) -> list[Check]:
        """Those of its study that are this figure's."""
        return [one for one in checks if any(word in one.name for word in self.words)]


ACCEPTANCE: Final = (
    Figure(
        number=1,
        title="BPRR's simulator with its constants: 3 % for the proposal, 6 % for Petals",
        study="bprr-scattered",
        words=("with constants",),
    ),
    Figure(
        number=2,
        title="the same without: 22 to 31 % (26 servers), 44 to 80 % (9)",
        study="bprr-scattered",
        words=("reduction without constants",),
        elsewhere="GTS-CE has no map that may be given away",
    ),
    Figure(
        number=3,
        title="ablation: Petals, its parts, the proposal",
        study="bprr-ablation",
        words=("AboveNet, 9 servers",),
    ),
    Figure(
        number=4, title="Theorem 2 is never broken", study="bprr-ablation", words=("Theorem 2",)
    ),
    Figure(
        number=5,
        title="both programs agree; annealing is near them, and never behind CG-BP",
        study="exactness",
        words=("program", "annealing is never worse"),
    ),
    Figure(
        number=6,
        title="CG-BP's bad example",
        study="exactness",
        words=("the bad example",),
    ),
    Figure(number=7, title="composed chains: who beats whom, Theorem 4", study="chains"),
    Figure(number=8, title="a dispatcher beats placement under load, 4 times", study="dispatch"),
    Figure(number=9, title="what back-off costs", study="backoff"),
    Figure(number=10, title="churn: 1.1 to 1.2; placed once 1.15 to 1.25", study="churn"),
    Figure(number=11, title="Helix: Petals 0.84 and 0.68 of the best", study="helix"),
    Figure(number=12, title="the gain when assumptions go", study="realism"),
    Figure(
        number=13,
        title="predicted and measured on real processes: 10 % apart",
        study="",
        elsewhere="benchmarks/calibration.py",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What came of a figure."""

    figure: Figure
    differing: tuple[Check, ...] = ()
    of: int = 0
    """Checks that there were."""
    kept: Kept | None = None
    """The run that shows it; None: none does."""

    @property
    def held(self) -> int:
        """Checks that hold."""
        return self.of - len(self.differing)

    @property
    def word(self) -> str:
        """For people."""
        if not self.figure.study:
            return "not here"
        if not self.of:
            return "not run"
        return "DIFFERS" if self.differing else "holds"

    @property
    def run(self) -> str:
        """Which run shows it, for people."""
        if self.kept is None:
            return ""
        made = self.kept.made
        count = f"{self.kept.seeds} seed{'s' if self.kept.seeds > 1 else ''}"
        words = (made.commit, made.date, count, "quick" if self.kept.is_quick else "")
        return ", ".join(filter(None, words))


def judged(runs: Mapping[str, Kept]) -> list[Verdict]:
    """The verdicts on all figures, from the runs by study that there are."""
    verdicts = []
    for figure in ACCEPTANCE:
        kept = runs.get(figure.study)
        checks = figure.checks(kept.checks) if kept is not None else []
        differing = tuple(one for one in checks if not one.holds)
        verdicts.append(Verdict(figure=figure, differing=differing, of=len(checks), kept=kept))
    return verdicts


def acceptance_markdown(verdicts: Sequence[Verdict]) -> str:
    """A table for people, and below it what differs."""
    lines = [
        "| # | figure | shown by | run | checks that hold | |",
        "|---|---|---|---|---|---|",
    ]
    for one in verdicts:
        shown = "; ".join(filter(None, (one.figure.study, one.figure.elsewhere)))
        share = f"{one.held} of {one.of}" if one.of else ""
        lines.append(
            f"| {one.figure.number} | {one.figure.title} | {shown} | {one.run} | {share} "
            f"| {one.word} |"
        )
    differing = [
        f"* {one.figure.number} DIFFERS: {check.name}; found {check.found}"
        for one in verdicts
        for check in one.differing
    ]
    return "\n".join([*lines, *(["", *differing] if differing else [])])


def acceptance_content(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The same as a JSON object."""
    return {"figures": [_content(one) for one in verdicts]}


def _content(verdict: Verdict) -> dict[str, Any]:
    figure, kept = verdict.figure, verdict.kept
    run = None
    if kept is not None:
        run = {
            "date": kept.made.date,
            "commit": kept.made.commit,
            "seeds": kept.seeds,
            "quick": kept.is_quick,
        }
    return {
        "number": figure.number,
        "title": figure.title,
        "study": figure.study,
        "elsewhere": figure.elsewhere,
        "run": run,
        "held": verdict.held,
        "of": verdict.of,
        "verdict": verdict.word,
        "differing": [
            {"expected": check.name, "found": check.found} for check in verdict.differing
        ],
    }
