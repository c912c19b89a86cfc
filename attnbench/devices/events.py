"""Owns timing by device events, which torch.cuda and torch.npu share call by call. Knows neither vendor."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from attnbench.devices import Exercise

_CLOCK = time.perf_counter_ns


class EventTimer:
    """Device time of eager calls between two events on the current stream.

    All events of a batch are recorded before anything synchronises, so a call's time holds no host wait unless the
    host cannot keep the queue full; then it holds the gaps too, which `host_us` tells.
    """

    timing_method = "device_events"
    calls_a_change = 8
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
    ) -> list[float]:
        pairs = []
        for index in range(count):
            if cold:  # before the inputs change, or another stream of the backend's could work on them meanwhile
                self.flush_cache()
            if exercise is not None and index % self.calls_a_change == 0:
                exercise.before(index)
            start, end = self._event(enable_timing=True), self._event(enable_timing=True)
            start.record()
            output = call()
            end.record()
            if exercise is not None:
                exercise.after(index, output)
            pairs.append((start, end))
        self.synchronize()
        # Events resolve about half a microsecond; an empty call may take none of it.
        return [max(start.elapsed_time(end) * 1e3, 1e-3) for start, end in pairs]

    def host_us(self, call: Callable[[], Tensor], count: int) -> list[float]:
        times = []
        for _ in range(count):
            self.synchronize()
            start = _CLOCK()
            call()
            times.append((_CLOCK() - start) / 1e3)
        self.synchronize()
        return times
