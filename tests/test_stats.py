"""attnbench.stats: quantiles against tables, intervals that hold the truth as often as they say, verdicts."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbench import stats
from attnbench.stats import Ratio, geometric_mean, geometric_median, half_width, percentile, ratio_of_blocks, t_quantile

# Two-sided, from printed tables of Student's t.
T_TABLE = {
    0.95: {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262, 30: 2.042, 100: 1.984},
    0.99: {1: 63.657, 2: 9.925, 4: 4.604, 9: 3.250, 30: 2.750, 100: 2.626},
}


@pytest.mark.parametrize(("level", "df"), [(level, df) for level, column in T_TABLE.items() for df in column])
def test_t_quantile_is_the_tables(level, df):
    assert t_quantile(level, df) == pytest.approx(T_TABLE[level][df], abs=5.1e-4)


def test_t_quantile_tends_to_the_normal_distributions():
    assert t_quantile(0.95, 100_000) == pytest.approx(1.959964, abs=1e-4)


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=40), st.floats(0, 100))
def test_percentile_is_numpys(values, percent):
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), rel=1e-9)


def test_half_width_of_known_values():
    # stdev of 1..5 is sqrt(2.5), t(95%, 4) = 2.776445
    assert half_width([1, 2, 3, 4, 5]) == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
    assert half_width([1, 2, 3, 4, 5], 0.99) == pytest.approx(4.604095 * math.sqrt(2.5 / 5), rel=1e-6)
    assert half_width([7.0, 7.0, 7.0]) == 0
    assert half_width([7.0]) is None
    assert half_width([]) is None


@pytest.mark.parametrize("level", [0.95, 0.99])
@pytest.mark.parametrize("count", [2, 5, 18])
def test_intervals_hold_the_truth_as_often_as_they_say(level, count):
    source = random.Random(7)
    held, sets = 0, 2000
    for _ in range(sets):
        values = [source.gauss(100, 3) for _ in range(count)]
        half = half_width(values, level)
        assert half is not None
        held += abs(sum(values) / count - 100) <= half
    # four standard errors of a share around its truth
    assert held / sets == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / sets))


def test_ratio_intervals_hold_the_true_speedup_in_95_of_100_and_ignore_what_disturbs_both():
    source = random.Random(11)
    held, sets, widths = 0, 2000, []
    for _ in range(sets):
        # A round's common disturbance is far larger than either lane's own noise.
        common = [math.exp(source.gauss(0, 0.3)) for _ in range(8)]
        slow = [200 * c * math.exp(source.gauss(0, 0.01)) for c in common]
        fast = [100 * c * math.exp(source.gauss(0, 0.01)) for c in common]
        ratio = ratio_of_blocks(geometric_mean(slow) / geometric_mean(fast), slow, fast)
        assert ratio.interval is not None
        low, high = ratio.interval
        held += low <= 2.0 <= high
        widths.append(high / low - 1)
    assert held / sets == pytest.approx(0.95, abs=0.02)
    assert max(widths) < 0.1


def test_ratio_of_blocks_of_known_values():
    ratio = ratio_of_blocks(2.0, [2.0, 2.2, 1.8], [1.0, 1.0, 1.0])
    logs = [math.log(2.0), math.log(2.2), math.log(1.8)]
    assert ratio.value == 2.0
    # t with 2 degrees of freedom at 97.5% and 99.5%, from a table.
    assert ratio.half == pytest.approx(4.302652729911275 * statistics.stdev(logs) / math.sqrt(3))
    assert ratio.verdict_half == pytest.approx(9.92484320047 * statistics.stdev(logs) / math.sqrt(3))
    assert ratio.half is not None
    assert ratio.interval == pytest.approx((2.0 * math.exp(-ratio.half), 2.0 * math.exp(ratio.half)))


@pytest.mark.parametrize(("baseline", "contender"), [([2.0], [1.0]), ([], []), ([2.0], [1.0, 1.0, 1.0])])
def test_without_two_pairs_there_is_no_interval(baseline, contender):
    ratio = ratio_of_blocks(2.0, baseline, contender)
    assert ratio == Ratio(2.0)
    assert (ratio.interval, ratio.verdict, ratio.detectable) == (None, "-", None)


def test_of_unequal_numbers_of_blocks_those_count_that_both_have():
    assert ratio_of_blocks(2.0, [2.0, 2.2], [1.0, 1.0, 7.0]) == ratio_of_blocks(2.0, [2.0, 2.2], [1.0, 1.0])


@pytest.mark.parametrize(
    ("value", "half", "verdict"),
    [(1.05, 0.04, "faster"), (1.05, 0.05, "tie"), (0.95, 0.05, "slower"), (0.95, 0.06, "tie"), (1.0, 0.0, "tie")],
)
def test_the_verdict_is_a_tie_where_the_99_percent_interval_includes_one(value, half, verdict):
    ratio = Ratio(value, half / 10, half)
    assert ratio.verdict == verdict
    assert ratio.detectable == pytest.approx(math.exp(half) - 1)


def test_geometric_mean_is_the_mean_of_ratios():
    assert geometric_mean([2.0, 0.5]) == pytest.approx(1.0)
    assert geometric_mean([1.0, 10.0, 100.0]) == pytest.approx(10.0)
    assert {x: geometric_mean([x] * 5) for x in (0.1, 19.2, 70.338, 1e15)} == {x: x for x in (0.1, 19.2, 70.338, 1e15)}


def test_tables_show_95_percent():
    assert stats.SHOWN_LEVEL == 0.95


def test_a_geometric_median_is_the_middle_one_or_the_geometric_mean_of_the_middle_two():
    assert geometric_median([7.0, 1.0, 3.0]) == 3.0
    assert geometric_median([8000.0, 40.0, 8000.0, 40.0]) == pytest.approx(math.sqrt(8000.0 * 40.0))
    assert geometric_median([5.0]) == 5.0
    assert geometric_median([0.1, 0.1]) == 0.1
