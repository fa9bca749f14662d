"""Dropout that can be drawn again anywhere: the same numbers on any server and device.

A value's fate depends on (seed, step, block, target, sequence, position, place in the row)
and on nothing else, so a batch may be cut, spread and repeated at will. The numbers are
Philox 4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), 16 bits for
each value, drawn on the CPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from shoal.base.adapters import DropoutKey, RowRun

_VALUES_PER_STEP: Final = 16
"""Values of 16 bits in one step of the counter: 4 words of 64 bits."""

_LEVELS: Final = 1 << 16


def dropout_mask(
    probability: float,
    key: DropoutKey,
    block: int,
    target: str,
    runs: Sequence[RowRun],
    width: int,
) -> torch.Tensor:
    """(T, width) bool on the CPU: which values are kept, the rows of all runs in order."""
    dropped = round(probability * _LEVELS)
    parts = [_drawn(key, block, target, run, width) for run in runs]
    return torch.from_numpy(np.concatenate(parts) >= dropped)


def _drawn(key: DropoutKey, block: int, target: str, run: RowRun, width: int) -> np.ndarray:
    """(count, width) whole numbers below 65,536."""
    steps = -(-width // _VALUES_PER_STEP)
    said = f"{key.seed} {key.step} {block} {target} {run.sequence}".encode()
    digest = hashlib.blake2b(said, digest_size=16, person=b"shoal-dropout").digest()
    words = np.frombuffer(digest, dtype="<u8")
    generator = np.random.Philox(key=words, counter=run.position * steps)
    raw = generator.random_raw(run.count * steps * 4).astype("<u8", copy=False)
    return raw.view("<u2").reshape(run.count, steps * _VALUES_PER_STEP)[:, :width]
