"""Owns how backends are timed side by side: rounds, what disturbs one, when to stop. Knows only lanes."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, cast, get_args
from typing import Protocol as TypingProtocol

from attnbench import stats
from attnbench.blocks import Block, Lap, Seen
from attnbench.devices import Timing
from attnbench.errors import AttnbenchError
from attnbench.result import CACHE_STATES, CacheState, Statistic

Failure = TypeVar("Failure", bound=Exception)

ProtocolName = Literal["adaptive", "fixed"]
PROTOCOL_NAMES: tuple[ProtocolName, ...] = get_args(ProtocolName)

DEFAULT_WARMUP = 50
DEFAULT_ITERS = 200
DEFAULT_BUDGET_S = 20.0

ROUNDS, FIXED_ROUNDS = 8, 3
"""Interleaved rounds of a block, under `adaptive` and of the fewer calls under `fixed`."""
WARM_UP_S = 0.02
"""A lane warms up for this long before each of its rounds: the others ran since."""
ROUND_S = 0.1
"""`adaptive` times a backend for this long in a round…"""
MIN_CALLS = 2
MAX_CALLS = 10_000
"""…with no fewer and no more calls than these: calls of 5 µs still make 50 ms."""
MOST_CALLS = 1_000_000
"""What can be asked for in a run: every time of it is kept."""
MAX_DROPS = 3
"""Rounds of a block that may be thrown away; further disturbed ones are kept and counted."""
LOOKS = (5, 8, 12, 18)
"""`adaptive` looks at the intervals after this many blocks, and ends with the last."""
FIXED_BLOCKS, FIXED_CALLS = 5, 20
"""`fixed` deals its timed iterations out over so many blocks of at least so many."""
TARGET_HALF_WIDTH = 0.0125
"""Half-width of the 95% interval of every ratio, relative, at which `adaptive` stops.

With 5 to 18 blocks a true difference of 3% is then more than a verdict's 99% half-width and 1.28 standard errors, so it
is called one in nine of ten runs; a little is taken off for stopping where the spread happens to look small.
"""
HOST_CALLS = 5
"""Eager calls whose CPU time is taken in a block; no more than a round has, where calls take long."""


class Lane(TypingProtocol):
    """One prepared backend, ready to be timed."""

    def warm_up(self, seconds: float) -> float:
        """Call, untimed, for at least that long; gives about how many µs a call takes."""
        ...

    def time_calls(self, count: int, *, cold: bool) -> Timing:
        """How long `count` calls took, always by the same method."""
        ...

    def host_us(self, count: int) -> list[float]:
        """CPU times in µs until each of `count` eager calls returns; none where that is all of a call's time."""
        ...

    def pause(self) -> None:
        """Stop taking cores from the others until the next call."""
        ...


class Watch(TypingProtocol):
    """Who sees what the machine is like."""

    def start(self) -> None:
        """A round begins."""
        ...

    def stop(self) -> Seen:
        """It is over; what was seen of it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How to time; the same for every backend of a run. Raises AttnbenchError where a count is out of range."""

    name: ProtocolName = "adaptive"
    warmup: int = DEFAULT_WARMUP
    """Untimed calls before each block of `fixed`."""
    iters: int = DEFAULT_ITERS
    """Calls that `fixed` times."""
    cache: CacheState = "hot"
    budget_s: float = DEFAULT_BUDGET_S
    """Seconds of rounds, all backends together, after which `adaptive` starts no other block of a problem.

    It takes its first LOOKS[0] blocks whatever they cost, with fewer rounds where they would cost more than this.
    """

    def __post_init__(self) -> None:
        for name, least in (("warmup", 0), ("iters", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST_CALLS:
                raise AttnbenchError(f"--{name} must be a whole number from {least} to {MOST_CALLS:,}, not {value}")
        if not 0 < self.budget_s < float("inf"):
            raise AttnbenchError(f"--budget must be a number of seconds above 0, not {self.budget_s:g}")

    @property
    def statistic(self) -> Statistic:
        return "mean" if self.name == "fixed" else "median"

    @property
    def fixed_counts(self) -> list[int]:
        """Timed iterations of each block of `fixed`."""
        return _deal(self.iters, min(max(self.iters // FIXED_CALLS, 1), FIXED_BLOCKS))

    @property
    def most_blocks(self) -> int:
        return len(self.fixed_counts) if self.name == "fixed" else LOOKS[-1]

    def enough(self, blocks: Sequence[Block], baseline: str | None) -> bool:
        """Whether a problem needs no further block: by its count, its budget, or the width of its intervals.

        Ratios are to `baseline`, or to the fastest backend where it is not there. Significance never stops.
        """
        count = len(blocks)
        if count >= self.most_blocks:
            return True
        if self.name == "fixed" or count < LOOKS[0]:
            return False
        if sum(block.spent_s for block in blocks) >= self.budget_s:
            return True
        return count in LOOKS and all(map(_narrow, _log_ratios(blocks, baseline)))


def _deal(total: int, parts: int) -> list[int]:
    return [total // parts + (index < total % parts) for index in range(parts)]


def _log_ratios(blocks: Sequence[Block], baseline: str | None) -> list[list[float]]:
    """By contender the log ratios of the blocks' times to the baseline's; of one backend alone, its log times."""
    names = [name for name in blocks[0].laps if all(name in block.laps for block in blocks)]
    logs = {name: [math.log(block.time_us(name)) for block in blocks] for name in names}
    if len(names) < 2:
        return list(logs.values())
    base = baseline if baseline in logs else min(names, key=lambda name: sum(logs[name]))
    return [[ours - theirs for ours, theirs in zip(logs[name], logs[base])] for name in names if name != base]


def _narrow(logs: Sequence[float]) -> bool:
    half = stats.half_width(logs)
    return half is not None and half <= TARGET_HALF_WIDTH


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


def take_block(
    lanes: Mapping[str, Lane],
    protocol: Protocol,
    index: int,
    *,
    seed: int,
    watch: Watch,
    expected: type[Failure],
    failed: Callable[[str, Failure], None],
    known_us: Mapping[str, float] | None = None,
) -> Block | None:
    """Time all lanes of a problem in block `index`: in interleaved rounds, in another random order each.

    `known_us` is how long a call of a lane took in an earlier block: it need not be tried how many fit into a round.

    A round that was disturbed is thrown away for all lanes and taken again. A lane that raises `expected` is reported
    to `failed`, dropped, and the rest go on; None where none lasted.
    """
    order = random.Random(seed)
    calls: dict[str, list[int]] = {}
    host: dict[str, tuple[float, ...]] = {}
    rounds: dict[str, list[Timing]] = {}
    """By lane."""

    def each(names: list[str], step: Callable[[str], None]) -> None:
        for name in names:
            try:
                step(name)
            except expected as error:
                calls.pop(name, None)
                failed(name, error)
                lanes[name].pause()

    def warm_up(name: str) -> None:
        found = _calls(lanes[name], protocol, index, (known_us or {}).get(name))
        host[name] = tuple(round(value, 4) for value in lanes[name].host_us(min(found[0], HOST_CALLS)))
        calls[name] = found
        rounds[name] = []
        lanes[name].pause()

    each(list(lanes), warm_up)
    start_s = time.monotonic()
    kept: list[Seen] = []
    dropped: list[Seen] = []
    while calls and len(kept) < len(next(iter(calls.values()))):
        taken: dict[str, Timing] = {}

        def take(name: str) -> None:
            lanes[name].warm_up(WARM_UP_S)  # caches, clocks and threads must come back first
            found = lanes[name].time_calls(calls[name][len(kept)], cold=protocol.cache == "cold")
            taken[name] = dataclasses.replace(found, times_us=[round(us, 4) for us in found.times_us])  # noqa: B023
            lanes[name].pause()

        names = list(calls)
        order.shuffle(names)
        watch.start()
        each(names, take)
        seen = watch.stop()
        if seen.causes and len(dropped) < MAX_DROPS and not _costly(protocol, time.monotonic() - start_s):
            dropped.append(seen)
            continue
        kept.append(seen)
        for name in taken:
            rounds[name].append(taken[name])
        if _costly(protocol, time.monotonic() - start_s):
            break
    if not calls:
        return None
    laps = {name: _lap(rounds[name], calls[name], host[name]) for name in lanes if name in calls}
    return Block(laps=laps, seen=tuple(kept), dropped=tuple(dropped), spent_s=round(time.monotonic() - start_s, 3))


def _lap(rounds: Sequence[Timing], calls: Sequence[int], host_us: tuple[float, ...]) -> Lap:
    """`calls` may tell of more rounds than there was time for."""
    sizes = tuple(timing.calls_a_sample for timing in rounds)
    return Lap(
        times_us=tuple(value for timing in rounds for value in timing.times_us),
        calls=tuple(calls[: len(rounds)]),
        host_us=host_us,
        timing_method=rounds[0].method,
        calls_a_sample=sizes if set(sizes) != {1} else (),
        fallback=rounds[0].fallback,
    )


def _costly(protocol: Protocol, spent_s: float) -> bool:
    """Whether a block has taken its share of the budget, so that no other round of it should begin."""
    return protocol.name == "adaptive" and spent_s >= protocol.budget_s / LOOKS[0]


def _calls(lane: Lane, protocol: Protocol, index: int, known_us: float | None) -> list[int]:
    """How many calls a round shall time, after a warm-up; what is known under `adaptive` is warmed up by its rounds."""
    if protocol.name == "fixed":
        for count in _deal(protocol.warmup, -(-protocol.warmup // MAX_CALLS)):
            lane.time_calls(count, cold=False)
        count = protocol.fixed_counts[index]
        return _deal(count, min(FIXED_ROUNDS, count))
    call_s = (known_us or lane.warm_up(WARM_UP_S)) / 1e6
    if protocol.cache == "cold":  # the flush before a call takes longer than most calls
        start_s = time.monotonic()
        lane.time_calls(1, cold=True)
        call_s = max(call_s, time.monotonic() - start_s)
    return [round(min(max(ROUND_S / call_s, MIN_CALLS), MAX_CALLS))] * ROUNDS
