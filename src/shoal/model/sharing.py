"""Blocks that two backends of one process run: a server that changes its span keeps what it has.

Both then use one device thread, so that no module is ever run, or given an adapter, by two at
once. Blocks with experts are not shared: an expert knows the pass under way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from shoal.base.errors import InternalError
from shoal.base.spans import Span
from shoal.model.device_thread import DeviceThread
from shoal.model.span_model import SpanModel
from shoal.model.tiled_experts import has_experts

_T = TypeVar("_T")


class ThreadUse:
    """The backends on one device thread; the last one to leave stops it."""

    def __init__(self, thread: DeviceThread) -> None:
        self.thread = thread
        self._users = 1

    def join(self) -> ThreadUse:
        """One backend more."""
        if not self._users:
            raise InternalError("the device thread is closed")
        self._users += 1
        return self

    async def leave(self) -> None:
        """One less; returns when the jobs that it had are over."""
        self._users -= 1
        if self._users:
            await self.thread.run(lambda: None)
        else:
            await self.thread.aclose()


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a backend is made of."""

    config: object
    """How it was loaded; equal ones give equal blocks of one model."""
    model: SpanModel
    probed: Any
    """What exact mode found out about these kinds of blocks."""
    use: ThreadUse

    def shared(self, config: object, span: Span) -> Mapping[int, torch.nn.Module]:
        """The blocks that another backend may take over, by number."""
        if config != self.config or has_experts(self.model.blocks()):
            return {}
        both = self.model.span.overlap(span)
        numbers = range(both.start, both.end) if both else ()
        return {number: self.model.block(number) for number in numbers}

    def probe(self, model: SpanModel, find: Callable[[], _T]) -> _T:
        """What `find` finds for a model that shares our blocks; known if its kinds are ours."""
        if self.model.kinds().keys() == model.kinds().keys():
            known: _T = self.probed
            return known
        return self.use.thread.call(find)
