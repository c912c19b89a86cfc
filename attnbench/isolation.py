"""Owns worker processes: how they are started, asked, paused and killed, and what their ends mean. Knows no backend.

An IsolatedWorker has Worker's methods. Nothing that comes from the process is believed without a look: an answer must
have the form asked for, times must fit the wall clock here, and inputs and outputs are read from shared memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from attnbench import contention, keeper
from attnbench.child import LAST_WORDS_S, Child, ending
from attnbench.devices import MOST_CALLS_A_CHANGE, Timing
from attnbench.environment import one_line
from attnbench.problem import DeviceKind, Problem
from attnbench.registry import BackendInfo
from attnbench.result import CUDA_GRAPH, DEVICE_EVENTS, HOST_CLOCK, MAX_TIME_US, NPU_GRAPH, Status, sample_sizes
from attnbench.wire import VERSION, Channel, Closed, NoAnswer, Region, WireError
from attnbench.worker import CaseFailed, Timed

if TYPE_CHECKING:
    from torch import Tensor

    from attnbench.reference import Inputs

START_TIMEOUT_S = 120.0
"""For the interpreter, torch and the plugin to load; not counted as the case's time."""
GRACE_S = 1.0
"""The worker ends what it can interrupt by itself; after this much longer it is killed."""
LEAST_CLOCK, LEAST_CLAIM = 0.8, 0.5
"""A worker's clock must have seen this share of the wall time that passed here, and its calls that share…"""
BETWEEN_CALLS_S, FILL_BYTES_S, CLOCK_SLACK_S = 1e-4, 2e9, 0.1
"""…but for what lies between calls (changed inputs take 15 to 50 µs, more after calls of milliseconds, which empty the
caches; NaN goes into outputs at 5 GB/s or more), and for a processor that is busy elsewhere."""


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
        self._clock = _WallClock()
        self._refused: CaseFailed | None = None
        self._unruly: CaseFailed | None = None
        """How the process ended where it was to be stopped, until somebody is told."""
        self._start()

    def _start(self) -> None:
        self._ready = False
        try:
            self._child: Child | None = Child(self._python, "serve")
        except OSError as error:
            self._child = None
            reason = f"its process cannot be started: {error.strerror or error}"
            self._refused = CaseFailed(Status.UNAVAILABLE, reason)
            return
        self._paused = False
        with contextlib.suppress(WireError):  # it died already: the first question will say how
            backend = dataclasses.asdict(self._info)
            self._child.channel.send({"version": VERSION, "backend": backend, "timeout_s": self._timeout_s})

    def ready(self) -> None:
        """Wait until the process has started; how that failed, if it did, the next `begin` says."""
        with contextlib.suppress(CaseFailed):
            self.begin()

    def begin(self) -> None:
        """Start a phase; a process that ended in the last one is replaced."""
        if self._refused is not None:
            raise self._refused
        if self._unruly is not None:
            failure, self._unruly = self._unruly, None
            raise failure
        if self._child is None:
            self._start()
            if self._refused is not None:
                raise self._refused
        self._left_s = self._timeout_s
        self._clock = _WallClock()
        self._ask("begin", _is_nothing)

    def unsupported(self, problem: Problem) -> str | None:
        reason: str | None = self._ask("unsupported", _is_reason, problem=problem.to_json())
        return reason

    def parallel_units(self, problem: Problem) -> int | None:
        units: int | None = self._ask("parallel_units", _is_units, problem=problem.to_json())
        return units

    def prepare(self, problem: Problem, inputs: Inputs) -> None:
        self.release()
        try:
            self._region = Region(problem)
        except OSError as error:
            reason = f"the memory shared with its process cannot be had: {error.strerror or error}"
            raise CaseFailed(Status.SKIPPED, reason) from error
        self._region.put(inputs)
        self._ask("prepare", _is_nothing, self._region.descriptor, problem=problem.to_json())

    def prepare_twin(self, problem: Problem, inputs: Inputs) -> None:
        self._memory.put(inputs)
        self._ask("prepare_twin", _is_nothing)

    def release_twin(self) -> None:
        self._ask("release_twin", _is_nothing)

    def renew(self, inputs: Inputs) -> None:
        self._memory.put(inputs)
        self._ask("renew", _is_nothing)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        self._ask("inputs", _is_nothing)
        return self._memory.inputs

    def output(self, *, twin: bool = False) -> Tensor:
        """Call once; the output lies in shared memory until the next question."""
        place = self._memory.outputs[0]
        place.fill_(math.nan)  # what the last call left there must not pass for this one's
        if fault := self._ask("output", lambda value: isinstance(value, str), twin=twin):
            raise CaseFailed(Status.INCORRECT, one_line(fault))
        return place

    def warm_up(self, seconds: float, seed: int) -> float:
        call_us: float = self._ask("warm_up", _is_time, seconds=seconds, seed=seed)
        return call_us

    def time_calls(self, count: int, *, cold: bool, seed: int, look_at: Sequence[int]) -> Timed:
        places = self._memory.outputs[: len(look_at)]
        for place in places:
            place.fill_(math.nan)
        start_s = time.monotonic()
        how: dict[str, Any] = {"count": count, "cold": cold, "seed": seed, "look_at": list(look_at)}
        answer = self._ask("time_calls", lambda value: _is_timed(value, count, self._info.device), **how)
        passed_s = time.monotonic() - start_s
        timing = Timing(**answer["timing"])
        timed = Timed(timing, answer["elapsed_s"], [place.clone() for place in places])
        between_s = count * (BETWEEN_CALLS_S + self._memory.outputs[0].nbytes / FILL_BYTES_S)
        if cold or self._info.device != "cpu":  # flushing, or the device itself, takes time too
            between_s = math.inf
        self._clock.compare(timed, timing.total_us(count) / 1e6, passed_s, between_s)
        return timed

    def host_us(self, count: int) -> list[float]:
        times: list[float] = self._ask("host_us", lambda value: _is_times(value, count), count=count)
        return times

    def pause(self) -> None:
        """Stop the process until the next question, so that no thread of it takes a core from who is timed."""
        if self._child is not None and not self._paused:
            self._paused = True
            if not self._child.order(keeper.STOP):
                # Nothing may run beside who is timed next. Where the process died by itself its keeper says how.
                how = self._kill(LAST_WORDS_S) or "its process could not be stopped while others are timed"
                self._unruly = CaseFailed(Status.CRASHED, how)

    def release(self) -> None:
        if self._region is not None:
            if self._child is not None:
                with contextlib.suppress(CaseFailed):  # it will show at the next question
                    self._ask("release", _is_nothing)
            self._region.close()
            self._region = None

    def close(self) -> None:
        """End the process and all that it started."""
        if self._child is not None:
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
        if self._child is None:
            failure, self._unruly = self._unruly, None
            raise failure or CaseFailed(Status.CRASHED, "its process has ended")
        if self._paused:
            self._child.order(keeper.CONTINUE)
            self._paused = False
        try:
            if not self._ready:
                try:
                    self._take(self._child.channel, _is_nothing, START_TIMEOUT_S)
                except CaseFailed as failure:
                    self._refused = failure
                    self._kill()
                    raise
                self._ready = True
            start_s = time.monotonic()
            self._child.channel.send({"do": do, **arguments}, descriptor)
            try:
                return self._take(self._child.channel, fits, self._left_s + GRACE_S)
            finally:
                self._left_s = max(0.0, self._left_s - (time.monotonic() - start_s))
        except CaseFailed as failure:
            if failure.status is Status.TIMEOUT and self._child is not None:
                self._kill()  # what it was doing may go on in threads; the next case gets a fresh one
            raise
        except NoAnswer:
            self._kill()
            limit_s, where = (self._timeout_s, do) if self._ready else (START_TIMEOUT_S, "its start")
            words = f"the limit of {limit_s:g} s ran out at {where}, and its process was killed"
            raise self._ended(Status.TIMEOUT, words) from None
        except WireError as error:
            # Where it died by itself, its keeper is about to say how.
            how = (
                self._kill(LAST_WORDS_S if isinstance(error, Closed) else 0.0)
                or f"its answer to {do} cannot be read: {error}"
            )
            raise self._ended(Status.CRASHED, how) from error

    def _ended(self, status: Status, reason: str) -> CaseFailed:
        failure = CaseFailed(status, reason)
        if not self._ready:  # it would fail again
            self._refused = failure
        return failure

    def _take(self, channel: Channel, fits: Callable[[Any], bool], timeout_s: float) -> Any:
        answer, descriptor = channel.receive(timeout_s)
        if descriptor is not None:  # nobody asked for one
            os.close(descriptor)
        if set(answer) == {"value"} and fits(answer["value"]):
            return answer["value"]
        match answer.get("failed"):
            case [str(status), str(reason)] if len(answer) == 1 and status in _FAILURES and reason:
                raise CaseFailed(Status(status), one_line(reason))
        raise WireError("it is not what was asked for")

    def _kill(self, wait_s: float = 0.0) -> str:
        """End the process and its descendants; returns how it ended by itself, if within `wait_s`, or an empty text."""
        assert self._child is not None
        code = self._child.exit_code(wait_s)
        self._child.close()
        # Later on, what it wrote last may be old and about something else.
        words = "" if self._ready else self._child.last_words()
        self._child = None
        if code is None:
            return ""
        if code >= 0:
            return f"its process ended with {ending(code)}{words}"
        return f"its process was {ending(code)}" + (" (out of memory?)" if -code == signal.SIGKILL else "") + words


class _WallClock:
    """The time that passed here, against what a worker says of it, summed over a phase."""

    def __init__(self) -> None:
        self._passed_s = self._elapsed_s = self._timed_s = self._between_s = 0.0
        self._before = contention.sample()

    def compare(self, timed: Timed, timed_s: float, passed_s: float, between_s: float) -> None:
        """Raise CaseFailed where the worker's clock and this one disagree, or its calls do not fill its time.

        `timed_s` is what all calls took, `between_s` the most that may have passed between them.
        """
        self._passed_s += passed_s
        self._elapsed_s += timed.elapsed_s
        self._timed_s += timed_s
        self._between_s += between_s
        passed = f"{self._passed_s:.3f} s"
        for seen_s, least_s, claim in (
            (
                self._elapsed_s,
                LEAST_CLOCK * self._passed_s - CLOCK_SLACK_S,
                f"by its clock {self._elapsed_s:.3f} s went by while {passed} passed",
            ),
            (
                self._timed_s,
                LEAST_CLAIM * self._passed_s - self._between_s - CLOCK_SLACK_S,
                f"its times add up to {self._timed_s:.3f} s of the {passed} that passed",
            ),
        ):
            if seen_s < least_s and seen_s < least_s - self._taken_s():
                raise CaseFailed(Status.TAMPERED, claim)

    def _taken_s(self) -> float:
        """The most that a process has waited for a processor because of others, in the time that is compared.

        From what the kernel says of all processes since the phase began: a worker's own threads do not count as others.
        """
        now = contention.sample()
        if self._before is None or now is None:
            return 0.0
        share = contention.between(self._before, now)
        return (share.others + share.steal) * share.processors * self._passed_s


_METHODS = {"cpu": (HOST_CLOCK,), "cuda": (CUDA_GRAPH, DEVICE_EVENTS), "npu": (NPU_GRAPH, DEVICE_EVENTS)}
_TIMING_FIELDS = {field.name for field in dataclasses.fields(Timing)}
_FAILURES = {status.value for status in Status if status is not Status.PASSED}


def _is_nothing(value: Any) -> bool:
    return value is None


def _is_reason(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_units(value: Any) -> bool:
    return value is None or _is_count(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_times(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(map(_is_time, value))


def _is_timed(value: Any, count: int, device: DeviceKind) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"timing", "elapsed_s"}
        and _is_timing(value["timing"], count, device)
        and _is_number(value["elapsed_s"], 0.0, MAX_TIME_US)
    )


def _is_timing(value: Any, count: int, device: DeviceKind) -> bool:
    """Whether it is a Timing of `count` calls in a form that the device may give."""
    if not (isinstance(value, dict) and set(value) == _TIMING_FIELDS):
        return False
    together, alike = value["calls_a_sample"], value["calls_a_change"]
    most = 1 if device == "cpu" else MOST_CALLS_A_CHANGE  # the fewer, the sooner a stale output shows
    return (
        _is_count(together)
        and _is_count(alike)
        and together <= alike <= most
        and alike % together == 0  # a sample's calls all have the same inputs
        and _is_times(value["times_us"], len(sample_sizes(count, together)))
        and value["method"] in _METHODS[device]
        and isinstance(value["fallback"], str)
    )


def _is_time(value: Any) -> bool:
    """A time in µs: no less than a nanosecond, which is what clocks resolve."""
    return _is_number(value, 1e-3, MAX_TIME_US)


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
