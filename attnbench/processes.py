"""Owns what Linux's /proc says of processes: who descends from whom, and what each is doing. Knows no attnbench."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

PROC = Path("/proc")
STATE, PARENT, TICKS = 0, 1, slice(11, 15)
"""Places in what `stat` gives: a letter, a process id, and the clock ticks used by it and by children it waited for."""


def stat(pid: int) -> list[str] | None:
    """The fields of a process's line in /proc from its state on; None where it has ended, or there is no /proc."""
    with contextlib.suppress(OSError):
        text = _read(f"{PROC}/{pid}/stat")
        # The name before the state, in parentheses, may hold anything: spaces and parentheses too.
        return text.rpartition(")")[2].split()
    return None


def descendants(pid: int) -> dict[int, list[str]]:
    """`stat` of every process below `pid`, by process id; empty where there is no /proc.

    Dead ones (state Z) are among them: a process whose first thread has ended still has its children. One that forks
    or ends meanwhile may hide another; what stands still, or gives nothing, is all there is.
    """
    found: dict[int, list[str]] = {}
    children = _children if os.path.exists(f"{PROC}/{pid}/task/{pid}/children") else _children_by_search()
    front = list(children(pid))
    while front:
        known = ((child, stat(child)) for child in front if child not in found)
        alive = {child: fields for child, fields in known if fields is not None}
        found |= alive
        front = [grandchild for child in alive for grandchild in children(child)]
    return found


def _children(pid: int) -> Iterable[int]:
    """As Linux lists them, by thread that started them: a few files, where the whole of /proc takes milliseconds."""
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"{PROC}/{pid}/task"):
            with contextlib.suppress(OSError):
                yield from map(int, _read(f"{PROC}/{pid}/task/{thread}/children").split())


def _children_by_search() -> Callable[[int], Iterable[int]]:
    """The same by every process's parent, for kernels without those lists."""
    children: dict[int, list[int]] = {}
    with contextlib.suppress(OSError):
        for name in os.listdir(PROC):
            if name.isdigit() and (fields := stat(int(name))) is not None:
                children.setdefault(int(fields[PARENT]), []).append(int(name))
    return lambda pid: children.get(pid, [])


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
