"""Owns timing by device events, which torch.cuda and torch.npu share call by call. Knows neither vendor."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from attnbench.devices import Exercise, Timing
from attnbench.result import DEVICE_EVENTS, TimingMethod

_CLOCK = time.perf_counter_ns
LEAST_US = 1e-3
"""What a call takes at least: events resolve about half a microsecond, and an empty call may take none of it."""


class EventTimer:
    """Device time of eager calls between two events on the current stream.

    All events of a batch are recorded before anything synchronises, so a call's time holds no host wait unless the
    host cannot keep the queue full; then it holds the gaps too, which `host_us` tells.
    """

    timing_method: TimingMethod = DEVICE_EVENTS
    CALLS_A_CHANGE = 8
    """A change of the inputs takes the host ten launches, which before every call would leave the queue empty."""
    FLUSH_BYTES = 256 << 20

    def __init__(self, api: Any, torch_device: str) -> None:
        self._api = api
        """torch.cuda or torch.npu; None where there is no such module."""
        # Taken before any plugin is imported: a plugin that replaces them later changes nothing here.
        self._event: Any = getattr(api, "Event", None)
        self._synchronize: Any = getattr(api, "synchronize", None)
        self._torch_device = torch_device

    def synchronize(self) -> None:
        self._synchronize()

    @functools.cached_property
    def _flush_buffer(self) -> Tensor:
        import torch

        return torch.empty(self.FLUSH_BYTES, dtype=torch.int8, device=self._torch_device)

    def flush_cache(self) -> None:
        self._flush_buffer.zero_()

    def timing_functions(self) -> Iterable[tuple[object, str]]:
        api = self._api
        names = ("synchronize", "Event", "Stream", "current_stream", "default_stream", "stream", "current_device")
        found = [(api, name) for name in names if hasattr(api, name)]
        methods = ("record", "elapsed_time", "synchronize", "query", "wait")
        return [*found, *((api.Event, name) for name in methods if hasattr(api.Event, name))]

    def time_calls(
        self, call: Callable[[], Tensor], count: int, *, cold: bool, exercise: Exercise | None = None
    ) -> Timing:
        pairs = []
        for index in range(count):
            if cold:  # before the inputs change, or another stream of the backend's could work on them meanwhile
                self.flush_cache()
            if exercise is not None and index % self.CALLS_A_CHANGE == 0:
                exercise.before(index)
            start, end = self._event(enable_timing=True), self._event(enable_timing=True)
            start.record()
            output = call()
            end.record()
            if exercise is not None:
                exercise.after(index, output)
            pairs.append((start, end))
        self.synchronize()
        times = [max(start.elapsed_time(end) * 1e3, LEAST_US) for start, end in pairs]
        return Timing(times_us=times, method=DEVICE_EVENTS, calls_a_change=self.CALLS_A_CHANGE)

    def forget(self, call: Callable[[], Tensor]) -> None:
        """Nothing is kept of a call."""

    def host_us(self, call: Callable[[], Tensor], count: int) -> list[float]:
        times = []
        for _ in range(count):
            self.synchronize()
            start = _CLOCK()
            call()
            times.append((_CLOCK() - start) / 1e3)
        self.synchronize()
        return times
