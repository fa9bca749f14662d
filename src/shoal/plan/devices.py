"""What a device would do with a block, for servers that nobody has measured yet.

A roofline: decoding reads a block's weights once per pass and computes two operations per
weight and row; whatever takes longer counts. Real programs reach a part of what a data
sheet says; the two shares below stand for that. Estimates decide between a laptop and a
data-centre card, not between two laptops: measure (`shoal serve` does on start) before
trusting a difference below a factor of two.

Sources: the makers' data sheets (memory bandwidth; dense 16-bit operations per second on
GPUs, 32-bit on CPUs). Apple's chips are listed with what their CPUs and matrix units do,
since Shoal runs on the CPU there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from shoal.plan.spec import DecodeTimes

BANDWIDTH_SHARE: Final = 0.6
"""Of the memory's peak rate that reading weights reaches,"""

COMPUTE_SHARE: Final = 0.4
"""and of the peak of operations that large products reach."""

PASS_S: Final = 0.0002
"""Starting a block's dozen or so operations."""

BATCHES: Final = (1, 2, 4, 8, 16, 32, 64)
"""Batches that an estimate is made for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Peak figures of a device."""

    bytes_per_s: float
    """Of its memory."""
    flops_per_s: float
    memory_bytes: int | None = None
    """What is usual for it, where there is one answer."""
    is_cuda: bool = False


def _gpu(gigabytes_per_s: float, teraflops: float, gigabytes: int) -> Device:
    return Device(
        bytes_per_s=gigabytes_per_s * 1e9,
        flops_per_s=teraflops * 1e12,
        memory_bytes=gigabytes * 10**9,
        is_cuda=True,
    )


def _cpu(gigabytes_per_s: float, teraflops: float) -> Device:
    return Device(bytes_per_s=gigabytes_per_s * 1e9, flops_per_s=teraflops * 1e12)


DEVICES: Final[dict[str, Device]] = {
    "b200": _gpu(8000, 2250, 180),
    "h200": _gpu(4800, 989, 141),
    "h100": _gpu(3350, 989, 80),
    "a100-80gb": _gpu(2039, 312, 80),
    "a100-40gb": _gpu(1555, 312, 40),
    "l40s": _gpu(864, 362, 48),
    "l4": _gpu(300, 121, 24),
    "v100": _gpu(900, 125, 16),
    "t4": _gpu(320, 65, 16),
    "rtx-5090": _gpu(1792, 210, 32),
    "rtx-4090": _gpu(1008, 165, 24),
    "rtx-4070": _gpu(504, 58, 12),
    "rtx-3090": _gpu(936, 71, 24),
    "rtx-3060": _gpu(360, 25, 12),
    "m1": _cpu(68, 1.0),
    "m2": _cpu(100, 1.2),
    "m2-max": _cpu(400, 2.0),
    "m2-ultra": _cpu(800, 4.0),
    "m4": _cpu(120, 1.5),
    "m4-max": _cpu(546, 3.0),
    "desktop-ddr4": _cpu(51, 0.6),
    "desktop-ddr5": _cpu(90, 1.0),
    "laptop": _cpu(60, 0.4),
    "server-ddr4": _cpu(200, 2.0),
    "server-ddr5": _cpu(300, 4.0),
    "raspberry-pi-4": _cpu(12.8, 0.048),
    "raspberry-pi-5": _cpu(17.1, 0.15),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWork:
    """What running one block is made of."""

    weight_bytes: float
    params: float
    """Weights that take part for one row."""
    context_bytes: float = 0.0
    """Cache that one row reads: about half of a session's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTimes:
    """Estimated times of one block."""

    decode: DecodeTimes
    prefill_s_per_block: float
    prefill_s_per_block_token: float


def estimate(device: Device, work: BlockWork) -> BlockTimes:
    """The times of a block on a device; see the module's docstring."""
    reading = work.weight_bytes / (device.bytes_per_s * BANDWIDTH_SHARE)
    cache = work.context_bytes / (device.bytes_per_s * BANDWIDTH_SHARE)
    row = 2 * work.params / (device.flops_per_s * COMPUTE_SHARE)
    points = tuple((batch, PASS_S + max(reading, batch * row) + batch * cache) for batch in BATCHES)
    return BlockTimes(
        decode=DecodeTimes(points=points),
        prefill_s_per_block=PASS_S + reading,
        prefill_s_per_block_token=row,
    )


def decode_between(decode_s: float, prefill_s_per_token: float) -> DecodeTimes:
    """Decode times by batch from two measurements: one row, and a row of a long prompt.

    A pass of `BATCHES[-1]` rows costs about what so many rows of a prompt cost, and never
    less than one of a single row.
    """
    most = BATCHES[-1]
    return DecodeTimes(points=((1, decode_s), (most, max(decode_s, most * prefill_s_per_token))))
