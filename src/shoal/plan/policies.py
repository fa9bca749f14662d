"""All rules of placement and routing by name, for planner, simulator and tests.

The exact rules and the one for throughput need scipy: they are loaded when they are asked
for, with an error that says what to install.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Final, TypeVar, cast

from shoal.base.errors import ConfigError
from shoal.plan.place.anneal import place_anneal
from shoal.plan.place.cgbp import place_cgbp, place_cgbp_sweep
from shoal.plan.place.gbpcr import place_gbpcr
from shoal.plan.place.latency import place_latency
from shoal.plan.place.petals import place_petals, place_petals_joins
from shoal.plan.place.waterfill import place_waterfill
from shoal.plan.place.whole import place_whole
from shoal.plan.placement import Placer
from shoal.plan.route.blind import route_petals, route_shortest
from shoal.plan.route.contract import RouterMaker
from shoal.plan.route.dispatch import route_dispatch
from shoal.plan.route.wsrr import route_wsrr, route_wsrr_max

Rule = TypeVar("Rule")

PLACERS: Final[dict[str, Placer]] = {
    "petals": place_petals,
    "petals-joins": place_petals_joins,
    "cgbp": place_cgbp,
    "cgbp-sweep": place_cgbp_sweep,
    "gbpcr": place_gbpcr,
    "whole": place_whole,
    "waterfill": place_waterfill,
    "latency": place_latency,
    "anneal": place_anneal,
}

SOLVED_PLACERS: Final = {"milp": "place_milp", "flow": "place_flow"}
"""Those that need a solver: module and function."""

ROUTERS: Final[dict[str, RouterMaker]] = {
    "petals": route_petals,
    "shortest": route_shortest,
    "wsrr": route_wsrr,
    "wsrr-max": route_wsrr_max,
    "gca-jffc": route_dispatch,
}


def placer(name: str) -> Placer:
    """The rule of placement called `name`.

    Raises:
        ConfigError: there is none, or its solver is not installed.
    """
    if name in SOLVED_PLACERS:
        module = solving(f"shoal.plan.place.{name}", f"the rule {name!r} needs")
        return cast(Placer, getattr(module, SOLVED_PLACERS[name]))
    return _named(PLACERS, name, "placement", [*PLACERS, *SOLVED_PLACERS])


def solving(module: str, what: str) -> ModuleType:
    """A module of ours that needs scipy; `what` (a subject and "needs") is for the error.

    Raises:
        ConfigError: scipy is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("shoal"):
            raise
        raise ConfigError(f"{what} a solver: pip install 'shoal[plan]'") from error


def router(name: str) -> RouterMaker:
    """The rule of routing called `name`.

    Raises:
        ConfigError: there is none.
    """
    return _named(ROUTERS, name, "routing", list(ROUTERS))


def _named(rules: Mapping[str, Rule], name: str, kind: str, names: list[str]) -> Rule:
    if name not in rules:
        raise ConfigError(f"no rule of {kind} is called {name!r} (choose {', '.join(names)})")
    return rules[name]
