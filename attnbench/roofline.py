"""Owns the roofline: the least time that a device's peaks allow a problem. Knows no vendor, and measures nothing."""

from __future__ import annotations

from dataclasses import dataclass

from attnbench.devices import DeviceInfo
from attnbench.problem import Problem
from attnbench.result import CacheState

MARGIN = {"table": 1.1, "measured": 1.25}
"""How far above its peaks a device may be. A table's are at the nominal clock, and an H100 boosts 8 % beyond it; a
measured one falls short where the machine is shared."""

HALVES_A_FLOAT = 3
"""An fp32 product can be made of three of half width, each operand split in two, at nearly the precision of fp32."""


@dataclass(frozen=True)
class Bound:
    """The least time of a problem, and the peak that sets it."""

    time_us: float
    """The margin is in it."""
    words: str
    """`1.1 × 353.9 TFLOP/s`."""


def least_time_us(problem: Problem, info: DeviceInfo, cache: CacheState) -> Bound | None:
    """The least time that `info`'s peaks allow the problem; None where they say nothing of it.

    It is the larger of FLOPs (those of the GEMMs) over the peak rate and bytes over the bandwidth, over the margin.
    """
    margin = MARGIN.get(info.peak_source)
    if margin is None:
        return None
    bounds = []
    if peak := _peak_tflops(problem, info):
        bounds.append(Bound(problem.flops_gemm / (peak * 1e6) / margin, f"{margin} × {peak:.4g} TFLOP/s"))
    if info.bandwidths:
        size, gbps = _bytes_and_bandwidth(problem, info, cache)
        bounds.append(Bound(size / (gbps * 1e3) / margin, f"{margin} × {gbps:.0f} GB/s"))
    return max(bounds, key=lambda bound: bound.time_us, default=None)


def fault(problem: Problem, info: DeviceInfo, cache: CacheState, time_us: float) -> str:
    """Why the device cannot have been that fast, as a reason for IMPLAUSIBLE; empty where it can."""
    bound = least_time_us(problem, info, cache)
    if bound is None or time_us >= bound.time_us:
        return ""
    return f"{_us(time_us)} is faster than the {_us(bound.time_us)} that {bound.words} allow"


def _peak_tflops(problem: Problem, info: DeviceInfo) -> float:
    """The rate that no honest kernel of that dtype exceeds; 0 where none is known."""
    peak = info.peak_tflops.get(problem.dtype, 0.0)
    if problem.dtype == "fp32":
        half = max(info.peak_tflops.get("fp16", 0.0), info.peak_tflops.get("bf16", 0.0))
        peak = max(peak, half / HALVES_A_FLOAT)
    return peak


def _bytes_and_bandwidth(problem: Problem, info: DeviceInfo, cache: CacheState) -> tuple[int, float]:
    """What must be moved, and how fast at best.

    Cold: the inputs come from memory, but the output may stay in a cache. Hot: a working set is read no faster than one
    of half its size or less, whose rate was measured; one smaller than all that were measured, no faster than those.
    """
    if cache == "cold":
        return problem.input_bytes, info.bandwidths[-1][1]
    moved = problem.bytes_moved
    smaller = [gbps for size, gbps in info.bandwidths if size <= moved / 2]
    return moved, smaller[-1] if smaller else info.bandwidths[0][1]


def _us(time_us: float) -> str:
    return f"{time_us:.1f} µs" if time_us >= 10 else f"{time_us:.3f} µs"
