"""Owns the record of one (problem, backend): Status, Check, Measurement, Result. Knows no file format."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, get_args

from attnbench import stats
from attnbench.problem import DEVICE_KINDS, DeviceKind, Problem

Statistic = Literal["mean", "median"]
TimingMethod = Literal["host_clock", "device_events", "cuda_graph", "npu_graph"]
"""How times are taken: the host's clock around a call, events around an eager call, events around the calls of a CUDA
graph, or events around replays of an NPU's graph. No ratio is made of two methods' times."""
TIMING_METHODS: tuple[TimingMethod, ...] = get_args(TimingMethod)
HOST_CLOCK, DEVICE_EVENTS, CUDA_GRAPH, NPU_GRAPH = TIMING_METHODS
CacheState = Literal["hot", "cold"]
CACHE_STATES: tuple[CacheState, ...] = get_args(CacheState)


class Status(str, Enum):
    """How a case ended."""

    PASSED = "PASSED"
    UNSUPPORTED = "UNSUPPORTED"
    """The backend cannot do the problem."""
    UNAVAILABLE = "UNAVAILABLE"
    """This machine cannot run the backend."""
    INCORRECT = "INCORRECT"
    TAMPERED = "TAMPERED"
    """A plugin changed the clocks, attnbench, or the functions that synchronise and time the device."""
    IMPLAUSIBLE = "IMPLAUSIBLE"
    """Faster than the roofline."""
    COMPILE_ERROR = "COMPILE_ERROR"
    RUNTIME_ERROR = "RUNTIME_ERROR"
    OOM = "OOM"
    TIMEOUT = "TIMEOUT"
    CRASHED = "CRASHED"
    SKIPPED = "SKIPPED"

    def __str__(self) -> str:
        return self.value


MIN_TIME_US, MAX_TIME_US = 1e-9, 1e15
"""What a time may be: beyond, rates made of it would be no numbers."""

HARMLESS = frozenset({Status.PASSED, Status.UNSUPPORTED, Status.UNAVAILABLE, Status.SKIPPED})
"""Every other status makes the exit code 1."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What the comparison with the float64 oracle found, on the worst of the inputs tried.

    Errors are absolute, in the output's unit.
    """

    max_abs_err: float | None
    """None where nothing could be compared: a wrong shape or dtype, or values that are not finite."""
    err_budget: float
    """2 × the error of plain PyTorch in the same dtype + the rounding of the output dtype."""
    classic_ok: bool
    """The verdict of torch.allclose with rtol = atol = 1e-3, for comparison."""
    inputs: str
    """Distribution of the worst inputs: normal, outliers or large_logits."""
    rows_checked: int
    rows_total: int
    fault: str = ""
    """Why it is wrong; empty where it is right."""

    def __post_init__(self) -> None:
        if not _is_number(self.err_budget) or self.err_budget < 0:
            raise ValueError(f"err_budget must be a finite number ≥ 0, not {self.err_budget!r}")
        if self.max_abs_err is not None and not (_is_number(self.max_abs_err) and self.max_abs_err >= 0):
            raise ValueError(f"max_abs_err must be a finite number ≥ 0 or None, not {self.max_abs_err!r}")
        within = self.max_abs_err is not None and self.max_abs_err <= self.err_budget
        if not self.fault and not within:
            raise ValueError("an error beyond its budget needs a fault")

    @property
    def passed(self) -> bool:
        return not self.fault

    @property
    def severity(self) -> float:
        """Error over budget, infinite where nothing could be compared: what makes one check worse than another."""
        if self.max_abs_err is None:
            return math.inf
        if self.max_abs_err <= self.err_budget and self.fault:
            return math.inf
        return self.max_abs_err / self.err_budget if self.err_budget else float(self.max_abs_err > 0)


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What the machine was like while a case was timed. None where it cannot be read."""

    rounds: int
    """Rounds that were kept."""
    rounds_dropped: int = 0
    """Rounds thrown away, for all backends of the problem, because something disturbed them."""
    rounds_disturbed: int = 0
    """Rounds kept although something disturbed them, since too many had been dropped already."""
    causes: tuple[str, ...] = ()
    """What disturbed them, in words: other programs, steal, throttling."""
    load: float | None = None
    """Median share of the processors that other programs used during a round."""
    steal: float | None = None
    """Median share of the processors' time that a hypervisor gave to others."""
    temperature_c: float | None = None
    """Highest reading of the device."""

    def __post_init__(self) -> None:
        for name in ("rounds", "rounds_dropped", "rounds_disturbed"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} must be a whole number of at least 0, not {value!r}")
        for name in ("load", "steal", "temperature_c"):
            value = getattr(self, name)
            if value is not None and not _is_number(value):
                raise ValueError(f"{name} must be a number, not {value!r}")
        object.__setattr__(self, "causes", tuple(self.causes))
        if not all(isinstance(cause, str) for cause in self.causes):
            raise ValueError("causes must be text")


@dataclass(frozen=True)
class Round:
    """What one round gave of a backend's times in a block."""

    calls: int
    pace: float = 1.0
    """How slow the machine was, next to the middle one of the block's rounds, by all backends of the problem."""
    calls_a_sample: int = 1
    """How many calls each of its times is the mean of; the last one of what is left."""

    def __post_init__(self) -> None:
        for count in (self.calls, self.calls_a_sample):
            if type(count) is not int or count < 1:
                raise ValueError(f"a round must have a whole number of calls, not {count!r}")
        if not (_is_number(self.pace) and self.pace > 0):
            raise ValueError(f"a round's pace must be above 0, not {self.pace!r}")

    @property
    def samples(self) -> list[int]:
        """How many calls each of its times is of."""
        return sample_sizes(self.calls, self.calls_a_sample)


def sample_sizes(calls: int, calls_a_sample: int) -> list[int]:
    """So many calls in samples of that size, the last one of what is left."""
    return [min(calls_a_sample, calls - first) for first in range(0, calls, calls_a_sample)]


def round_medians(times_us: Sequence[float], samples: Sequence[int]) -> list[float]:
    """The median of each round of a block, which has so many samples."""
    ends = itertools.accumulate(samples)
    return [statistics.median(times_us[end - count : end]) for end, count in zip(ends, samples)]


def paced_median(times_us: Sequence[float], rounds: Sequence[Round]) -> float:
    """A block's time: the median over its rounds of their medians at the block's middle pace, on a logarithmic scale.

    The machine's pace in a round is taken from all backends, which had their turns side by side, so that what it did
    to all of them changes no ratio; of two backends the ratio of these is the median of the rounds' ratios.
    """
    medians = round_medians(times_us, [len(item.samples) for item in rounds])
    return stats.geometric_median([median / item.pace for median, item in zip(medians, rounds)])


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Raw times of one case in µs a call, grouped in blocks, and how they were taken.

    A time is a sample: of one call or, of a graph, the mean of the calls that were launched at once.
    """

    blocks: tuple[tuple[float, ...], ...]
    """One tuple a block (fresh processes, freshly prepared), in the order taken, its rounds one after the other."""
    rounds: tuple[tuple[Round, ...], ...] = ()
    """By block how many calls each round has, and the machine's pace in it; none where a block is one round of calls
    that were timed one by one."""
    statistic: Statistic
    """What `time_us` is: under `fixed` the mean of all calls, under `adaptive` the geometric mean over blocks of their
    paced medians."""
    timing_method: str
    """One of TIMING_METHODS, the same for all blocks."""
    cache: CacheState
    host_us: float
    """CPU time until an eager call returns, the device's queue not full."""
    clock_mhz: float | None = None
    """Median of the readings taken around the rounds; None where the device tells none."""
    conditions: Conditions | None = None
    """None for a run of a version that did not record them."""
    fallback: str = ""
    """Why it was not timed by the method that the device has for what can be; empty where it was."""

    def __post_init__(self) -> None:
        if not self.blocks or not all(self.blocks):
            raise ValueError("a measurement needs at least one block of at least one time")
        sizes = [sum(len(item.samples) for item in rounds) for rounds in self.rounds]
        if sizes and sizes != [len(block) for block in self.blocks]:
            raise ValueError("the samples of a block's rounds must be those of the block")
        for value in (*self.samples, self.host_us):
            if not (_is_number(value) and MIN_TIME_US <= value <= MAX_TIME_US):
                raise ValueError(f"a time must be a finite number of µs above 0, not {value!r}")
        if self.statistic not in get_args(Statistic):
            raise ValueError(f"statistic must be mean or median, not {self.statistic!r}")
        if self.cache not in CACHE_STATES:
            raise ValueError(f"cache must be hot or cold, not {self.cache!r}")
        if self.clock_mhz is not None and not (_is_number(self.clock_mhz) and self.clock_mhz > 0):
            raise ValueError(f"clock_mhz must be above 0, not {self.clock_mhz!r}")

    @functools.cached_property
    def samples(self) -> tuple[float, ...]:
        return tuple(value for block in self.blocks for value in block)

    @functools.cached_property
    def time_us(self) -> float:
        return self.mean_us if self.statistic == "mean" else self.median_us

    @functools.cached_property
    def mean_us(self) -> float:
        """Of all calls: a sample of several counts as often as it has calls."""
        return _weighted_mean(self.samples, [size for sizes in self._sizes for size in sizes])

    @functools.cached_property
    def median_us(self) -> float:
        """The geometric mean of the blocks' paced medians: the ratio of two is the mean of the blocks' log ratios."""
        return stats.geometric_mean(self._paced_medians)

    @functools.cached_property
    def block_times_us(self) -> tuple[float, ...]:
        if self.statistic == "mean":
            return tuple(map(_weighted_mean, self.blocks, self._sizes))
        return self._paced_medians

    @property
    def _rounds(self) -> Sequence[Sequence[Round]]:
        return self.rounds or [(Round(len(block)),) for block in self.blocks]

    @property
    def _sizes(self) -> list[list[int]]:
        """By block how many calls each of its samples is of."""
        return [[size for item in rounds for size in item.samples] for rounds in self._rounds]

    @functools.cached_property
    def _paced_medians(self) -> tuple[float, ...]:
        return tuple(paced_median(*pair) for pair in zip(self.blocks, self._rounds))

    @functools.cached_property
    def ci95_us(self) -> tuple[float, float] | None:
        """The 95% interval of `time_us`; its width comes from the blocks, whose calls are correlated within."""
        half = stats.half_width([math.log(value) for value in self.block_times_us])
        return None if half is None else stats.around(self.time_us, half)


def _weighted_mean(values: Sequence[float], weights: Sequence[int]) -> float:
    return math.fsum(value * weight for value, weight in zip(values, weights)) / sum(weights)


def speedup(baseline: Measurement, contender: Measurement) -> stats.Ratio:
    """baseline time over contender time, both taken by the same method, with the intervals of their paired blocks.

    Where one has more blocks, the first that both have count for the value too: what the machine was like in the others
    would be taken for a difference.
    """
    shared = min(len(baseline.blocks), len(contender.blocks))
    base, ours = _first_blocks(baseline, shared), _first_blocks(contender, shared)
    return stats.ratio_of_blocks(base.time_us / ours.time_us, base.block_times_us, ours.block_times_us)


def _first_blocks(measurement: Measurement, count: int) -> Measurement:
    if count == len(measurement.blocks):
        return measurement
    return dataclasses.replace(measurement, blocks=measurement.blocks[:count], rounds=measurement.rounds[:count])


@dataclass(frozen=True, kw_only=True)
class Result:
    """One problem on one backend: how it ended and, only where it PASSED, what was measured.

    Raises ValueError where the parts contradict each other, so that a number never stands beside a failure.
    """

    problem: Problem
    backend: str
    device: DeviceKind
    status: Status
    reason: str = ""
    check: Check | None = None
    measurement: Measurement | None = None
    """None too for a PASSED result of `attnbench check`, which times nothing."""
    used_cores: int | None = None
    """The device's cores that the backend says the problem occupies."""

    def __post_init__(self) -> None:
        passed = self.status is Status.PASSED
        if self.problem.dtype == "auto":
            raise ValueError("a result's problem needs a dtype, not auto")
        if self.device not in DEVICE_KINDS:
            raise ValueError(f"device must be one of {', '.join(DEVICE_KINDS)}, not {self.device!r}")
        if passed and (self.check is None or not self.check.passed):
            raise ValueError("a result is PASSED only by a check that passed")
        if passed == bool(self.reason):
            raise ValueError("a result has a reason exactly where it is not PASSED")
        if self.measurement is not None and not passed:
            raise ValueError(f"a {self.status} result has no measurement")
        if self.used_cores is not None and self.used_cores < 1:
            raise ValueError(f"used_cores must be at least 1, not {self.used_cores}")

    @property
    def key(self) -> tuple[str, str]:
        """(case_id, backend): unique within a run, which has one device."""
        return (self.problem.case_id, self.backend)

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        data["status"] = self.status.value
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Result:
        """The result that `to_json` wrote. Raises ValueError, KeyError or TypeError where it is none."""
        fields = dict(data)
        _require_types(fields, backend=str, reason=str, used_cores=int)
        fields["problem"] = Problem.from_json(fields["problem"])
        fields["status"] = Status(fields["status"])
        if fields.get("check") is not None:
            _require_types(fields["check"], classic_ok=bool, inputs=str, rows_checked=int, rows_total=int, fault=str)
            fields["check"] = Check(**fields["check"])
        if fields.get("measurement") is not None:
            timing = dict(fields["measurement"])
            _require_types(timing, statistic=str, timing_method=str, cache=str, fallback=str)
            timing["blocks"] = tuple(tuple(block) for block in timing["blocks"])
            timing["rounds"] = tuple(tuple(Round(**item) for item in block) for block in timing.get("rounds", ()))
            if timing.get("conditions") is not None:
                timing["conditions"] = Conditions(**timing["conditions"])
            fields["measurement"] = Measurement(**timing)
        return cls(**fields)


def _require_types(fields: Mapping[str, Any], **types: type) -> None:
    """Raise ValueError where a field is there and of another type; None stands for one that is not there."""
    for name, kind in types.items():
        value = fields.get(name)
        if value is None and kind is int:
            continue
        if name in fields and type(value) is not kind:
            raise ValueError(f"{name} must be {kind.__name__}, not {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
