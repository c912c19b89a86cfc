"""attnbench.report.difference: what two runs have in common is compared, by speedups where there are any."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from helpers import DEVICE, failed, passed

from attnbench import stats
from attnbench.report.difference import difference
from attnbench.report.tables import Tables
from attnbench.result import Result, Status
from attnbench.rows import row
from attnbench.store import Record


def tables(*results: Result, baseline: str | None = "sdpa") -> Tables:
    return Tables(Record(Path("a-run"), tuple(row(r, DEVICE) for r in results), DEVICE, results), baseline)


def of(backend: str, *times: float, seqlen_q: int = 128) -> Result:
    """A result of one block a time."""
    return passed(backend, *((time,) for time in times), problem={"seqlen_q": seqlen_q})


def cells(text: str) -> list[list[str]]:
    """The rows of the table, split where two blanks part cells."""
    lines = text.split("\n\n")[0].splitlines()
    return [re.split(r" {2,}", line.strip()) for line in lines[2:]]


def test_a_change_is_that_of_the_speedup_since_machines_change_too() -> None:
    """The machine became twice as slow; against the baseline the kernel became 1.5 times faster."""
    before = tables(of("sdpa", 30.0, 30.0, 30.0), of("mine", 30.0, 30.0, 30.0))
    now = tables(of("sdpa", 60.0, 60.0, 60.0), of("mine", 40.0, 40.0, 40.0))
    assert cells(difference(before, now)) == [
        ["b1-h1-q128-k1024-d128-fp16", "mine", "30.000 µs", "40.000 µs", "1.00×", "1.50×", "+50.0%", "faster"]
    ]
    assert "geometric mean 1.500×, 1 faster" in difference(before, now)
    assert "geometric mean 0.667×, 1 slower" in difference(now, before)
    assert "geometric mean 1.000×, 1 tie" in difference(now, now)


def test_the_verdict_takes_the_spread_of_both_runs() -> None:
    """Of 3 blocks a half width at 99% is 9.925 standard errors; that of a difference is the root of both squares."""
    steady = [10.0 * math.exp(x) for x in (-0.01, 0.0, 0.01)]
    half = stats.t_quantile(0.99, 2) * 0.01 / math.sqrt(3)
    for gain, verdict in ((math.sqrt(2) * half * 1.01, "faster"), (math.sqrt(2) * half * 0.99, "tie")):
        before = tables(of("sdpa", 10.0, 10.0, 10.0), of("mine", *steady))
        now = tables(of("sdpa", 10.0, 10.0, 10.0), of("mine", *(time * math.exp(-gain) for time in steady)))
        assert cells(difference(before, now))[0][-1] == verdict


def test_without_a_baseline_times_are_compared_and_nothing_is_called_faster() -> None:
    before, now = (tables(of("mine", *[time] * 3), baseline=None) for time in (30.0, 20.0))
    assert cells(difference(before, now)) == [
        ["b1-h1-q128-k1024-d128-fp16", "mine", "30.000 µs", "20.000 µs", "—", "—", "+50.0%", "—"]
    ]


@pytest.mark.parametrize("baseline", ["sdpa", None])
def test_what_two_methods_took_is_no_change(baseline: str | None) -> None:
    timing = {"timing_method": "cuda_graph"}
    before = tables(of("sdpa", 30.0, 30.0), of("mine", 30.0, 30.0), baseline=baseline)
    now = tables(passed("sdpa", (9.0,), (9.0,), timing=timing), passed("mine", (3.0,), (3.0,), timing=timing))
    assert {line[6] for line in cells(difference(before, now))} == {"—"}


@pytest.mark.parametrize(
    ("before", "now", "word"),
    [
        (of("mine", 9.0), failed("mine", Status.INCORRECT), "broken"),
        (failed("mine", Status.INCORRECT), of("mine", 9.0), "mended"),
        (failed("mine", Status.INCORRECT), failed("mine", Status.CRASHED), "failed otherwise"),
    ],
)
def test_how_a_case_ended_goes_before_its_time(before: Result, now: Result, word: str) -> None:
    sdpa = of("sdpa", 9.0)
    (line,) = cells(difference(tables(sdpa, before), tables(sdpa, now)))
    assert line[-1] == word
    assert line[6] == "—"
    assert "no case has a time in both" in difference(tables(sdpa, before), tables(sdpa, now))


def test_a_case_that_the_last_run_did_not_have_is_new_and_one_that_is_gone_is_left_out() -> None:
    before = tables(of("sdpa", 9.0), of("mine", 9.0))
    now = tables(of("sdpa", 9.0, seqlen_q=256), of("mine", 9.0, seqlen_q=256))
    (line,) = cells(difference(before, now))
    assert line == ["b1-h1-q256-k1024-d128-fp16", "mine", "—", "9.000 µs", "—", "1.00×", "—", "new"]
