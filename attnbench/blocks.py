"""Owns what one block gave, and how the blocks of a problem become measurements. Knows no file and no clock.

A block is the unit of evidence: fresh processes, freshly prepared, timed in interleaved rounds. Its calls are
correlated; blocks are not.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attnbench.problem import DeviceKind, Problem
from attnbench.result import (
    CacheState,
    Check,
    Conditions,
    Measurement,
    Result,
    Round,
    Statistic,
    Status,
    paced_median,
    round_medians,
)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the machine was like during one round; None where it cannot be read."""

    load: float | None = None
    steal: float | None = None
    clock_mhz: float | None = None
    temperature_c: float | None = None
    causes: tuple[str, ...] = ()
    """What disturbed the round, in words; empty where nothing did."""


@dataclass(frozen=True, kw_only=True)
class Lap:
    """What one backend gave in a block."""

    times_us: tuple[float, ...]
    """A sample each, in the order taken: of one call, or the mean of several that were launched at once."""
    calls: tuple[int, ...]
    """How many calls each round had; every lap of a block has the same rounds."""
    host_us: tuple[float, ...]
    """Empty where a call is over when it returns: its host time is its time."""
    timing_method: str
    calls_a_sample: tuple[int, ...] = ()
    """How many calls the samples of each round are of; empty where all are of one."""
    fallback: str = ""
    """Why the method is not the one that the device has for what can be timed by it; empty where it is."""

    @property
    def rounds(self) -> tuple[Round, ...]:
        """Its rounds, of whose pace a lap alone knows nothing."""
        sizes = self.calls_a_sample or (1,) * len(self.calls)
        return tuple(Round(calls, calls_a_sample=size) for calls, size in zip(self.calls, sizes))

    @property
    def samples(self) -> list[int]:
        """How many times each round gave."""
        return [len(item.samples) for item in self.rounds]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Lap:
        """The lap that a block's `to_json` wrote. Raises KeyError or TypeError where it is none."""
        sequences = {name: tuple(data[name]) for name in ("times_us", "calls", "host_us", "calls_a_sample")}
        return cls(**{**data, **sequences})


@dataclass(frozen=True, kw_only=True)
class Block:
    """All backends of one problem in one block."""

    laps: Mapping[str, Lap]
    """By backend."""
    seen: tuple[Seen, ...]
    """Of every round that was kept."""
    dropped: tuple[Seen, ...] = ()
    """Of every round that was thrown away."""
    spent_s: float
    """Seconds that its rounds took, dropped ones included."""

    def __post_init__(self) -> None:
        if any(len(lap.calls_a_sample) not in (0, len(lap.calls)) for lap in self.laps.values()):
            raise ValueError("a lap must say of every round how many calls its samples are of")
        if any(sum(lap.samples) != len(lap.times_us) for lap in self.laps.values()):
            raise ValueError("the samples of a lap's rounds must be its times")
        if len({len(lap.calls) for lap in self.laps.values()}) > 1:
            raise ValueError("all laps of a block must have the same rounds")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Block:
        """The block that `to_json` wrote. Raises ValueError, KeyError or TypeError where it is none."""
        return cls(
            laps={name: Lap.from_json(lap) for name, lap in data["laps"].items()},
            seen=tuple(_seen(item) for item in data["seen"]),
            dropped=tuple(_seen(item) for item in data["dropped"]),
            spent_s=float(data["spent_s"]),
        )

    def rounds(self, backend: str) -> tuple[Round, ...]:
        """How many calls each round has of one backend, and the machine's pace in it."""
        rounds = self.laps[backend].rounds
        return tuple(dataclasses.replace(item, pace=pace) for item, pace in zip(rounds, self._paces))

    def time_us(self, backend: str) -> float:
        """The paced median of one backend."""
        return paced_median(self.laps[backend].times_us, self.rounds(backend))

    @functools.cached_property
    def _paces(self) -> list[float]:
        """How slow the machine was in each round: the geometric mean of all backends' medians, the middle one being 1.

        Processors step between speeds within seconds, by a half and more on a shared host. Backends that took turns
        within tenths of a second saw the same of it, but for rounds in which it stepped; a median passes those over.
        """
        medians = zip(*(round_medians(lap.times_us, lap.samples) for lap in self.laps.values()))
        logs = [statistics.fmean(map(math.log, values)) for values in medians]
        middle = statistics.median(logs)
        return [math.exp(value - middle) for value in logs]


def _seen(data: Mapping[str, Any]) -> Seen:
    return Seen(**{**data, "causes": tuple(data["causes"])})


@dataclass(frozen=True)
class How:
    """How all blocks of a run are timed."""

    device: DeviceKind
    statistic: Statistic
    cache: CacheState


def measurement(blocks: Sequence[Block], backend: str, how: How) -> Measurement:
    """What `blocks`, at least one, say of one backend, which is in all of them."""
    laps = [block.laps[backend] for block in blocks]
    seen = [item for block in blocks for item in block.seen]
    dropped = [item for block in blocks for item in block.dropped]
    return Measurement(
        blocks=tuple(lap.times_us for lap in laps),
        rounds=tuple(block.rounds(backend) for block in blocks),
        statistic=how.statistic,
        timing_method=laps[0].timing_method,  # a lane that changed it has failed
        fallback=laps[0].fallback,
        cache=how.cache,
        host_us=round(statistics.median(value for lap in laps for value in lap.host_us or lap.times_us), 4),
        clock_mhz=_median(item.clock_mhz for item in seen),
        conditions=Conditions(
            rounds=len(seen),
            rounds_dropped=len(dropped),
            rounds_disturbed=sum(bool(item.causes) for item in seen),
            causes=tuple(dict.fromkeys(cause for item in (*dropped, *seen) for cause in item.causes)),
            load=_median(item.load for item in seen),
            steal=_median(item.steal for item in seen),
            temperature_c=max((item.temperature_c for item in seen if item.temperature_c is not None), default=None),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is known of a backend on a problem before it is timed."""

    check: Check
    used_cores: int | None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Verdict:
        return cls(check=Check(**data["check"]), used_cores=data["used_cores"])


@dataclass(kw_only=True)
class Progress:
    """How far a run is with one problem."""

    problem: Problem
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    """Of the backends that are being timed."""
    blocks: list[Block] = field(default_factory=list)
    """Each holds all of those."""
    results: dict[str, Result] = field(default_factory=dict)
    """Of the backends that are done."""

    def timed(self, how: How) -> list[Result]:
        """What the blocks, at least one, say so far of the backends that are being timed."""
        return [
            Result(
                problem=self.problem,
                backend=name,
                device=how.device,
                status=Status.PASSED,
                check=verdict.check,
                measurement=measurement(self.blocks, name, how),
                used_cores=verdict.used_cores,
            )
            for name, verdict in self.verdicts.items()
        ]


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 4) if known else None
