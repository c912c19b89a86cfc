"""Owns where the time of a run goes. Knows the names of its parts and nothing of what they do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

START, PREPARE, ORACLE, CHECK, TIMED = "start-up", "prepare and compile", "oracle", "check", "timed calls"
WAITING = "warm-up and waiting"
PARTS = (START, PREPARE, ORACLE, CHECK, TIMED, WAITING)


class Ledger:
    """Seconds by part; what is inside another part counts for the inner one alone."""

    def __init__(self) -> None:
        self._begun_s = time.monotonic()
        self._spent_s = dict.fromkeys(PARTS, 0.0)
        self._inner_s = 0.0

    @contextlib.contextmanager
    def spend(self, part: str) -> Iterator[None]:
        """Count what the block takes as `part`."""
        start_s, outer_s, self._inner_s = time.monotonic(), self._inner_s, 0.0
        try:
            yield
        finally:
            passed_s = time.monotonic() - start_s
            self._spent_s[part] += passed_s - self._inner_s
            self._inner_s = outer_s + passed_s

    def move(self, seconds: float, part: str, to: str) -> None:
        """Count seconds of `part` as `to`: what a worker says it spent on a question."""
        self._spent_s[part] -= seconds
        self._spent_s[to] += seconds

    @property
    def shares(self) -> dict[str, float]:
        """Seconds by part; what no part claims is `other`."""
        total_s = time.monotonic() - self._begun_s
        return {**self._spent_s, "other": max(0.0, total_s - sum(self._spent_s.values()))}

    def __str__(self) -> str:
        shares = self.shares
        total_s = sum(shares.values()) or 1.0
        parts = ", ".join(f"{name} {seconds / total_s:.0%}" for name, seconds in shares.items() if seconds > 0)
        return f"{total_s:.0f} s: {parts}"
