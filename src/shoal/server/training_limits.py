"""How much of a server training may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from shoal.base.errors import ConfigError
from shoal.server.shares import ADDRESS_SHARE, check_share
from shoal.server.training_queue import SHARE_MIN

ROWS_PER_PASS_MAX: Final = 2048
"""Rows of one micro-batch: what a decode row of somebody else waits for is one block of it.
Clients cut batches into 128 to 512 rows; only a sequence that is longer goes alone."""

PASSES_PER_CLIENT: Final = 8
"""Calls of one client that are open here: one that computes, one that travels each way, and
as many again."""

OPEN_BYTES_PER_CLIENT: Final = 256 << 20
"""Rows and gradients of these calls that are in memory here."""

OPEN_BYTES_MAX: Final = 2 << 30
"""The same over all clients."""

ANSWER_BYTES_PER_CLIENT: Final = 512 << 20
"""Rows and gradients that go back to one client, from when a call is announced until they are
taken; a single answer may be larger."""

ANSWER_BYTES_MAX: Final = 2 << 30
"""The same over all clients."""

TENSOR_BYTES_PER_CLIENT: Final = 256 << 20
"""Trained tensors of one client: LoRA of rank 16 in all layers of a 70B model's half takes
100 MB in bfloat16. The oldest go first."""

TENSOR_BYTES_MAX: Final = 1 << 30
"""The same over all clients."""

KEPT_BYTES_PER_CLIENT: Final = 1 << 30
"""What is kept of one client's forward passes."""

KEPT_BYTES_MAX: Final = 2 << 30
"""The same over all clients."""

PASS_BYTES_MAX: Final = 1 << 30
"""What a way back that begins anew may hold: beyond it, blocks are run once more."""

BUSY_RETRY_S: Final = 1.0
"""When to come back with a call that was one too many: some blocks take as long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingLimits:
    """How much of a server training may take."""

    is_open: bool = True
    """Whether anybody may train here."""
    rows_per_pass_max: int = ROWS_PER_PASS_MAX
    passes_per_client: int = PASSES_PER_CLIENT
    open_bytes_per_client: int = OPEN_BYTES_PER_CLIENT
    open_bytes_max: int = OPEN_BYTES_MAX
    answer_bytes_per_client: int = ANSWER_BYTES_PER_CLIENT
    answer_bytes_max: int = ANSWER_BYTES_MAX
    tensor_bytes_per_client: int = TENSOR_BYTES_PER_CLIENT
    tensor_bytes_max: int = TENSOR_BYTES_MAX
    kept_bytes_per_client: int = KEPT_BYTES_PER_CLIENT
    kept_bytes_max: int = KEPT_BYTES_MAX
    pass_bytes_max: int = PASS_BYTES_MAX
    address_share: float = ADDRESS_SHARE
    """Of places and of each kind of memory, for all clients of one address."""
    share_min: float = SHARE_MIN
    """Of the engine's time, when sessions want all of it."""

    def __post_init__(self) -> None:
        for name in ("rows_per_pass_max", "passes_per_client", "open_bytes_per_client"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 < self.share_min <= 1:
            raise ConfigError(f"share_min is {self.share_min}: above 0, at most 1")
        check_share(self.address_share)
