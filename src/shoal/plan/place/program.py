"""Linear and integer programs, written row by row and solved by HiGHS through scipy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from shoal.base.errors import ConfigError

VARIABLES_MAX = 400_000
"""More than this does not come to an end on a desktop, or even into its memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """What the solver found."""

    values: tuple[float, ...]
    """Of all variables; empty when it found nothing."""
    objective: float
    """Infinite when it found nothing."""
    bound: float
    """No solution has a smaller objective; infinite when there is none at all."""

    @property
    def gap(self) -> float:
        """How far the objective may be above the optimum, as a share of it."""
        if not self.values:
            return math.inf
        return max(0.0, self.objective - self.bound) / max(abs(self.objective), 1e-12)


class Program:
    """Minimise a sum over variables, subject to rows."""

    def __init__(self) -> None:
        self._costs: list[float] = []
        self._highs: list[float] = []
        self._integer: list[int] = []
        self._data: list[float] = []
        self._columns: list[int] = []
        self._starts = [0]
        self._row_lows: list[float] = []
        self._row_highs: list[float] = []

    @property
    def num_variables(self) -> int:
        """So far."""
        return len(self._costs)

    def variable(self, *, cost: float = 0.0, high: float = math.inf, integer: bool = False) -> int:
        """A new variable from 0 to `high`; its index."""
        if len(self._costs) >= VARIABLES_MAX:
            raise ConfigError(
                f"a program of over {VARIABLES_MAX} variables is too large to solve "
                "(plan with another rule, or in units of several blocks)"
            )
        self._costs.append(cost)
        self._highs.append(high)
        self._integer.append(int(integer))
        return len(self._costs) - 1

    def row(
        self, terms: Mapping[int, float], *, low: float = -math.inf, high: float = math.inf
    ) -> None:
        """`low <= sum of terms <= high`; terms by variable."""
        self._columns += terms.keys()
        self._data += terms.values()
        self._starts.append(len(self._columns))
        self._row_lows.append(low)
        self._row_highs.append(high)

    def solve(
        self, *, limit_s: float | None = None, gap: float = 1e-6, branches_max: int | None = None
    ) -> Solution:
        """The best solution, or the best within `limit_s` seconds of the machine's clock.

        Or within `branches_max` branches of the search tree: where that ends it, the same comes
        out on a busy machine as on an idle one.
        """
        if not self._costs:
            holds = all(
                low <= 0 <= high for low, high in zip(self._row_lows, self._row_highs, strict=True)
            )
            least = 0.0 if holds else math.inf
            return Solution(values=(), objective=least, bound=least)
        options: dict[str, float] = {"mip_rel_gap": gap}
        if limit_s is not None:
            options["time_limit"] = limit_s
        if branches_max is not None:
            options["node_limit"] = branches_max
        matrix = csr_array(
            (self._data, self._columns, self._starts),
            shape=(len(self._row_lows), len(self._costs)),
        )
        result = milp(
            np.array(self._costs),
            integrality=np.array(self._integer),
            bounds=Bounds(0.0, np.array(self._highs)),
            constraints=LinearConstraint(matrix, self._row_lows, self._row_highs),
            options=options,
        )
        if result.x is None:
            bound = math.inf if result.status == 2 else -math.inf
            return Solution(values=(), objective=math.inf, bound=bound)
        bound = result.get("mip_dual_bound")
        return Solution(
            values=tuple(float(value) for value in result.x),
            objective=float(result.fun),
            bound=float(result.fun if bound is None else bound),
        )
