"""Many seeds of chaos, one after the other or in several processes; failures are shrunk."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shoal.base.errors import ConfigError
from shoal.lab.chaos import ChaosPlan, ChaosResult, draw_plan, run_plan, shrink
from shoal.server.events import Began, Recorder
from shoal.server.trace_file import TraceWriter

SHRINK_RUNS_MAX: Final = 400
"""Runs spent on making a failing plan smaller: half a minute of ordinary plans."""

_SHOAL: Final = logging.getLogger("shoal")
_OFF: Final = logging.CRITICAL + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A plan that fails, and a smaller one that fails in the same way."""

    seed: int
    error: str
    """Type and text; a stuck run's text lists every task with the lines where it waits."""
    shrunk: ChaosPlan
    shrunk_error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one seed: `result`, or `failure`."""

    seed: int
    result: ChaosResult | None = None
    failure: Failure | None = None


def run_seed(seed: int, *, record: Callable[[Began], Recorder] | None = None) -> Outcome:
    """Run one seed; a failure is shrunk. `record` makes a recorder for each server that starts."""
    plan = draw_plan(seed)
    try:
        return Outcome(seed=seed, result=run_plan(plan, record=record))
    except Exception as error:  # noqa: BLE001 - whatever went wrong is the result
        return Outcome(seed=seed, failure=_describe(plan, error))


def run_seeds(seeds: Iterable[int], *, jobs: int = 1) -> Iterator[Outcome]:
    """Run every seed, in `jobs` processes; outcomes come as they are ready.

    More processes than one are children that know nothing of this process: what was
    changed here (logging, say) does not hold there, and they log nothing.
    """
    if jobs <= 1:
        yield from map(run_seed, seeds)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_silence) as pool:
        try:
            for future in as_completed([pool.submit(run_seed, seed) for seed in seeds]):
                yield future.result()
        except BaseException:  # Ctrl-C, or nobody wants the rest
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def traces_in(folder: Path) -> Callable[[Began], Recorder]:
    """Recorders that write one trace for each server, as `shoal serve --trace` does.

    Raises:
        ConfigError: the folder can't be made, or something is in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_empty = not any(folder.iterdir())
    except OSError as error:
        raise ConfigError(f"can't write traces to {folder}: {error.strerror}") from error
    if not is_empty:
        raise ConfigError(f"{folder} is not empty: name a new folder for the traces")

    def record(began: Began) -> TraceWriter:
        now = asyncio.get_running_loop().time
        return TraceWriter(folder / f"{began.peer}.trace", began, now)

    return record


@contextmanager
def quiet() -> Iterator[None]:
    """The simulated servers and clients log nothing meanwhile."""
    level = _SHOAL.level
    _SHOAL.setLevel(_OFF)
    try:
        yield
    finally:
        _SHOAL.setLevel(level)


def same_failure(error: Exception) -> Callable[[ChaosPlan], bool]:
    """Whether a plan fails with an error of this type; for `shrink`."""
    runs_left = SHRINK_RUNS_MAX

    def fails(plan: ChaosPlan) -> bool:
        nonlocal runs_left
        if runs_left == 0:
            return False
        runs_left -= 1
        return type(_error_of(plan)) is type(error)

    return fails


def run_digest(plan: ChaosPlan) -> tuple[str, ChaosResult]:
    """A hash over everything that was logged, with its virtual times, and the result.

    Two runs of one plan give equal hashes, on any machine, in any process.
    """
    digest = hashlib.sha256()
    handler = _DigestHandler(digest.update)
    level, is_propagating = _SHOAL.level, _SHOAL.propagate
    _SHOAL.addHandler(handler)
    _SHOAL.setLevel(logging.DEBUG)
    _SHOAL.propagate = False
    try:
        result = run_plan(plan)
    finally:
        _SHOAL.removeHandler(handler)
        _SHOAL.setLevel(level)
        _SHOAL.propagate = is_propagating
    digest.update(repr(result).encode())
    return digest.hexdigest(), result


class _DigestHandler(logging.Handler):
    def __init__(self, update: Callable[[bytes], None]) -> None:
        super().__init__()
        self._update = update

    def emit(self, record: logging.LogRecord) -> None:
        now_s = asyncio.get_running_loop().time()
        self._update(f"{now_s!r} {record.name} {record.getMessage()}\n".encode())


def _describe(plan: ChaosPlan, error: Exception) -> Failure:
    shrunk = shrink(plan, same_failure(error))
    shrunk_error = _error_of(shrunk) or error
    return Failure(
        seed=plan.seed, error=_text(error), shrunk=shrunk, shrunk_error=_text(shrunk_error)
    )


def _error_of(plan: ChaosPlan) -> Exception | None:
    try:
        run_plan(plan)
    except Exception as error:  # noqa: BLE001 - the caller judges it
        return error
    return None


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _silence() -> None:
    _SHOAL.setLevel(_OFF)
