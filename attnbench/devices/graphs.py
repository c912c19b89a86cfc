"""Owns device time by replays of one captured call, and CUDA's way to it. Knows no GPU's facts, nor how NPUs capture.

A replay on CUDA is a graph of its own: an event, the captured call as often as it fits into REPLAY_US, an event. Its
parts depend on each other one after the other, so calls cannot overlap, and each is the same work, whatever a backend
would do differently from call to call. As both events are nodes of the graph, nothing that the host does is between
them.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

from attnbench.devices import MOST_CALLS_A_CHANGE, Exercise, Timing
from attnbench.devices.driver import LIBRARY, Driver, DriverError
from attnbench.devices.events import LEAST_US, EventTimer
from attnbench.errors import in_a_line
from attnbench.result import CUDA_GRAPH, DEVICE_EVENTS, TimingMethod, sample_sizes

if TYPE_CHECKING:
    from torch import Tensor

REPLAY_US = 200.0
"""What a replay should take: the 1 to 2 µs between its events and its calls are below 1% of that, and the inputs still
change up to 5000 times a second."""
EAGER_CALLS = 3
"""Before a call is captured, so that what is set up lazily has been: modules loaded, workspaces allocated."""
TRIALS = 5
"""Replays of one call, the shortest of which says how many calls fit into REPLAY_US."""


class NotCaptured(Exception):
    """Why a call cannot be replayed, in words. Nothing of the attempt is left."""


class Captured(Protocol):
    """A call that was captured."""

    def time(self, count: int, flush: Callable[[], None] | None, exercise: Exercise | None) -> Timing:
        """Time `count` calls; with `flush` each alone, after that."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class ReplayTimer(EventTimer, abc.ABC):
    """Device time of captured calls; of those that cannot be captured, of eager ones."""

    def __init__(self, api: Any, torch_device: str) -> None:
        super().__init__(api, torch_device)
        self._kept: dict[int, tuple[Callable[[], Tensor], Captured | str]] = {}
        """By the id of a call the call itself, whose id is no other's meanwhile, and what it was captured as, or why
        it was not."""

    @abc.abstractmethod
    def _captured(self, call: Callable[[], Tensor]) -> Captured | str:
        """The call captured, or why it cannot be. Raises what an eager call raises."""

    def timing_functions(self) -> Iterable[tuple[object, str]]:
        yield from super().timing_functions()
        if hasattr(self._api, "Stream"):
            yield (self._api.Stream, "wait_stream")

    def time_calls(
        self, call: Callable[[], Tensor], count: int, *, cold: bool, exercise: Exercise | None = None
    ) -> Timing:
        if self.timing_method == DEVICE_EVENTS:
            return super().time_calls(call, count, cold=cold, exercise=exercise)
        if id(call) not in self._kept:
            self._kept[id(call)] = (call, self._captured(call))
        _, captured = self._kept[id(call)]
        if isinstance(captured, str):
            timing = super().time_calls(call, count, cold=cold, exercise=exercise)
            return dataclasses.replace(timing, fallback=captured)
        return captured.time(count, self.flush_cache if cold else None, exercise)

    def forget(self, call: Callable[[], Tensor]) -> None:
        _, captured = self._kept.pop(id(call), (call, ""))
        if not isinstance(captured, str):
            captured.close()

    def _settle(self) -> None:
        """Let an error that a failed capture left pending end here, and not at the backend's next launch."""
        import torch

        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self._torch_device)
        self.synchronize()


def calls_a_replay(call_us: float, count: int) -> int:
    """As many as REPLAY_US has room for, and such that all replays of `count` calls are of about as many."""
    most = min(max(round(REPLAY_US / call_us), 1), MOST_CALLS_A_CHANGE)
    replays = -(-count // most)
    return -(-count // replays)


class GraphTimer(ReplayTimer):
    """The same by CUDA graphs."""

    timing_method: TimingMethod = CUDA_GRAPH

    def __init__(self, api: Any, torch_device: str, driver: Driver | None) -> None:
        super().__init__(api, torch_device)
        # Taken before any plugin is imported, as in EventTimer.
        names = ("Stream", "stream", "current_stream", "MemPool", "use_mem_pool", "synchronize")
        self._cuda = SimpleNamespace(**{name: getattr(api, name, None) for name in names})
        self._driver = driver

    def timing_functions(self) -> Iterable[tuple[object, str]]:
        yield from super().timing_functions()
        yield from ((self._api, name) for name in ("MemPool", "use_mem_pool") if hasattr(self._api, name))
        if self._driver is not None:
            yield from ((self._driver, name) for name in vars(self._driver))

    def _captured(self, call: Callable[[], Tensor]) -> Captured | str:
        if self._driver is None:
            return f"a graph needs {LIBRARY} of CUDA 11.4 or newer, and it cannot be loaded"
        try:
            return CapturedCall(self._cuda, self._driver, call)
        except NotCaptured as error:
            self._settle()
            return f"a call of it cannot be captured as a CUDA graph: {error}"


@dataclass(frozen=True)
class _Replay:
    """Some calls one after the other between two events, as one launch."""

    calls: int
    graph: int
    executable: int
    start: int
    """The node that records the first event."""
    end: int


class CapturedCall:
    """One call of a backend as a graph, with all replays that were made of it and the memory that they use."""

    def __init__(self, cuda: Any, driver: Driver, call: Callable[[], Tensor]) -> None:
        """Call a few times, then capture one call. Raises NotCaptured, and whatever an eager call raises."""
        self._cuda, self._driver = cuda, driver
        self._graph: int | None = None
        self._output: Any = None
        """What the captured call returned, and every replay writes."""
        self._pool: Any = None
        self._replays: dict[int, _Replay] = {}
        self._events: list[int] = []
        stream = cuda.Stream()
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):
            for _ in range(EAGER_CALLS):
                call()
        cuda.synchronize()
        try:
            self._capture(stream, call)
            self._call_us = self._shortest_us()
        except DriverError as error:
            self.close()
            raise NotCaptured(str(error)) from error
        except BaseException:
            self.close()
            raise

    def time(self, count: int, flush: Callable[[], None] | None, exercise: Exercise | None) -> Timing:
        """Time `count` calls; with `flush` each alone, after that."""
        cuda, driver = self._cuda, self._driver
        size = calls_a_replay(self._call_us, count) if flush is None else 1
        replays = [self._replay(calls) for calls in sample_sizes(count, size)]
        pairs = self._pairs(len(replays))
        stream = cuda.current_stream().cuda_stream
        for number, (replay, (start, end)) in enumerate(zip(replays, pairs)):
            if flush is not None:  # before the inputs change, as in EventTimer
                flush()
            if exercise is not None:
                exercise.before(number * size)
            driver.set_event(replay.executable, replay.start, start)
            driver.set_event(replay.executable, replay.end, end)
            driver.launch(replay.executable, stream)
            if exercise is not None:
                exercise.after(number * size, self._output, replay.calls)
        cuda.synchronize()
        times = [
            max(driver.elapsed_ms(start, end) * 1e3 / replay.calls, LEAST_US)
            for replay, (start, end) in zip(replays, pairs)
        ]
        return Timing(times_us=times, method=CUDA_GRAPH, calls_a_sample=size, calls_a_change=size)

    def close(self) -> None:
        """Give everything back. What the driver cannot destroy any more goes with the process."""
        driver = self._driver
        for replay in self._replays.values():
            with contextlib.suppress(DriverError):
                driver.destroy_executable(replay.executable)
            with contextlib.suppress(DriverError):
                driver.destroy_graph(replay.graph)
        for event in self._events:
            with contextlib.suppress(DriverError):
                driver.destroy_event(event)
        if self._graph is not None:
            with contextlib.suppress(DriverError):
                driver.destroy_graph(self._graph)
        self._replays, self._events, self._graph = {}, [], None
        self._output = self._pool = None  # the memory last, which the graphs used

    def _capture(self, stream: Any, call: Callable[[], Tensor]) -> None:
        cuda, driver = self._cuda, self._driver
        try:
            self._pool = cuda.MemPool()  # what the call allocates stays its own between replays
        except RuntimeError as error:
            raise NotCaptured(in_a_line(error)) from error
        with cuda.stream(stream), cuda.use_mem_pool(self._pool):
            try:
                driver.begin_capture(stream.cuda_stream)
                self._output = call()
            except BaseException as error:
                with contextlib.suppress(DriverError):  # it says once more that the capture failed, and has ended
                    driver.destroy_graph(driver.end_capture(stream.cuda_stream))
                if isinstance(error, Exception):
                    raise NotCaptured(in_a_line(error)) from error
                raise
            self._graph = driver.end_capture(stream.cuda_stream)

    def _shortest_us(self) -> float:
        """Of some replays of one call."""
        replay, pairs = self._replay(1), self._pairs(TRIALS)
        for start, end in pairs:
            self._driver.set_event(replay.executable, replay.start, start)
            self._driver.set_event(replay.executable, replay.end, end)
            self._driver.launch(replay.executable, self._cuda.current_stream().cuda_stream)
        self._cuda.synchronize()
        return max(min(self._driver.elapsed_ms(start, end) for start, end in pairs) * 1e3, LEAST_US)

    def _replay(self, calls: int) -> _Replay:
        if calls not in self._replays:
            self._replays[calls] = self._build(calls)
        return self._replays[calls]

    def _build(self, calls: int) -> _Replay:
        driver = self._driver
        assert self._graph is not None
        ((first, last),) = self._pairs(1)  # every launch sets others
        graph = driver.new_graph()
        try:
            start = node = driver.add_event(graph, (), first)
            # A call that launched nothing is nothing to repeat; that its output is never written shows at once.
            for _ in range(0 if driver.is_empty(self._graph) else calls):
                node = driver.add_child(graph, (node,), self._graph)
            end = driver.add_event(graph, (node,), last)
            return _Replay(calls, graph, driver.instantiate(graph), start, end)
        except DriverError:
            driver.destroy_graph(graph)
            raise

    def _pairs(self, count: int) -> list[tuple[int, int]]:
        """So many pairs of events, the same ones each time."""
        while len(self._events) < 2 * count:
            self._events.append(self._driver.new_event())
        return list(zip(self._events[0 : 2 * count : 2], self._events[1 : 2 * count : 2]))
