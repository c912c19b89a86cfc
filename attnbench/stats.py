"""Owns the statistics of timings: quantiles, t-intervals, ratios of blocks. Knows numbers only."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SHOWN_LEVEL = 0.95
"""Confidence of the intervals that tables show."""
VERDICT_LEVEL = 0.99
"""Confidence at which one backend is called faster or slower than another."""
MAX_LOG = 600.0
"""A wider half interval says no more, and exp would overflow: two blocks that are 10⁹ apart have one of 660 at 99%."""


def percentile(values: Sequence[float], percent: float) -> float:
    """The `percent`-th percentile, linear between order statistics (as numpy's default)."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _t_cdf(t: float, df: int) -> float:
    """Student's t distribution function for t ≥ 0 and whole df (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    theta = math.atan(t / math.sqrt(df))
    cos2 = math.cos(theta) ** 2
    term = total = 1.0 if df % 2 == 0 else math.cos(theta)
    for step in range(2 if df % 2 == 0 else 3, df, 2):
        term *= cos2 * (step - 1) / step
        total += term
    if df % 2 == 0:
        inside = math.sin(theta) * total
    else:
        inside = 2 / math.pi * (theta + (math.sin(theta) * total if df > 1 else 0.0))
    return 0.5 + inside / 2


@functools.lru_cache(maxsize=256)
def t_quantile(level: float, df: int) -> float:
    """The t with P(-t < T < t) = level for Student's t with df ≥ 1 degrees of freedom, by bisection."""
    target, low, high = 0.5 + level / 2, 0.0, 1.0
    while _t_cdf(high, df) < target:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, df) < target else (low, middle)
    return high


def half_width(values: Sequence[float], level: float = SHOWN_LEVEL) -> float | None:
    """Half the t-interval of the mean of independent values; None for fewer than two."""
    if len(values) < 2:
        return None
    return t_quantile(level, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True)
class Ratio:
    """How many times faster a contender is than its baseline, with its interval where there is one."""

    value: float
    half: float | None = None
    """Half the interval of log(value), at SHOWN_LEVEL."""
    verdict_half: float | None = None
    """The same at VERDICT_LEVEL: also the smallest difference that could have been told from none."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval that tables show."""
        return None if self.half is None else around(self.value, self.half)

    @property
    def verdict(self) -> str:
        """faster, slower, tie (the interval at VERDICT_LEVEL includes 1), or - without an interval."""
        if self.verdict_half is None:
            return "-"
        if abs(math.log(self.value)) <= self.verdict_half:
            return "tie"
        return "faster" if self.value > 1 else "slower"

    @property
    def detectable(self) -> float | None:
        """The smallest difference, as a share, that the blocks could have told from a tie; None without an interval."""
        return None if self.verdict_half is None else math.expm1(min(self.verdict_half, MAX_LOG))


def ratio_of_blocks(value: float, baseline: Sequence[float], contender: Sequence[float]) -> Ratio:
    """The ratio `value` with the intervals that paired blocks' log ratios give it.

    Block i of both was timed in the same rounds, so what disturbed both cancels. Of unequal numbers of blocks, as an
    unfinished run may have, those count that both have. Without two pairs there is no interval.
    """
    logs = [math.log(b / c) for b, c in zip(baseline, contender)]
    return Ratio(value, half_width(logs), half_width(logs, VERDICT_LEVEL))


def around(value: float, half: float) -> tuple[float, float]:
    """The interval around `value` whose logarithm is `half` wide on either side."""
    factor = math.exp(min(half, MAX_LOG))
    return value / factor, value * factor


def geometric_median(values: Sequence[float]) -> float:
    """The median on a logarithmic scale: of an even number the geometric mean of the middle two."""
    ordered = sorted(values)
    return geometric_mean(ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1])


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean logarithm; the mean that fits ratios. Equal values give that value, to the last bit."""
    first = values[0]
    return first * math.exp(statistics.fmean(math.log(value / first) for value in values))
