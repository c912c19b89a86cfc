"""Owns what a reader of a table is warned of, and which step would help. Knows rows and results, and no format."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnbench.report.text import counted, share
from attnbench.result import CUDA_GRAPH, DEVICE_EVENTS, NPU_GRAPH, Conditions
from attnbench.rows import Row
from attnbench.store import Gaps, Record

NEXT_BUDGET_S = 60.0
NOISY_SHARE = 0.05
"""Half-width of a time's 95% interval, relative, from which on it is called noisy."""
FLAT_RATIO, FLAT_WORK = 1.25, 4.0
"""A time that changes by less than the first while work grows by the second or more is called flat."""
THROTTLING = "throttling"
"""How a cause that is the device's own begins."""


@dataclass(frozen=True)
class Noisy:
    """Times whose intervals are wide."""

    count: int
    worst: float
    kernel: str
    case: str
    adaptive: bool
    """Whether the run had a budget already."""
    budget_s: float
    """What to try next."""

    def __str__(self) -> str:
        protocol = "" if self.adaptive else "--protocol adaptive "
        more = f", and {self.count - 1} more are wider than ±{NOISY_SHARE:.0%}" if self.count > 1 else ""
        return (
            f"noisy: {self.kernel} on {self.case} is known to ±{share(self.worst, 0)} only{more}: "
            f"close other programs or try {protocol}--budget {self.budget_s:g}"
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
            f"({self.cases[0]} to {self.cases[1]}): unless more cores took the rest, time larger problems"
        )


@dataclass(frozen=True)
class Disturbed:
    """Rounds that something else had a part in."""

    dropped: int
    kept: int
    """Kept although they were disturbed."""
    rounds: int
    """All that were taken, the dropped ones too."""
    causes: tuple[str, ...]

    def __str__(self) -> str:
        rounds = f"of {self.rounds} rounds"
        what = f"{self.dropped} {rounds} were dropped" if self.dropped else f"{self.kept} {rounds} were kept disturbed"
        if self.dropped and self.kept:
            what += f" and {self.kept} kept disturbed"
        causes = ", ".join(self.causes) or "no cause was recorded"
        return f"disturbed: {what}: {causes}; close other programs, or run again when it is quiet"


@dataclass(frozen=True)
class Throttled:
    """A device that could not run at its speed."""

    causes: tuple[str, ...]
    problems: int
    of: int

    def __str__(self) -> str:
        where = f"on {self.problems} of {counted(self.of, 'problem')}"
        return f"throttled: {', '.join(self.causes)} {where}: let the device cool, or lock its clocks below the limit"


@dataclass(frozen=True)
class HostBound:
    """Calls that the device waited for."""

    kernel: str
    count: int

    def __str__(self) -> str:
        return (
            f"host-bound: on {counted(self.count, 'problem')} calling {self.kernel} took the host "
            "longer than running it took the device, so the queue could not be kept full and times hold launch gaps: "
            "time larger problems"
        )


@dataclass(frozen=True)
class TimedOtherwise:
    """Calls that could not be timed as the device times those that can."""

    kernel: str
    count: int
    why: str
    """Of the first; empty where the record does not tell."""

    def __str__(self) -> str:
        why = f" ({self.why})" if self.why else ""
        return (
            f"timed otherwise: {self.kernel} on {counted(self.count, 'problem')} by events around "
            f"eager calls{why}: these times may hold launch gaps, and no speedup is made of them and those of a graph"
        )


@dataclass(frozen=True)
class OneBlock:
    """A run too short for intervals."""

    def __str__(self) -> str:
        return "one block gives no interval and no verdict: leave --iters out or give at least 40, and let the run end"


@dataclass(frozen=True)
class Incomplete:
    """A run that was interrupted, or is not over yet."""

    gaps: Gaps

    def __str__(self) -> str:
        gaps = self.gaps
        missing = f"{gaps.missing} {'is' if gaps.missing == 1 else 'are'} missing"
        short = f"{gaps.short} {'has' if gaps.short == 1 else 'have'} fewer blocks than asked for"
        parts = [*([missing] if gaps.missing else []), *([short] if gaps.short else [])]
        return f"incomplete: of {counted(gaps.of, 'case')} {' and '.join(parts)}: attnbench run --resume RUN goes on"


Warning = Incomplete | Noisy | LaunchBound | Disturbed | Throttled | HostBound | TimedOtherwise | OneBlock


def of(record: Record) -> list[Warning]:
    """All warnings of a run or CSV."""
    timed = [row for row in record.rows if row["time_us"] is not None]
    return [
        *([Incomplete(record.gaps)] if record.gaps else []),
        *_throttled_or_disturbed(_conditions(record)),
        *_noisy(timed, *_next_budget(record.header)),
        *_one_block(timed),
        *_launch_bound(timed),
        *_host_bound(timed),
        *_timed_otherwise(record, timed),
    ]


def _conditions(record: Record) -> list[Conditions]:
    """Of every problem once: its backends were timed in the same rounds, but one that failed late in fewer."""
    found: dict[str, Conditions] = {}
    for result in record.results:
        if result.measurement is not None and (seen := result.measurement.conditions) is not None:
            before = found.get(result.problem.case_id)
            if before is None or seen.rounds > before.rounds:
                found[result.problem.case_id] = seen
    return list(found.values())


def _throttled_or_disturbed(conditions: Sequence[Conditions]) -> Iterator[Warning]:
    throttled = [c for c in conditions if any(cause.startswith(THROTTLING) for cause in c.causes)]
    if throttled:
        own = dict.fromkeys(cause for c in throttled for cause in c.causes if cause.startswith(THROTTLING))
        yield Throttled(tuple(own), len(throttled), len(conditions))
    # Where the device alone slowed itself, no other program is to be closed.
    others = [c for c in conditions if not c.causes or not all(cause.startswith(THROTTLING) for cause in c.causes)]
    dropped, kept = sum(c.rounds_dropped for c in others), sum(c.rounds_disturbed for c in others)
    if dropped or kept:
        causes = dict.fromkeys(cause for c in others for cause in c.causes if not cause.startswith(THROTTLING))
        yield Disturbed(dropped, kept, sum(c.rounds + c.rounds_dropped for c in conditions), tuple(causes))


def _next_budget(header: Mapping[str, Any]) -> tuple[bool, float]:
    """Whether the run was adaptive, and twice the seconds that it had then: no fewer than are worth a second try."""
    protocol = header.get("protocol")
    known = protocol if isinstance(protocol, dict) else {}
    adaptive = known.get("name") == "adaptive"
    had = known.get("budget_s") if adaptive else None
    return adaptive, max(NEXT_BUDGET_S, 2 * had) if isinstance(had, (int, float)) else NEXT_BUDGET_S


def _noisy(rows: Sequence[Row], adaptive: bool, budget_s: float) -> Iterator[Warning]:
    widths = [
        ((row["ci95_high_us"] / row["ci95_low_us"]) ** 0.5 - 1, row["kernel"], row["case_id"])
        for row in rows
        if row["ci95_low_us"] is not None and row["ci95_high_us"] is not None
    ]
    if wide := [item for item in widths if item[0] > NOISY_SHARE]:
        yield Noisy(len(wide), *max(wide), adaptive, budget_s)


def _one_block(rows: Sequence[Row]) -> Iterator[Warning]:
    if any(row["n_blocks"] == 1 for row in rows):
        yield OneBlock()


def _launch_bound(rows: Sequence[Row]) -> Iterator[Warning]:
    families: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        families.setdefault((row["kernel"], re.sub(r"-q\d+-k\d+", "", row["case_id"])), []).append(row)
    found: dict[str, LaunchBound] = {}
    for (kernel, _), family in families.items():
        flat = _flat(sorted(family, key=lambda row: int(row["flops_total"])))
        if flat and (kernel not in found or flat.work > found[kernel].work):
            found[kernel] = flat
    yield from found.values()


def _flat(rows: Sequence[Row]) -> LaunchBound | None:
    """The widest span of rising work over which the time hardly changes."""
    best: LaunchBound | None = None
    for index, small in enumerate(rows):
        for large in rows[index + 1 :]:
            work, change = large["flops_total"] / small["flops_total"], large["time_us"] / small["time_us"]
            flat = work >= FLAT_WORK and 1 / FLAT_RATIO < change < FLAT_RATIO
            if flat and (not best or work > best.work):
                best = LaunchBound(small["kernel"], small["time_us"], work, (_lengths(small), _lengths(large)))
    return best


def _lengths(row: Mapping[str, object]) -> str:
    return f"{row['sq']}×{row['sk']}"


def _host_bound(rows: Sequence[Row]) -> Iterator[Warning]:
    counts: dict[str, int] = {}
    for row in rows:
        if row["timing_method"] == DEVICE_EVENTS and (row["host_us"] or 0) > row["time_us"]:
            counts[row["kernel"]] = counts.get(row["kernel"], 0) + 1
    yield from (HostBound(kernel, count) for kernel, count in counts.items())


def _timed_otherwise(record: Record, rows: Sequence[Row]) -> Iterator[Warning]:
    mixed = any(row["timing_method"] in (CUDA_GRAPH, NPU_GRAPH) for row in rows)
    reasons = {r.key: r.measurement.fallback for r in record.results if r.measurement is not None}
    found: dict[str, list[str]] = {}
    for row in rows:
        why = reasons.get((row["case_id"], row["kernel"]), "")
        if why or (mixed and row["timing_method"] == DEVICE_EVENTS):
            found.setdefault(row["kernel"], []).append(why)
    yield from (TimedOtherwise(kernel, len(whys), whys[0]) for kernel, whys in found.items())
