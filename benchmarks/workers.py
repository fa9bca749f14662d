"""Processes that answer one measured request per line, so that their CPU time is their own.

A worker script prints one line when it is ready; then a line on stdin is a request and the
line on stdout its answer, both JSON. The end of stdin ends it.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHOAL = str(Path(sys.executable).with_name("shoal"))


class Worker:
    """One such process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def ask(self, request: Any) -> Any:
        """Its answer; the event loop goes on meanwhile."""
        return await asyncio.to_thread(self._ask, request)

    def _ask(self, request: Any) -> Any:
        if self._process.stdin is None or self._process.stdout is None:
            raise SystemExit("the worker has no pipes")
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"worker {self._process.args!r} ended; its reason is above")
        return json.loads(line)


@contextmanager
def working(script: str, *arguments: str, threads: int) -> Iterator[Worker]:
    """The script as a worker, once it is ready."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / script), *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(threads),
    )  # fmt: skip
    try:
        if process.stdout is None or not process.stdout.readline():
            raise SystemExit(f"{script} {' '.join(arguments)} did not start")
        yield Worker(process)
    finally:
        process.communicate()


@contextmanager
def serving(
    model: str, span: str, dtype: str, threads: int, join: str | None
) -> Iterator[tuple[str, int]]:
    """`shoal serve`, as a person would run it; gives its address and process id."""
    command = [SHOAL, "serve", model, "--blocks", span, "--threads", str(threads)]
    command += ["--dtype", dtype, *(["--join", join] if join else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout is not None else ""
        match = re.search(r"address=(\S+)", line)
        if match is None:
            raise SystemExit(f"{' '.join(command)} did not start")
        yield match[1], process.pid
    finally:
        process.terminate()
        process.wait()


def environment(threads: int) -> dict[str, str]:
    """That of a process with so many compute threads."""
    number = str(threads)
    return os.environ | {"OMP_NUM_THREADS": number, "MKL_NUM_THREADS": number}


async def requests() -> AsyncIterator[Any]:
    """In a worker: says ready, then gives each request; the event loop goes on between them."""
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        yield json.loads(line)


def answer(value: Any) -> None:
    """In a worker: the answer to the request at hand."""
    print(json.dumps(value), flush=True)
