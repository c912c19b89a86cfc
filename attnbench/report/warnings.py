"""Owns what a reader of a table is warned of, and which step would help. Knows rows and results, and no format."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from attnbench.result import Conditions
from attnbench.rows import Row
from attnbench.store import Record

NOISY_SHARE = 0.05
"""Half-width of a time's 95% interval, relative, from which on it is called noisy."""
FLAT_RATIO, FLAT_WORK = 1.25, 4.0
"""A time that grows by less than the first while work grows by the second or more is called flat."""


@dataclass(frozen=True)
class Noisy:
    """Times whose intervals are wide."""

    count: int
    worst: float
    kernel: str
    case: str

    def __str__(self) -> str:
        more = f", and {self.count - 1} more are wider than ±{NOISY_SHARE:.0%}" if self.count > 1 else ""
        return (
            f"noisy: {self.kernel} on {self.case} is known to ±{self.worst:.0%} only{more}: "
            "close other programs or try --protocol adaptive --budget 60"
        )


@dataclass(frozen=True)
class LaunchBound:
    """A backend whose time does not grow with its work."""

    kernel: str
    time_us: float
    work: float
    cases: tuple[str, str]

    def __str__(self) -> str:
        return (
            f"launch-bound? {self.kernel} stays at about {self.time_us:.1f} µs over {self.work:.0f}× more work "
            f"({self.cases[0]} to {self.cases[1]}): time larger problems, or look at the host's part of it"
        )


@dataclass(frozen=True)
class Disturbed:
    """Rounds that something else had a part in."""

    dropped: int
    kept: int
    rounds: int
    causes: tuple[str, ...]

    def __str__(self) -> str:
        what = f"{self.dropped} rounds were thrown away" if self.dropped else ""
        if self.kept:
            kept = f"{self.kept} of {self.rounds} rounds kept were disturbed too"
            what = f"{what}, and {kept}" if what else kept
        return f"disturbed: {what} ({', '.join(self.causes)}): close other programs, or run again when it is quiet"


@dataclass(frozen=True)
class Throttled:
    """A device that could not run at its speed."""

    causes: tuple[str, ...]

    def __str__(self) -> str:
        return f"throttled: {', '.join(self.causes)}: let the device cool, or lock its clocks below the limit"


@dataclass(frozen=True)
class HostBound:
    """Calls that the device waited for."""

    kernel: str
    count: int

    def __str__(self) -> str:
        return (
            f"host-bound: on {self.count} problems calling {self.kernel} took the host longer than running it took the "
            "device, so times hold launch gaps: time larger problems"
        )


@dataclass(frozen=True)
class OneBlock:
    """A run too short for intervals."""

    def __str__(self) -> str:
        return "one block gives no interval and no verdict: leave --iters out, or give at least 40"


Warning = Noisy | LaunchBound | Disturbed | Throttled | HostBound | OneBlock


def of(record: Record) -> list[Warning]:
    """All warnings of a run or CSV."""
    timed = [row for row in record.rows if row["time_us"] is not None]
    return [
        *_throttled_or_disturbed(_conditions(record)),
        *_noisy(timed),
        *_one_block(timed),
        *_launch_bound(timed),
        *_host_bound(timed),
    ]


def _conditions(record: Record) -> list[Conditions]:
    """Of every problem once: all its backends were timed in the same rounds."""
    found: dict[str, Conditions] = {}
    for result in record.results:
        if result.measurement is not None and result.measurement.conditions is not None:
            found.setdefault(result.problem.case_id, result.measurement.conditions)
    return list(found.values())


def _throttled_or_disturbed(conditions: Sequence[Conditions]) -> Iterator[Warning]:
    causes = tuple(dict.fromkeys(cause for c in conditions for cause in c.causes))
    if heat := tuple(cause for cause in causes if cause.startswith("throttling")):
        yield Throttled(heat)
    dropped, kept = sum(c.rounds_dropped for c in conditions), sum(c.rounds_disturbed for c in conditions)
    if dropped or kept:
        yield Disturbed(dropped, kept, sum(c.rounds for c in conditions), causes)


def _noisy(rows: Sequence[Row]) -> Iterator[Warning]:
    widths = [
        ((row["ci95_high_us"] / row["ci95_low_us"]) ** 0.5 - 1, row["kernel"], row["case_id"])
        for row in rows
        if row["ci95_low_us"] is not None and row["ci95_high_us"] is not None
    ]
    if wide := [item for item in widths if item[0] > NOISY_SHARE]:
        yield Noisy(len(wide), *max(wide))


def _one_block(rows: Sequence[Row]) -> Iterator[Warning]:
    if any(row["n_blocks"] == 1 for row in rows):
        yield OneBlock()


def _launch_bound(rows: Sequence[Row]) -> Iterator[Warning]:
    families: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        families.setdefault((row["kernel"], re.sub(r"-q\d+-k\d+", "", row["case_id"])), []).append(row)
    told = set()
    for (kernel, _), family in families.items():
        if kernel not in told and (flat := _flat(sorted(family, key=lambda row: int(row["flops_total"])))):
            told.add(kernel)
            yield flat


def _flat(rows: Sequence[Row]) -> LaunchBound | None:
    """The widest span of rising work over which the time hardly changes."""
    best: LaunchBound | None = None
    for index, small in enumerate(rows):
        for large in rows[index + 1 :]:
            work = large["flops_total"] / small["flops_total"]
            if (
                work >= FLAT_WORK
                and large["time_us"] < FLAT_RATIO * small["time_us"]
                and (not best or work > best.work)
            ):
                best = LaunchBound(small["kernel"], small["time_us"], work, (_lengths(small), _lengths(large)))
    return best


def _lengths(row: Mapping[str, object]) -> str:
    return f"{row['sq']}×{row['sk']}"


def _host_bound(rows: Sequence[Row]) -> Iterator[Warning]:
    counts: dict[str, int] = {}
    for row in rows:
        if row["timing_method"] not in (None, "host_clock") and (row["host_us"] or 0) > row["time_us"]:
            counts[row["kernel"]] = counts.get(row["kernel"], 0) + 1
    yield from (HostBound(kernel, count) for kernel, count in counts.items())
