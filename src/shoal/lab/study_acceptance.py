"""The 13 figures that Shoal's rules and simulator are held to, and which studies show them.

Tolerances are those of the studies' checks. A figure holds when all its checks do; in quick runs
some checks are wider, or fewer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shoal.lab.study import Check, Report


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

    def checks(self, report: Report) -> list[Check]:
        """Those of a report that are this figure's."""
        return [one for one in report.checks if any(word in one.name for word in self.words)]


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
    held: int
    of: int

    @property
    def word(self) -> str:
        """For people."""
        if not self.of:
            return "not run"
        return "holds" if self.held == self.of else "DIFFERS"


def judged(reports: Mapping[str, Report]) -> list[Verdict]:
    """The verdicts on all figures, from the reports by study that there are."""
    verdicts = []
    for figure in ACCEPTANCE:
        report = reports.get(figure.study)
        checks = figure.checks(report) if report is not None else []
        held = sum(one.holds for one in checks)
        verdicts.append(Verdict(figure=figure, held=held, of=len(checks)))
    return verdicts


def acceptance_markdown(verdicts: Sequence[Verdict]) -> str:
    """A table for people."""
    lines = ["| # | figure | shown by | checks that hold | |", "|---|---|---|---|---|"]
    for one in verdicts:
        shown = "; ".join(filter(None, (one.figure.study, one.figure.elsewhere)))
        share = f"{one.held} of {one.of}" if one.of else ""
        lines.append(
            f"| {one.figure.number} | {one.figure.title} | {shown} | {share} | {one.word} |"
        )
    return "\n".join(lines)


def acceptance_content(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The same as a JSON object."""
    return {
        "figures": [
            {
                "number": one.figure.number,
                "title": one.figure.title,
                "study": one.figure.study,
                "elsewhere": one.figure.elsewhere,
                "held": one.held,
                "of": one.of,
                "verdict": one.word,
            }
            for one in verdicts
        ]
    }
