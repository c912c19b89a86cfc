"""Owns device time by torch_npu's NPUGraph: one call is captured, and its graph replayed in a row between two events.

torch_npu gives no way to put one graph into another, and of several calls in one graph none could be told from one that
does nothing. So every replay is a launch of its own. All of them are the same work, and no Python of the backend runs
between them, but where the host launches a graph more slowly than the device runs it, a time holds that gap.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from attnbench.devices import Exercise, Timing
from attnbench.devices.events import LEAST_US
from attnbench.devices.graphs import EAGER_CALLS, TRIALS, Captured, NotCaptured, ReplayTimer, calls_a_replay
from attnbench.errors import in_a_line
from attnbench.result import NPU_GRAPH, TimingMethod, sample_sizes

_FILL, _ISNAN = torch.Tensor.fill_, torch.isnan


class NpuGraphTimer(ReplayTimer):
    """Device time of calls that NPUGraph can capture; of others, of eager ones."""

    timing_method: TimingMethod = NPU_GRAPH

    def __init__(self, api: Any, torch_device: str) -> None:
        super().__init__(api, torch_device)
        # Taken before any plugin is imported, as in EventTimer.
        names = ("Stream", "stream", "current_stream", "NPUGraph", "Event", "synchronize")
        self._npu = SimpleNamespace(**{name: getattr(api, name, None) for name in names})

    def timing_functions(self) -> Iterable[tuple[object, str]]:
        yield from super().timing_functions()
        if hasattr(self._api, "NPUGraph"):
            yield (self._api, "NPUGraph")
            yield from ((self._api.NPUGraph, name) for name in ("capture_begin", "capture_end", "replay", "reset"))

    def _captured(self, call: Callable[[], Tensor]) -> Captured | str:
        if self._npu.NPUGraph is None:
            return "this torch_npu has no NPUGraph"
        try:
            return ReplayedCall(self._npu, call)
        except NotCaptured as error:
            self._settle()
            return f"a call of it cannot be captured as an NPUGraph: {error}"


class ReplayedCall:
    """One call of a backend as a graph, and the memory that it uses."""

    def __init__(self, npu: Any, call: Callable[[], Tensor]) -> None:
        """Call a few times, then capture one call. Raises NotCaptured, and whatever an eager call raises."""
        self._npu = npu
        stream = npu.Stream()
        stream.wait_stream(npu.current_stream())
        with npu.stream(stream):
            for _ in range(EAGER_CALLS):
                eager = call()
        npu.synchronize()
        whole = _has_no_nan(eager)
        self._graph = npu.NPUGraph()
        try:
            self._output: Any = self._capture(stream, call)
            if whole:
                self._require_output()
            self._call_us = self._shortest_us()
        except BaseException as error:
            self.close()
            if isinstance(error, RuntimeError):  # as all errors of torch_npu are
                raise NotCaptured(in_a_line(error)) from error
            raise

    def time(self, count: int, flush: Callable[[], None] | None, exercise: Exercise | None) -> Timing:
        size = calls_a_replay(self._call_us, count) if flush is None else 1
        samples, pairs = sample_sizes(count, size), []
        for number, calls in enumerate(samples):
            if flush is not None:  # before the inputs change, as in EventTimer
                flush()
            if exercise is not None:
                exercise.before(number * size)
            pairs.append(self._replay(calls))
            if exercise is not None:
                exercise.after(number * size, self._output, calls)
        self._npu.synchronize()
        times = [max(start.elapsed_time(end) * 1e3 / calls, LEAST_US) for calls, (start, end) in zip(samples, pairs)]
        return Timing(times_us=times, method=NPU_GRAPH, calls_a_sample=size, calls_a_change=size)

    def close(self) -> None:
        """Give the graph back, then the memory that it used."""
        with contextlib.suppress(RuntimeError):  # what cannot be given back any more goes with the process
            self._graph.reset()
        self._output = None

    def _capture(self, stream: Any, call: Callable[[], Tensor]) -> Tensor:
        """Not by torch.npu.graph: it leaves its stream the current one where a capture fails at its end."""
        with self._npu.stream(stream):
            self._graph.capture_begin()
            try:
                output = call()
            except BaseException as error:
                with contextlib.suppress(RuntimeError):  # it says once more that the capture failed, and has ended
                    self._graph.capture_end()
                if isinstance(error, Exception):
                    raise NotCaptured(in_a_line(error)) from error
                raise
            self._graph.capture_end()
        return output

    def _require_output(self) -> None:
        """Raise NotCaptured where a replay does not write the output, a launch of it having been missed."""
        if type(self._output) is torch.Tensor and self._output.is_floating_point():
            _FILL(self._output.data, math.nan)
            self._replay(1)
            self._npu.synchronize()
            if not _has_no_nan(self._output):
                raise NotCaptured("a replay does not write all of its output")

    def _shortest_us(self) -> float:
        """Of some replays of one call."""
        pairs = [self._replay(1) for _ in range(TRIALS)]
        self._npu.synchronize()
        return float(max(min(start.elapsed_time(end) for start, end in pairs) * 1e3, LEAST_US))

    def _replay(self, calls: int) -> tuple[Any, Any]:
        """Launch so many replays between two events, which are read once the device is done."""
        start, end = self._npu.Event(enable_timing=True), self._npu.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            self._graph.replay()
        end.record()
        return start, end


def _has_no_nan(output: object) -> bool:
    return type(output) is torch.Tensor and output.is_floating_point() and not bool(_ISNAN(output).any())
