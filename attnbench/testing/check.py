"""Owns running the conformance kit on a backend in a process of its own: one that dies or hangs fails one test."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from attnbench.child import LAST_WORDS_S, Child, ending
from attnbench.registry import BackendInfo
from attnbench.testing.conform import FAILED, PASSED, SKIPPED, every_test
from attnbench.text import one_line
from attnbench.wire import Closed, NoAnswer, WireError

START_TIMEOUT_S = 120.0
MOST_ENDS = 3
"""So many tests one after the other may end or hang the process; the rest would do the same, each for its time."""


@dataclass(frozen=True)
class Outcome:
    """How one test ended."""

    test: str
    dtype: str
    """Empty where the test is not for one."""
    outcome: str
    """passed, skipped or FAILED."""
    words: str = ""
    """The backend's reason for a skip, or what is wrong; one line."""
    trace: str = ""
    """The traceback of an exception that is not the kit's own."""


def check(info: BackendInfo, timeout_s: float) -> Iterator[Outcome]:
    """Run every test of the kit on a backend, each for at most `timeout_s` seconds, and tell how each ended."""
    process: _Process | None = None
    ends = 0
    try:
        for test, dtype in every_test():
            if ends == MOST_ENDS:
                yield Outcome(test, dtype, FAILED, f"not tried: the last {MOST_ENDS} tests ended its process")
                continue
            try:
                if process is None:
                    process = _Process(info)
                answer = process.run(test, dtype, timeout_s)
                ends = 0 if answer["outcome"] == PASSED else ends  # what is skipped was not tried
            except _Ended as end:
                ends += 1
                if process is not None:
                    process.close()
                    process = None
                answer = {"outcome": FAILED, "words": str(end), "trace": ""}
                if end.before_any_test:
                    yield Outcome(test, dtype, **answer)
                    return
            yield Outcome(test, dtype, **answer)
    finally:
        if process is not None:
            process.close()


def table(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """A row a test: its name, how it ended in which dtypes, and why where it was not passed."""
    rows = []
    for test, group in itertools.groupby(outcomes, key=lambda one: one.test):
        by_outcome: dict[str, list[str]] = {}
        words: list[str] = []
        for one in group:
            by_outcome.setdefault(one.outcome, []).append(one.dtype)
            words += [one.words] if one.outcome != PASSED else []
        how = [
            outcome if len(by_outcome) == 1 else f"{outcome} {', '.join(dtypes)}"
            for outcome, dtypes in by_outcome.items()
        ]
        rows.append([test.replace("_", " "), "; ".join(how), "; ".join(dict.fromkeys(words))])
    return rows


class _Ended(Exception):
    """The process did not answer; the message says how."""

    def __init__(self, how: str, *, before_any_test: bool = False) -> None:
        super().__init__(how)
        self.before_any_test = before_any_test


class _Process:
    def __init__(self, info: BackendInfo) -> None:
        try:
            self._child = Child(info.source.python or sys.executable, "testing.conform")
        except OSError as error:
            raise _Ended(f"its interpreter cannot be executed: {error.strerror}", before_any_test=True) from error
        with contextlib.suppress(WireError):  # it is gone: how is told where its answer is due
            self._child.channel.send({"backend": dataclasses.asdict(info)})
        try:
            answer = self._take(START_TIMEOUT_S)
        except _Ended as end:
            self.close()
            raise _Ended(str(end), before_any_test=True) from None
        if answer["outcome"] != PASSED:
            self.close()
            raise _Ended(answer["words"], before_any_test=True)

    def run(self, test: str, dtype: str, timeout_s: float) -> dict[str, str]:
        with contextlib.suppress(WireError):
            self._child.channel.send({"test": test, "dtype": dtype})
        return self._take(timeout_s)

    def _take(self, limit_s: float) -> dict[str, str]:
        """An answer of its form. Raises _Ended for anything else."""
        try:
            answer, descriptor = self._child.channel.receive(limit_s)
        except NoAnswer:
            raise _Ended(f"it took longer than {limit_s:g} s, and its process was killed") from None
        except Closed:
            code = self._child.exit_code(LAST_WORDS_S)
            how = "closed the connection" if code is None else ending(code)
            raise _Ended(f"its process ended: {how}") from None
        except WireError as error:
            raise _Ended(f"what its process answers cannot be read: {error}") from None
        if descriptor is not None:
            os.close(descriptor)
        return _outcome(answer)

    def close(self) -> None:
        self._child.close()


def _outcome(answer: dict[str, Any]) -> dict[str, str]:
    texts = all(isinstance(value, str) for value in answer.values())
    known = answer.get("outcome") in (PASSED, SKIPPED, FAILED)
    if set(answer) != {"outcome", "words", "trace"} or not texts or not known:
        raise _Ended("what its process answers is not what was asked for")
    return {**answer, "words": one_line(answer["words"])}
