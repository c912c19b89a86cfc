"""Owns how busy a machine is with other things than attnbench. Knows Linux's /proc, and no device."""

from __future__ import annotations

import os
from dataclasses import dataclass

from attnbench import processes


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the processors that this process may use have done since the machine started, in clock ticks (10 ms)."""

    processors: int
    total: int
    idle: int
    """Waiting for input and output included."""
    steal: int
    """What the hypervisor gave to other machines."""
    own: int
    """What attnbench used: this process, its descendants, and those of them that have ended and been waited for."""


@dataclass(frozen=True)
class Share:
    """Parts of those processors' time, 0 to 1."""

    processors: int
    others: float
    """Used by programs that are not attnbench's."""
    steal: float


def sample() -> Load | None:
    """The load up to now; None where there is no /proc."""
    try:
        lines = [line.split() for line in (processes.PROC / "stat").read_text().splitlines()]
        usable = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        ticks = [list(map(int, words[1:9])) for words in lines if words and words[0] in usable]
        user, nice, system, idle, iowait, irq, softirq, steal = map(sum, zip(*ticks))
    except (OSError, ValueError, AttributeError):  # no Linux
        return None
    total = user + nice + system + idle + iowait + irq + softirq + steal
    return Load(processors=len(ticks), total=total, idle=idle + iowait, steal=steal, own=_own_ticks())


def between(before: Load, after: Load) -> Share:
    """What went on between two samples.

    A tick's resolution and two accounts that differ by it make a tenth of a second on one processor wrong by a tenth;
    what comes out below 0 or above 1 is cut off there. Zeros where no tick has passed.
    """
    total = after.total - before.total
    if total <= 0:
        return Share(after.processors, 0.0, 0.0)
    steal = after.steal - before.steal
    # A descendant that has ended takes its time along only if nobody waited for it; attnbench's never runs backwards.
    own = max(0, after.own - before.own)
    others = total - (after.idle - before.idle) - steal - own
    return Share(after.processors, _clamped(others / total), _clamped(steal / total))


def _own_ticks() -> int:
    """The ticks of this process and all its descendants, with those of the children they have waited for.

    A child that ends between two samples moves from its own line to its parent's, so the sum goes on as if it lived.
    """
    me = os.getpid()
    lines = [processes.stat(me) or [], *processes.descendants(me).values()]
    return sum(int(ticks) for fields in lines for ticks in fields[processes.TICKS])


def _clamped(share: float) -> float:
    return min(1.0, max(0.0, share))
