"""Choosing the fastest of several calls: which one, in which order they are timed, and what those that fail cost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attnbench import devices
from attnbench.devices import Timing
from attnbench.result import CUDA_GRAPH, DEVICE_EVENTS
from attnbench_plugins.fastest import ROUNDS, fastest

Call = Callable[[], Tensor]


class Clock:
    """A device on which calls take what they are told to, round after round."""

    def __init__(self) -> None:
        self.times: dict[int, list[float]] = {}
        self.refused: set[int] = set()
        """Those that cannot be captured."""
        self.names: dict[int, str] = {}
        self.timed: list[str] = []
        self.forgotten: list[str] = []

    def time_calls(self, call: Call, count: int, *, cold: bool) -> Timing:
        assert not cold
        self.timed.append(self.names[id(call)])
        time_us = self.times[id(call)][self.timed.count(self.names[id(call)]) - 1]
        if id(call) in self.refused:
            return Timing(times_us=[time_us] * count, method=DEVICE_EVENTS, fallback="it waits")
        return Timing(times_us=[time_us], method=CUDA_GRAPH, calls_a_sample=count)

    def forget(self, call: Call) -> None:
        self.forgotten.append(self.names[id(call)])

    def call(self, name: str, *times_us: float, captured: bool = True) -> Call:
        def made() -> Tensor:
            return torch.zeros(1)

        self.names[id(made)], self.times[id(made)] = name, list(times_us) or [1.0] * ROUNDS
        if not captured:
            self.refused.add(id(made))
        return made


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(devices, "device", {"cpu": made}.__getitem__)
    return made


def raises(error: Exception) -> Call:
    def call() -> Tensor:
        raise error

    return call


def test_the_best_of_interleaved_rounds_counts(clock: Clock) -> None:
    slow, quick = clock.call("slow", 5.0, 4.0, 4.0), clock.call("quick", 9.0, 3.0, 8.0)
    assert fastest([slow, quick]) is quick
    assert clock.timed == ["slow", "quick"] * ROUNDS
    assert clock.forgotten == ["slow", "quick"]


def test_a_tie_goes_to_the_earlier(clock: Clock) -> None:
    calls = [clock.call("a"), clock.call("b")]
    assert fastest(calls) is calls[0]


def test_what_can_be_captured_comes_before_what_cannot(clock: Clock) -> None:
    eager, captured = clock.call("eager", 1.0, 1.0, 1.0, captured=False), clock.call("captured", 2.0, 2.0, 2.0)
    assert fastest([eager, captured]) is captured


def test_those_that_raise_are_left_out(clock: Clock) -> None:
    slow, quick = clock.call("slow", 2.0, 2.0, 2.0), clock.call("quick", 1.0, 1.0, 1.0)
    assert fastest([raises(RuntimeError("no such tile")), slow, raises(ValueError("nor this")), quick]) is quick


def test_one_alone_is_called_and_not_timed(clock: Clock) -> None:
    called = []

    def alone() -> Tensor:
        called.append(1)
        return torch.zeros(1)

    assert fastest([alone, raises(RuntimeError("no"))]) is alone
    assert (called, clock.timed) == ([1], [])


def test_where_all_raise_the_first_error_is_raised() -> None:
    with pytest.raises(RuntimeError, match="the first"):
        fastest([raises(RuntimeError("the first")), raises(ValueError("the second"))])


def test_what_is_no_error_of_the_library_is_not_swallowed(clock: Clock) -> None:
    def interrupted() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fastest([clock.call("a"), interrupted])


def test_none_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="no calls"):
        fastest([])


def test_on_a_cpu_the_hosts_clock_decides() -> None:
    rows, columns = torch.ones(300, 300), torch.ones(1, 1)
    calls = [lambda: rows @ rows @ rows @ rows, lambda: columns @ columns]
    assert fastest(calls) is calls[1]
