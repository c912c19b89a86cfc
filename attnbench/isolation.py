"""Owns worker processes: how they are started, asked, paused and killed, and what their ends mean. Knows no backend.

An IsolatedWorker has Worker's methods. Nothing that comes from the process is believed without a look: an answer must
have the form asked for, times must fit the wall clock here, and inputs and outputs are read from shared memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attnbench import keeper
from attnbench.environment import one_line
from attnbench.problem import Problem
from attnbench.registry import BackendInfo
from attnbench.result import Status
from attnbench.wire import VERSION, Channel, Closed, NoAnswer, Region, WireError
from attnbench.worker import CaseFailed

if TYPE_CHECKING:
    from torch import Tensor

    from attnbench.reference import Inputs

START_TIMEOUT_S = 120.0
"""For the interpreter, torch and the plugin to load; not counted as the case's time."""
GRACE_S = 1.0
"""The worker ends what it can interrupt by itself; after this much longer it is killed."""
END_TIMEOUT_S = 10.0
LAST_WORDS_S = 5.0
LEAST_CLAIM, CLAIM_SLACK_S = 0.5, 0.2
"""A worker's times must add up to this share of the wall time that passed here, but for the slack."""

# sys.path holds the current folder first, which must not stand in for an installed module.
_PROGRAM = """
import sys
sys.path[:] = [path for path in sys.path if path]
from attnbench.keeper import keep
keep(int(sys.argv[1]))
from attnbench.serve import serve
serve(int(sys.argv[2]))
"""


class IsolatedWorker:
    """One backend in a process of its own. Every method raises CaseFailed where the backend or its process fails."""

    def __init__(self, info: BackendInfo, timeout_s: float, python: str = sys.executable) -> None:
        """Start the process, without waiting for it. `timeout_s` bounds what it takes between two `begin`s."""
        self._info = info
        self._timeout_s = timeout_s
        self._python = python
        self._left_s = timeout_s
        self._region: Region | None = None
        self._paused = False
        self._claimed_s = self._passed_s = 0.0
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self._control, control = socket.socketpair()
        self._control.settimeout(END_TIMEOUT_S)
        with theirs, control:
            descriptors = [control.fileno(), theirs.fileno()]
            self._keeper = subprocess.Popen(
                [self._python, "-c", _PROGRAM, *map(str, descriptors)],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=descriptors,
                start_new_session=True,
            )
        self._channel: Channel | None = Channel(ours)
        self._ready = False
        self._paused = False
        with contextlib.suppress(WireError):  # it died already: the first question will say how
            backend = dataclasses.asdict(self._info)
            self._channel.send({"version": VERSION, "backend": backend, "timeout_s": self._timeout_s})

    def begin(self) -> None:
        """Start a phase; a process that ended in the last one is replaced."""
        if self._channel is None:
            self._start()
        self._left_s = self._timeout_s
        self._claimed_s = self._passed_s = 0.0
        self._ask("begin", lambda value: value is None)

    def unsupported(self, problem: Problem) -> str | None:
        reason: str | None = self._ask("unsupported", _is_reason, problem=problem.to_json())
        return reason

    def parallel_units(self, problem: Problem) -> int | None:
        units: int | None = self._ask("parallel_units", _is_units, problem=problem.to_json())
        return units

    def prepare(self, problem: Problem, inputs: Inputs) -> None:
        self.release()
        self._region = Region(problem)
        self._region.put(inputs)
        self._ask("prepare", _is_nothing, self._region.descriptor, problem=problem.to_json())

    def renew(self, inputs: Inputs) -> None:
        self._memory.put(inputs)
        self._ask("renew", _is_nothing)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        self._ask("inputs", _is_nothing)
        return self._memory.inputs

    def output(self) -> Tensor:
        """Call once; the output lies in shared memory until the next call."""
        # What the last call left there must not pass for this one's.
        self._memory.out.fill_(math.nan)
        if fault := self._ask("output", lambda value: isinstance(value, str)):
            raise CaseFailed(Status.INCORRECT, one_line(fault))
        return self._memory.out

    def warm_up(self, seconds: float) -> float:
        call_us: float = self._ask("warm_up", _is_time, seconds=seconds)
        return call_us

    def time_calls(self, count: int, *, cold: bool) -> list[float]:
        start_s = time.monotonic()
        times: list[float] = self._ask("time_calls", lambda value: _is_times(value, count), count=count, cold=cold)
        if self._info.device == "cpu" and not cold:  # elsewhere, and when flushing, other things take time too
            self._passed_s += time.monotonic() - start_s
            self._claimed_s += sum(times) / 1e6
            if self._claimed_s < LEAST_CLAIM * self._passed_s - CLAIM_SLACK_S:
                claim = f"its times add up to {self._claimed_s:.3f} s of the {self._passed_s:.3f} s that passed"
                raise CaseFailed(Status.TAMPERED, claim)
        return times

    def host_us(self, count: int) -> list[float]:
        times: list[float] = self._ask("host_us", lambda value: _is_times(value, count), count=count)
        return times

    def pause(self) -> None:
        """Stop the process until the next question, so that no thread of it takes a core from who is timed."""
        if self._channel is not None and not self._paused:
            self._order(keeper.STOP)
            self._paused = True

    def release(self) -> None:
        if self._region is not None:
            if self._channel is not None:
                with contextlib.suppress(CaseFailed):  # it will show at the next question
                    self._ask("release", _is_nothing)
            self._region.close()
            self._region = None

    def close(self) -> None:
        """End the process and all that it started."""
        if self._channel is not None:
            self._kill()
        if self._region is not None:
            self._region.close()
            self._region = None

    @property
    def _memory(self) -> Region:
        if self._region is None:
            raise RuntimeError("prepare() comes before any call")
        return self._region

    def _ask(self, do: str, fits: Callable[[Any], bool], descriptor: int | None = None, **arguments: Any) -> Any:
        """Send one question and wait for its answer; whatever else comes, or nothing, ends the process."""
        if self._channel is None:
            raise CaseFailed(Status.CRASHED, "its process has ended")
        if self._paused:
            self._order(keeper.CONTINUE)
            self._paused = False
        try:
            if not self._ready:
                self._take(self._channel, lambda value: value is None, START_TIMEOUT_S)
                self._ready = True
            start_s = time.monotonic()
            self._channel.send({"do": do, **arguments}, descriptor)
            try:
                return self._take(self._channel, fits, self._left_s + GRACE_S)
            finally:
                self._left_s = max(0.0, self._left_s - (time.monotonic() - start_s))
        except NoAnswer:
            self._kill()
            limit_s, where = (self._timeout_s, do) if self._ready else (START_TIMEOUT_S, "its start")
            raise CaseFailed(
                Status.TIMEOUT, f"the limit of {limit_s:g} s ran out at {where}, and its process was killed"
            ) from None
        except WireError as error:
            # Where it died by itself, its keeper is about to say how.
            how = (
                self._kill(LAST_WORDS_S if isinstance(error, Closed) else 0.0)
                or f"its answer to {do} cannot be read: {error}"
            )
            raise CaseFailed(Status.CRASHED, how) from error

    def _take(self, channel: Channel, fits: Callable[[Any], bool], timeout_s: float) -> Any:
        answer, _ = channel.receive(timeout_s)
        if set(answer) == {"value"} and fits(answer["value"]):
            return answer["value"]
        match answer.get("failed"):
            case [str(status), str(reason)] if len(answer) == 1 and status in _FAILURES and reason:
                raise CaseFailed(Status(status), one_line(reason))
        raise WireError("it is not what was asked for")

    def _order(self, order: bytes) -> None:
        """Have the keeper stop or continue the worker, and wait until it has."""
        with contextlib.suppress(OSError):  # the keeper is gone with its worker: the next question will show it
            self._control.sendall(order)
            self._control.recv(1)

    def _kill(self, wait_s: float = 0.0) -> str:
        """End the process and its descendants; returns how it ended by itself, if within `wait_s`, or an empty text."""
        assert self._channel is not None
        self._channel.close()
        self._channel = None
        how = ""
        try:
            how = _ending(self._keeper.wait(wait_s))
        except subprocess.TimeoutExpired:
            self._control.close()
            try:
                self._keeper.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._keeper.kill()
                self._keeper.wait()
        self._control.close()
        return how


_FAILURES = {status.value for status in Status if status is not Status.PASSED}


def _is_nothing(value: Any) -> bool:
    return value is None


def _is_reason(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_units(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)


def _is_times(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(map(_is_time, value))


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _ending(code: int) -> str:
    """How a process ended, in words."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"its process was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"its process ended with exit code {code}"
