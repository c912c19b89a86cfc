"""Owns how backends are timed side by side: warm-up, rounds, when to stop. Knows only lanes."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, cast, get_args
from typing import Protocol as TypingProtocol

from attnbench import stats
from attnbench.errors import AttnbenchError
from attnbench.result import CACHE_STATES, CacheState, Measurement, Statistic

Failure = TypeVar("Failure", bound=Exception)

ProtocolName = Literal["adaptive", "fixed"]
PROTOCOL_NAMES: tuple[ProtocolName, ...] = get_args(ProtocolName)

DEFAULT_WARMUP = 50
DEFAULT_ITERS = 200
DEFAULT_BUDGET_S = 10.0

FIXED_ROUNDS = 10
"""The timed iterations of `fixed` are dealt out over this many interleaved rounds."""
WARM_UP_S = 0.02
"""A lane warms up for this long before each of its blocks, and under `adaptive` also before its first."""
BLOCK_S = 0.05
"""`adaptive` times a backend for at least this long in a round…"""
MIN_CALLS = 3
MAX_CALLS = 1000
"""…with no fewer and no more calls than these."""
LOOKS = (5, 8, 12, 18)
"""`adaptive` looks at the intervals after this many blocks, and ends with the last."""
TARGET_HALF_WIDTH = 0.02
"""Relative half-width of every interval at which `adaptive` stops."""
HOST_CALLS = 5


class Lane(TypingProtocol):
    """One prepared backend, ready to be timed."""

    def warm_up(self, seconds: float) -> float:
        """Call, untimed, for at least that long; gives about how many µs a call takes."""
        ...

    def time_calls(self, count: int, *, cold: bool) -> list[float]:
        """Times in µs of `count` calls."""
        ...

    def host_us(self, count: int) -> list[float]:
        """CPU times in µs until each of `count` eager calls returns."""
        ...

    def pause(self) -> None:
        """Stop taking cores from the others until the next call."""
        ...


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How to time; the same for every backend of a run. Raises AttnbenchError where a count is out of range."""

    name: ProtocolName = "adaptive"
    warmup: int = DEFAULT_WARMUP
    """Untimed calls before `fixed` times any."""
    iters: int = DEFAULT_ITERS
    """Calls that `fixed` times."""
    cache: CacheState = "hot"
    budget_s: float = DEFAULT_BUDGET_S
    """Seconds of rounds, all backends together, after which `adaptive` starts no other round of a problem.

    It takes its first LOOKS[0] blocks whatever they cost.
    """

    def __post_init__(self) -> None:
        for name, least in (("warmup", 0), ("iters", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise AttnbenchError(f"--{name} must be a whole number of at least {least}, not {value}")
        if not 0 < self.budget_s < float("inf"):
            raise AttnbenchError(f"--budget must be a number of seconds above 0, not {self.budget_s:g}")

    @property
    def statistic(self) -> Statistic:
        return "mean" if self.name == "fixed" else "median"


def make_protocol(
    name: str | None = None,
    warmup: int | None = None,
    iters: int | None = None,
    cache: str = "hot",
    budget_s: float | None = None,
) -> Protocol:
    """The protocol asked for. A count alone asks for `fixed`, which counts are for.

    Raises AttnbenchError for a name, count or budget that is none, or that belongs to the other protocol.
    """
    counts = {key: value for key, value in (("warmup", warmup), ("iters", iters)) if value is not None}
    if name is None:
        name = "fixed" if counts else "adaptive"
    if name == "adaptive" and counts:
        raise AttnbenchError(f"--{next(iter(counts))} belongs to --protocol fixed", "adaptive decides by itself")
    if name == "fixed" and budget_s is not None:
        raise AttnbenchError("--budget belongs to --protocol adaptive", "fixed takes --warmup and --iters")
    _require_choice("protocol", name, PROTOCOL_NAMES)
    _require_choice("cache", cache, CACHE_STATES)
    return Protocol(
        name=cast(ProtocolName, name),
        cache=cast(CacheState, cache),
        budget_s=DEFAULT_BUDGET_S if budget_s is None else budget_s,
        **counts,
    )


def _require_choice(what: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise AttnbenchError(f"no {what} is called {value!r}", f"choose {' or '.join(choices)}")


@dataclass
class _Record:
    """What was taken of one lane so far."""

    calls: Sequence[int]
    """How many calls each block times; the last count holds for all further blocks."""
    blocks: list[tuple[float, ...]]
    host: list[float]

    def next_count(self) -> int:
        return self.calls[min(len(self.blocks), len(self.calls) - 1)]


def measure(
    lanes: Mapping[str, Lane],
    protocol: Protocol,
    *,
    seed: int,
    timing_method: str,
    clock_mhz: Callable[[], float | None],
    expected: type[Failure],
    failed: Callable[[str, Failure], None],
) -> dict[str, Measurement]:
    """Time all lanes of a problem in interleaved rounds, in another random order each round.

    A lane that raises `expected` is reported to `failed`, dropped, and the rest go on. Returns a measurement for every
    lane that lasted; all have the same number of blocks.
    """
    order = random.Random(seed)
    records: dict[str, _Record] = {}
    clocks: list[float] = []

    def each(names: list[str], step: Callable[[str], None]) -> None:
        for name in names:
            try:
                step(name)
            except expected as error:
                records.pop(name, None)
                failed(name, error)

    def warm_up(name: str) -> None:
        records[name] = _Record(_warm_up(lanes[name], protocol), [], lanes[name].host_us(HOST_CALLS))
        lanes[name].pause()

    def take(name: str) -> None:
        lanes[name].warm_up(WARM_UP_S)  # the others ran since: caches, clocks and threads must come back first
        block = lanes[name].time_calls(records[name].next_count(), cold=protocol.cache == "cold")
        records[name].blocks.append(tuple(round(value, 4) for value in block))
        lanes[name].pause()

    each(list(lanes), warm_up)
    start = time.monotonic()
    done = 0
    while records and not _enough(protocol, [r.blocks for r in records.values()], done, time.monotonic() - start):
        names = list(records)
        order.shuffle(names)
        each(names, take)
        done += 1
        if (clock := clock_mhz()) is not None:
            clocks.append(clock)
    return {
        name: Measurement(
            blocks=tuple(record.blocks),
            statistic=protocol.statistic,
            timing_method=timing_method,
            cache=protocol.cache,
            host_us=round(statistics.median(record.host), 4),
            clock_mhz=round(statistics.median(clocks), 1) if clocks else None,
        )
        for name, record in records.items()
    }


def _warm_up(lane: Lane, protocol: Protocol) -> Sequence[int]:
    """Warm up one lane, and say how many calls its blocks shall time."""
    if protocol.name == "fixed":
        if protocol.warmup:
            lane.time_calls(protocol.warmup, cold=False)
        rounds = min(FIXED_ROUNDS, protocol.iters)
        return [protocol.iters // rounds + (index < protocol.iters % rounds) for index in range(rounds)]
    call_s = lane.warm_up(WARM_UP_S) / 1e6
    if protocol.cache == "cold":  # the flush before a call takes longer than most calls
        start_s = time.monotonic()
        lane.time_calls(1, cold=True)
        call_s = max(call_s, time.monotonic() - start_s)
    return [round(min(max(BLOCK_S / call_s, MIN_CALLS), MAX_CALLS))]


def _enough(protocol: Protocol, lanes: Sequence[Sequence[Sequence[float]]], done: int, elapsed_s: float) -> bool:
    if protocol.name == "fixed":
        return done == min(FIXED_ROUNDS, protocol.iters)
    if done < LOOKS[0]:
        return False
    if done >= LOOKS[-1] or elapsed_s >= protocol.budget_s:
        return True
    return done in LOOKS and all(_narrow([statistics.median(block) for block in blocks]) for blocks in lanes)


def _narrow(block_times_us: Sequence[float]) -> bool:
    half = stats.half_width(block_times_us)
    return half is not None and half <= TARGET_HALF_WIDTH * statistics.fmean(block_times_us)
