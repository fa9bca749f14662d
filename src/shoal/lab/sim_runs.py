"""Scenarios at a fidelity by name, one after the other or in several processes."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Final

from shoal.base.errors import ConfigError
from shoal.lab.campaign import quiet
from shoal.lab.sim_analytic import simulate_analytic
from shoal.lab.sim_live import Progress, simulate_live
from shoal.lab.sim_result import FIDELITIES, Fidelity, Result
from shoal.lab.sim_scenario import Scenario
from shoal.lab.sim_slots import simulate_slots

SIMULATIONS: Final[dict[Fidelity, Callable[[Scenario], Result]]] = {
    "a": simulate_analytic,
    "b": simulate_slots,
    "c": simulate_live,
}


def fidelity_of(word: str) -> Fidelity:
    """The fidelity of that name.

    Raises:
        ConfigError: there is none.
    """
    found = next((name for name in FIDELITIES if name == word), None)
    if found is None:
        raise ConfigError(f"no fidelity is called {word!r} (choose {', '.join(FIDELITIES)})")
    return found


def simulate(scenario: Scenario, fidelity: Fidelity, progress: Progress | None = None) -> Result:
    """Run a scenario; its servers and clients log nothing. Raises as the fidelity's function."""
    if fidelity != "c":
        return SIMULATIONS[fidelity](scenario)
    with quiet():
        return simulate_live(scenario, progress=progress)


def simulate_all(
    scenarios: Iterable[Scenario], fidelity: Fidelity, *, jobs: int = 1
) -> Iterator[Result]:
    """Run them all, in `jobs` processes; results come in the scenarios' order.

    Processes are children that know nothing of this one; each scenario is sent to one.
    """
    run = partial(simulate, fidelity=fidelity)
    if jobs <= 1:
        yield from map(run, scenarios)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_silence) as pool:
        try:
            yield from pool.map(run, scenarios)
        except BaseException:  # Ctrl-C, or nobody wants the rest
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def _silence() -> None:
    logging.getLogger("shoal").setLevel(logging.CRITICAL + 1)
