"""attnbench.result: which states cannot be built, what a measurement says, and JSON both ways."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbench import stats
from attnbench.problem import Problem
from attnbench.result import HARMLESS, Check, Measurement, Result, Round, Status, sample_sizes, speedup

PROBLEM = Problem(seqlen_q=2, seqlen_k=3, dtype="fp32", causal=True, window=2, heads_q=4, heads_kv=2)
GOOD = Check(max_abs_err=1e-4, err_budget=1e-3, classic_ok=True, inputs="normal", rows_checked=2, rows_total=2)
BAD = dataclasses.replace(GOOD, max_abs_err=1e-2, fault="off")
SHAPELESS = dataclasses.replace(GOOD, max_abs_err=None, fault="wrong shape")
TIMES = Measurement(
    blocks=((1.0, 2.0), (3.0, 10.0)), statistic="mean", timing_method="host_clock", cache="hot", host_us=1.5
)


def result(**changes: object) -> Result:
    fields = {"problem": PROBLEM, "backend": "sdpa", "device": "cpu", "status": Status.PASSED, "check": GOOD}
    return Result(**(fields | changes))  # type: ignore[arg-type]


# Impossible states


@pytest.mark.parametrize("status", [s for s in Status if s is not Status.PASSED])
def test_a_number_never_stands_beside_a_failure(status):
    with pytest.raises(ValueError, match=f"a {status.value} result has no measurement"):
        result(status=status, reason="why", check=None, measurement=TIMES)
    assert result(status=status, reason="why", check=None).measurement is None


@pytest.mark.parametrize("check", [None, BAD, SHAPELESS])
def test_passed_needs_a_check_that_passed(check):
    with pytest.raises(ValueError, match="PASSED only by a check that passed"):
        result(check=check, measurement=TIMES)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reason": "but"}, "a reason exactly where it is not PASSED"),
        ({"status": Status.OOM, "check": None}, "a reason exactly where it is not PASSED"),
        ({"problem": Problem(seqlen_q=2, seqlen_k=3)}, "needs a dtype, not auto"),
        ({"device": "gpu"}, "device must be one of cpu, cuda, npu"),
        ({"used_cores": 0}, "used_cores must be at least 1"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        result(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_abs_err": 1e-2}, "beyond its budget needs a fault"),
        ({"max_abs_err": None}, "beyond its budget needs a fault"),
        ({"max_abs_err": math.nan}, "max_abs_err must be"),
        ({"max_abs_err": -1.0}, "max_abs_err must be"),
        ({"max_abs_err": math.inf, "fault": "off"}, "max_abs_err must be"),
        ({"err_budget": math.nan}, "err_budget must be"),
        ({"err_budget": math.inf}, "err_budget must be"),
        ({"err_budget": -1e-9}, "err_budget must be"),
        ({"err_budget": True}, "err_budget must be"),
    ],
)
def test_a_check_passes_only_within_its_budget(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(GOOD, **changes)


def test_an_error_equal_to_its_budget_is_within():
    assert dataclasses.replace(GOOD, max_abs_err=1e-3).passed
    assert dataclasses.replace(GOOD, max_abs_err=0.0, err_budget=0.0).passed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"blocks": ()}, "at least one block"),
        ({"blocks": ((1.0,), ())}, "at least one block of at least one time"),
        ({"blocks": ((1.0, 0.0),)}, "above 0, not 0.0"),
        ({"blocks": ((-1.0,),)}, "above 0"),
        ({"blocks": ((math.nan,),)}, "finite"),
        ({"blocks": ((math.inf,),)}, "finite"),
        ({"blocks": (("1",),)}, "finite"),
        ({"blocks": ((True,),)}, "finite"),
        ({"host_us": 0.0}, "above 0"),
        ({"host_us": None}, "finite"),
        ({"statistic": "min"}, "mean or median"),
        ({"cache": "warm"}, "hot or cold"),
        ({"clock_mhz": 0.0}, "clock_mhz"),
        ({"clock_mhz": math.nan}, "clock_mhz"),
    ],
)
def test_a_measurement_holds_times_alone(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TIMES, **changes)


def test_the_records_are_frozen():
    for record, field in ((result(), "status"), (GOOD, "fault"), (TIMES, "host_us")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, field, None)


# Severity


def test_severity_orders_checks_from_right_to_not_comparable():
    overwrote = dataclasses.replace(GOOD, fault="it overwrote its input q")
    exact = dataclasses.replace(GOOD, max_abs_err=0.0, err_budget=0.0)
    inexact = dataclasses.replace(GOOD, max_abs_err=1e-9, err_budget=0.0, fault="off")
    assert exact.severity == 0
    assert GOOD.severity == pytest.approx(0.1)
    assert inexact.severity == 1
    assert BAD.severity == pytest.approx(10)
    assert SHAPELESS.severity == overwrote.severity == math.inf


# Measurements


def test_time_us_is_the_mean_of_all_calls_or_the_geometric_mean_of_the_blocks_medians():
    assert TIMES.samples == (1.0, 2.0, 3.0, 10.0)
    assert TIMES.time_us == 4.0
    assert TIMES.block_times_us == (1.5, 6.5)
    median = dataclasses.replace(TIMES, blocks=((1.0, 2.0, 9.0), (6.0, 10.0)), statistic="median")
    assert median.time_us == median.median_us == pytest.approx(4.0)
    assert median.block_times_us == (2.0, 8.0)


def test_a_block_is_as_long_as_its_rounds_at_the_middle_pace():
    """2 µs at pace 1; 4 µs at half the speed, which is 2; 9 µs that nothing explains."""
    rounds = ((Round(1), Round(2, 2.0), Round(1)),)
    taken = dataclasses.replace(TIMES, blocks=((2.0, 3.0, 5.0, 9.0),), rounds=rounds, statistic="median")
    assert taken.block_times_us == (2.0,)
    assert taken.time_us == taken.median_us == 2.0
    assert dataclasses.replace(taken, statistic="mean").block_times_us == (4.75,)


@pytest.mark.parametrize("rounds", [((Round(1), Round(2)),), ((Round(4),), (Round(1),))])
def test_rounds_that_are_not_those_of_the_blocks_are_refused(rounds):
    with pytest.raises(ValueError, match="those of the block"):
        dataclasses.replace(TIMES, blocks=((2.0, 3.0, 5.0, 9.0),), rounds=rounds)


@pytest.mark.parametrize("fields", [(0,), (1.0,), (True,), (1, 0.0), (1, -1.0), (1, math.nan), (1, math.inf), (1, "1")])
def test_a_round_that_cannot_be_is_refused(fields):
    with pytest.raises(ValueError, match="a round"):
        Round(*fields)


times = st.floats(1e-3, 1e6)


@given(st.lists(st.lists(times, min_size=1, max_size=5), min_size=2, max_size=6), st.sampled_from(["mean", "median"]))
def test_the_interval_contains_time_us_and_is_as_wide_as_the_blocks_say(blocks, statistic):
    taken = dataclasses.replace(TIMES, blocks=tuple(map(tuple, blocks)), statistic=statistic)
    assert taken.ci95_us is not None
    low, high = taken.ci95_us
    assert low <= taken.time_us <= high
    logs = [math.log(value) for value in taken.block_times_us]
    half = stats.t_quantile(0.95, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    assert math.log(high / low) == pytest.approx(2 * half, abs=1e-9)


def test_one_block_gives_no_interval():
    assert dataclasses.replace(TIMES, blocks=((1.0, 2.0, 3.0),)).ci95_us is None


def test_a_mean_is_of_all_calls_however_many_a_sample_has():
    rounds = ((Round(5, calls_a_sample=2), Round(1)), (Round(4, calls_a_sample=4),))
    made = dataclasses.replace(TIMES, blocks=((1.0, 2.0, 9.0, 4.0), (7.0,)), rounds=rounds)
    assert made.mean_us == pytest.approx((2 * 1.0 + 2 * 2.0 + 9.0 + 4.0 + 4 * 7.0) / 10)
    assert made.block_times_us == pytest.approx(((2 * 1.0 + 2 * 2.0 + 9.0 + 4.0) / 6, 7.0))
    assert len(made.samples) == 5


def test_a_block_has_as_many_times_as_its_rounds_have_samples():
    for calls, fits in ((3, True), (4, True), (5, False), (2, False)):
        rounds = ((Round(calls, calls_a_sample=2),),)
        if fits:
            dataclasses.replace(TIMES, blocks=((1.0, 2.0),), rounds=rounds)
        else:
            with pytest.raises(ValueError, match="samples of a block's rounds"):
                dataclasses.replace(TIMES, blocks=((1.0, 2.0),), rounds=rounds)
    with pytest.raises(ValueError, match="whole number of calls"):
        Round(1, calls_a_sample=0)


@pytest.mark.parametrize(
    ("calls", "together", "sizes"), [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (2, 20, [2]), (3, 1, [1] * 3)]
)
def test_the_last_sample_is_of_what_is_left(calls, together, sizes):
    assert sample_sizes(calls, together) == Round(calls, calls_a_sample=together).samples == sizes


def test_speedup_is_baseline_over_contender_over_paired_blocks():
    slow = dataclasses.replace(TIMES, blocks=((10.0,), (20.0,), (40.0,)))
    fast = dataclasses.replace(TIMES, blocks=((5.0,), (10.0,), (20.0,)))
    found = speedup(slow, fast)
    assert found.value == pytest.approx(2.0)
    assert found.interval == pytest.approx((2.0, 2.0))
    assert found.verdict == "faster"
    assert speedup(fast, slow).verdict == "slower"
    assert speedup(slow, slow).verdict == "tie"
    assert speedup(slow, dataclasses.replace(fast, blocks=((5.0,),))).verdict == "-"


def test_of_unequal_blocks_only_those_that_both_have_are_compared():
    """The machine became four times slower when the contender had no more blocks: that is no speedup."""
    long = dataclasses.replace(TIMES, blocks=((10.0,), (10.1,), (40.0,), (40.0,)), statistic="median")
    short = dataclasses.replace(TIMES, blocks=((10.1,), (10.0,)), statistic="median")
    for statistic in ("mean", "median"):
        base, ours = (dataclasses.replace(m, statistic=statistic) for m in (long, short))
        assert speedup(base, ours).value == pytest.approx(1.0)
        assert speedup(base, ours).verdict == "tie"
        assert speedup(ours, base).value == pytest.approx(1.0)


def test_under_the_mean_the_speedup_is_the_ratio_of_means_with_the_blocks_interval_around_it():
    base = dataclasses.replace(TIMES, blocks=((10.0, 30.0, 20.0), (40.0,)))
    ours = dataclasses.replace(TIMES, blocks=((10.0,), (10.0,)))
    found = speedup(base, ours)
    assert found.value == 2.5
    half = 12.706204736 * math.log(2) / 2  # t with 1 degree of freedom; the log ratios are ln 2 and ln 4
    assert found.interval == pytest.approx((2.5 * math.exp(-half), 2.5 * math.exp(half)))


def test_blocks_that_are_worlds_apart_have_an_interval_all_the_same():
    wild = dataclasses.replace(TIMES, blocks=((1e-9,), (1e15,)), statistic="median")
    steady = dataclasses.replace(TIMES, blocks=((1e15,), (1e-9,)), statistic="median")
    assert wild.ci95_us[0] < wild.time_us < wild.ci95_us[1] < math.inf
    found = speedup(wild, steady)
    assert found.verdict == "tie"
    assert 1e100 < found.detectable < math.inf
    assert found.interval[0] < 1 < found.interval[1]


# Status and key


def test_the_statuses_are_the_contracts_twelve():
    assert [s.value for s in Status] == [str(s) for s in Status]
    assert " ".join(Status) == (
        "PASSED UNSUPPORTED UNAVAILABLE INCORRECT TAMPERED IMPLAUSIBLE COMPILE_ERROR RUNTIME_ERROR OOM TIMEOUT "
        "CRASHED SKIPPED"
    )


def test_harmless_are_the_statuses_that_leave_the_exit_code_alone():
    assert {s.value for s in HARMLESS} == {"PASSED", "UNSUPPORTED", "UNAVAILABLE", "SKIPPED"}


def test_a_results_key_is_its_case_and_backend():
    assert result().key == ("b1-h4x2-q2-k3-d128-fp32-causal-w2", "sdpa")


# JSON


@pytest.mark.parametrize(
    "made",
    [
        result(),
        result(measurement=TIMES, used_cores=3),
        result(measurement=dataclasses.replace(TIMES, statistic="median", cache="cold", clock_mhz=2400.5)),
        result(measurement=dataclasses.replace(TIMES, rounds=((Round(4, 0.5, 2),), (Round(2),)), fallback="why")),
        result(status=Status.INCORRECT, reason="off", check=BAD),
        result(status=Status.INCORRECT, reason="shape", check=SHAPELESS),
        *(result(status=s, reason="why → µs", check=None) for s in Status if s is not Status.PASSED),
    ],
    ids=lambda r: r.status.value,
)
def test_json_round_trip(made):
    assert Result.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_json_holds_plain_values():
    data = result(measurement=TIMES).to_json()
    assert data["status"] == "PASSED"
    assert type(data["status"]) is str
    assert json.loads(json.dumps(data))["measurement"]["blocks"] == [[1.0, 2.0], [3.0, 10.0]]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d.pop("problem"),
        lambda d: d.update(status="FINE"),
        lambda d: d.update(speed=3),
        lambda d: d["check"].pop("inputs"),
        lambda d: d["measurement"].pop("blocks"),
        lambda d: d["measurement"].update(blocks=[[0.0]]),
        lambda d: d.update(status="OOM", reason="x"),
        lambda d: d.update(check=None),
        lambda d: d["problem"].update(dtype="auto"),
    ],
)
def test_json_that_is_no_result_is_refused(spoil):
    data = json.loads(json.dumps(result(measurement=TIMES).to_json()))
    spoil(data)
    with pytest.raises((ValueError, KeyError, TypeError)):
        Result.from_json(data)


@pytest.mark.parametrize("value", [1e-320, 9e-10, 2e15])
def test_a_time_that_makes_rates_no_numbers_is_refused(value):
    with pytest.raises(ValueError, match="a time must be"):
        Measurement(blocks=((value,),), statistic="mean", timing_method="host_clock", cache="hot", host_us=1.0)
