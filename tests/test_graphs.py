"""attnbench.devices.graphs and driver, on a stand-in for the driver: what is replayed, timed, given back and told."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import statistics
from types import SimpleNamespace

import pytest
import torch

from attnbench import spot
from attnbench.backend import Backend
from attnbench.blocks import Lap
from attnbench.devices import MOST_CALLS_A_CHANGE, Timing, driver
from attnbench.devices.cuda import CudaDevice
from attnbench.devices.driver import FUNCTIONS, Driver, DriverError
from attnbench.devices.events import EventTimer
from attnbench.devices.graphs import EAGER_CALLS, REPLAY_US, TRIALS, GraphTimer
from attnbench.errors import AttnbenchError
from attnbench.patches import Patch
from attnbench.problem import Problem
from attnbench.reference import make_inputs
from attnbench.result import CUDA_GRAPH, DEVICE_EVENTS, Status
from attnbench.seal import Seal
from attnbench.turn import _Lane
from attnbench.worker import CaseFailed, Worker

INVALID_HANDLE, INVALIDATED, NOT_SUPPORTED = 400, 901, 801
NAMES = {
    INVALID_HANDLE: b"CUDA_ERROR_INVALID_HANDLE",
    INVALIDATED: b"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
    NOT_SUPPORTED: b"CUDA_ERROR_NOT_SUPPORTED",
}
NOT_PERMITTED = "CUDA error: operation not permitted when stream is capturing"


class Gpu:
    """A device whose kernels take the time they say, the driver's functions for it, and what is used of torch.cuda.

    A node of a graph begins when those that it depends on have ended, and no later: what is not chained overlaps.
    """

    def __init__(self):
        self.now_ms = 0.0
        self.journal = []
        self.failing = {}
        """Codes by function: what shall not succeed."""
        self.capture = None
        """The nodes of the capture that goes on, or INVALIDATED."""
        self.alive = {}
        """What every handle is of that was given out and not destroyed."""
        self.pools = 0
        self.pending = False
        """Whether the next launch raises what a failed capture left."""
        self._handles = itertools.count(1)
        self._streams = [SimpleNamespace(cuda_stream=0)]
        self.library = SimpleNamespace(**{name: self._function(name) for name in FUNCTIONS})

    # --- what backends and torch do

    def launch(self, milliseconds, effect=lambda: None):
        """A kernel on the current stream."""
        if self._capturing:
            if self.capture != INVALIDATED:
                self.capture.append((milliseconds, effect))
            return
        if self.pending:
            self.pending = False
            raise RuntimeError("CUDA error: left over")
        self.now_ms += milliseconds
        self.journal.append("kernel")
        effect()

    def Stream(self):
        return SimpleNamespace(cuda_stream=next(self._handles), wait_stream=lambda other: self.journal.append("wait"))

    @contextlib.contextmanager
    def stream(self, stream):
        self._streams.append(stream)
        try:
            yield
        finally:
            self._streams.pop()

    def current_stream(self):
        return self._streams[-1]

    @property
    def _capturing(self):
        return self.capture is not None and self.current_stream().cuda_stream != 0

    def MemPool(self):
        return object()

    @contextlib.contextmanager
    def use_mem_pool(self, pool):
        self.pools += 1
        try:
            yield
        finally:
            self.pools -= 1

    def synchronize(self):
        if self._capturing:
            self.capture = INVALIDATED
            raise RuntimeError(NOT_PERMITTED)
        self.journal.append("synchronize")

    def Event(self, *, enable_timing):
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.now_ms)
        event.elapsed_time = lambda end: end.at - event.at
        return event

    # --- the driver

    def _function(self, name):
        def function(*arguments):  # a plain one, which takes argtypes as a ctypes function does
            assert len(arguments) == len(FUNCTIONS[name])
            if code := self.failing.get(name):
                return code
            try:
                return getattr(self, f"_{name}")(*arguments) or 0
            except KeyError:
                return INVALID_HANDLE

        return function

    def _give(self, out, thing):
        out._obj.value = handle = next(self._handles)
        self.alive[handle] = thing

    def _cuGetErrorName(self, code, out):
        out._obj.value = NAMES[code]

    def _cuGetErrorString(self, code, out):
        out._obj.value = f"number {code}".encode()

    def _cuStreamBeginCapture_v2(self, stream, mode):
        assert (self.capture, mode) == (None, driver.THREAD_LOCAL)
        assert stream == self.current_stream().cuda_stream != 0, "the legacy stream cannot be captured"
        assert self.pools == 1
        self.capture = []
        self.journal.append("capture")

    def _cuStreamEndCapture(self, stream, out):
        nodes, self.capture = self.capture, None
        if nodes == INVALIDATED:
            return INVALIDATED
        return self._give(out, nodes)

    def _cuGraphCreate(self, out, flags):
        self._give(out, {})

    def _cuGraphGetNodes(self, graph, nodes, count):
        assert nodes is None
        count._obj.value = len(self.alive[graph])

    def _add(self, out, graph, after, count, node):
        nodes = self.alive[graph]
        depends = [after[index] for index in range(count)]
        assert all(other in nodes for other in depends)
        out._obj.value = handle = next(self._handles)
        nodes[handle] = (depends, node)

    def _cuGraphAddChildGraphNode(self, out, graph, after, count, child):
        assert self.alive[child], "a child is something to do"
        self._add(out, graph, after, count, list(self.alive[child]))

    def _cuGraphAddEventRecordNode(self, out, graph, after, count, event):
        assert event in self.alive
        self._add(out, graph, after, count, event)

    def _cuGraphInstantiateWithFlags(self, out, graph, flags):
        self._give(out, dict(self.alive[graph]))

    def _cuGraphExecEventRecordNodeSetEvent(self, executable, node, event):
        nodes = self.alive[executable]
        depends, before = nodes[node]
        assert not isinstance(before, list)
        assert event in self.alive
        nodes[node] = (depends, event)

    def _cuGraphLaunch(self, executable, stream):
        assert stream == self.current_stream().cuda_stream
        ends, start = {}, self.now_ms + 0.008  # the launch itself takes 8 µs, in which nothing runs
        for handle, (depends, node) in self.alive[executable].items():
            ends[handle] = max((ends[other] for other in depends), default=start)
            if isinstance(node, list):
                for milliseconds, effect in node:
                    ends[handle] += milliseconds
                    effect()
            else:
                self.alive[node] = ends[handle]
        self.now_ms = max(ends.values())
        self.journal.append(f"replay of {sum(isinstance(node, list) for _, node in self.alive[executable].values())}")

    def _destroy(self, handle):
        del self.alive[handle]

    _cuGraphExecDestroy = _cuGraphDestroy = _cuEventDestroy_v2 = _destroy

    def _cuEventCreate(self, out, flags):
        self._give(out, None)

    def _cuEventElapsedTime(self, out, start, end):
        out._obj.value = self.alive[end] - self.alive[start]


class Timer(GraphTimer):
    def __init__(self, gpu):
        super().__init__(gpu, "cpu", Driver(gpu.library))
        self.gpu = gpu
        self.settled = 0

    def flush_cache(self):
        self.gpu.launch(0.1, lambda: self.gpu.journal.append("flush"))

    def _settle(self):
        self.settled += 1
        super()._settle()


@pytest.fixture
def gpu():
    return Gpu()


@pytest.fixture
def timer(gpu):
    return Timer(gpu)


OUT = torch.zeros(1)


def kernel(gpu, microseconds):
    """A backend of one kernel."""
    return lambda: gpu.launch(microseconds / 1e3) or OUT


class Watching:
    """An exercise that writes down what it is told."""

    def __init__(self, gpu):
        self.gpu = gpu
        self.told = []

    def before(self, index):
        self.gpu.journal.append("change")
        self.told.append(("before", index))

    def after(self, index, output, calls=1):
        self.told.append(("after", index, calls))
        self.output = output


# How many calls a replay has, and what it gives


@pytest.mark.parametrize(
    ("call_us", "calls"), [(1.0, 20), (9.9, 20), (10.0, 20), (20.0, 10), (66.0, 3), (99.0, 2), (150.0, 1), (5e5, 1)]
)
def test_a_replay_takes_about_200_us_within_1_and_20_calls(gpu, timer, call_us, calls):
    timing = timer.time_calls(kernel(gpu, call_us), calls * 5, cold=False)
    assert (timing.calls_a_sample, timing.calls_a_change) == (calls, calls)
    assert timing.times_us == pytest.approx([call_us] * 5)
    assert timing.method == CUDA_GRAPH
    assert gpu.journal[-6:-1] == [f"replay of {calls}"] * 5
    assert (REPLAY_US, MOST_CALLS_A_CHANGE) == (200.0, 20)


@pytest.mark.parametrize(
    ("count", "replays"),
    [(1, [1]), (14, [14]), (21, [11, 10]), (40, [20, 20]), (50, [17, 17, 16]), (61, [16] * 3 + [13])],
)
def test_calls_are_dealt_out_to_replays_of_about_as_many_and_every_call_counts_once(gpu, timer, count, replays):
    call = kernel(gpu, 5.0)
    timer.time_calls(call, 1, cold=False)
    gpu.journal.clear()
    watching = Watching(gpu)
    timing = timer.time_calls(call, count, cold=False, exercise=watching)
    assert [line for line in gpu.journal if "replay" in line] == [f"replay of {calls}" for calls in replays]
    firsts = [sum(replays[:number]) for number in range(len(replays))]
    told = [(("before", first), ("after", first, calls)) for first, calls in zip(firsts, replays)]
    assert watching.told == [*itertools.chain(*told)]
    assert len(timing.times_us) == len(replays)
    assert timing.total_us(count) == pytest.approx(5.0 * count)
    assert all(call - call % timing.calls_a_change in firsts for call in range(count)), "the judge knows the change"


def test_the_calls_of_a_replay_run_one_after_the_other_and_its_events_are_around_them_alone(gpu, timer):
    """Were they not chained they would overlap here; were events recorded by the host they would see the launch."""
    (value,) = timer.time_calls(kernel(gpu, 40.0), 5, cold=False).times_us
    assert value == pytest.approx(40.0)
    assert gpu.journal[-2] == "replay of 5"
    executable = next(nodes for nodes in gpu.alive.values() if isinstance(nodes, dict) and len(nodes) == 7)
    order = list(executable)
    assert [depends for depends, _ in executable.values()] == [[], *([handle] for handle in order[:-1])]


def test_every_replay_has_events_of_its_own_that_are_read_after_all_are_queued(gpu, timer):
    factors = iter([*[1.0] * TRIALS, 1.1, 0.9, 1.3])

    def call():
        gpu.launch(0.3)
        return OUT

    launch = gpu.library.cuGraphLaunch

    def slower(executable, stream):
        """A GPU whose clock changes from replay to replay."""
        nodes, factor = gpu.alive[executable], next(factors)
        before = dict(nodes)
        for handle, (depends, node) in before.items():
            if isinstance(node, list):
                nodes[handle] = (depends, [(milliseconds * factor, effect) for milliseconds, effect in node])
        code = launch(executable, stream)
        nodes.update({handle: before[handle] for handle in before if isinstance(before[handle][1], list)})
        return code

    timer._driver.cuGraphLaunch = slower
    assert timer.time_calls(call, 3, cold=False).times_us == pytest.approx([330.0, 270.0, 390.0])
    assert gpu.journal.count("synchronize") == 3, "after the eager calls, the trials, and all replays"
    assert gpu.journal[-1] == "synchronize"


def test_a_call_that_takes_no_time_has_a_time_all_the_same(gpu, timer):
    assert set(timer.time_calls(kernel(gpu, 0.0), 40, cold=False).times_us) == {1e-3}


def test_a_cold_call_is_flushed_before_the_inputs_change_and_replayed_alone(gpu, timer):
    call = kernel(gpu, 5.0)
    timer.time_calls(call, 1, cold=False)
    gpu.journal.clear()
    timing = timer.time_calls(call, 3, cold=True, exercise=Watching(gpu))
    assert timing == Timing(times_us=[pytest.approx(5.0)] * 3, method=CUDA_GRAPH)
    assert gpu.journal == ["kernel", "flush", "change", "replay of 1"] * 3 + ["synchronize"]


def test_host_time_is_that_of_eager_calls(gpu, timer):
    assert len(timer.host_us(kernel(gpu, 5.0), 3)) == 3
    assert gpu.journal == [*["synchronize", "kernel"] * 3, "synchronize"]


# When it is captured


def test_a_call_is_captured_once_after_eager_calls_and_in_the_first_that_is_asked_for(gpu, timer):
    calls = []
    call = lambda: calls.append(gpu.capture is not None) or gpu.launch(0.01) or OUT  # noqa: E731
    for _ in range(3):
        timer.time_calls(call, 40, cold=False)
    assert calls == [*[False] * EAGER_CALLS, True]
    assert gpu.journal.index("capture") < gpu.journal.index("replay of 1")
    timer.time_calls(kernel(gpu, 1.0), 1, cold=False)
    assert gpu.journal.count("capture") == 2, "another call is captured for itself"


def test_the_output_is_the_captured_calls_and_what_every_replay_writes(gpu, timer):
    inputs, outputs = torch.zeros(3), []

    def call():
        out = torch.empty(3)
        outputs.append(out)
        gpu.launch(0.05, lambda: out.copy_(inputs))
        return out

    class Exercise(Watching):
        def before(self, index):
            inputs.fill_(index + 1)

        def after(self, index, output, calls=1):
            found.append((output is outputs[-1], output.tolist()))

    found = []
    timer.time_calls(call, 12, cold=False, exercise=Exercise(gpu))
    assert len(outputs) == EAGER_CALLS + 1
    assert found == [(True, [float(first + 1)] * 3) for first in (0, 4, 8)]


def test_all_is_given_back_when_a_call_is_forgotten(gpu, timer):
    call, other = kernel(gpu, 5.0), kernel(gpu, 50.0)
    timer.time_calls(call, 61, cold=False)
    before = len(gpu.alive)
    timer.time_calls(other, 7, cold=False)
    timer.forget(other)
    assert len(gpu.alive) == before
    timer.forget(call)
    timer.forget(call)
    assert gpu.alive == {}
    timer.time_calls(call, 1, cold=False)
    assert gpu.journal.count("capture") == 3, "what was forgotten is captured anew"


def test_what_can_no_longer_be_destroyed_stops_nobody(gpu, timer):
    call = kernel(gpu, 5.0)
    timer.time_calls(call, 61, cold=False)
    gpu.failing = dict.fromkeys(("cuGraphExecDestroy", "cuGraphDestroy", "cuEventDestroy_v2"), INVALID_HANDLE)
    timer.forget(call)


# What cannot be captured


def syncing(gpu):
    def call():
        gpu.launch(0.02)
        gpu.synchronize()
        return OUT

    return call


def test_a_call_that_cannot_be_captured_is_timed_by_events_with_the_reason(gpu, timer):
    call = syncing(gpu)
    gpu_ready = gpu.current_stream()
    gpu.pending = False
    timing = timer.time_calls(call, 3, cold=False)
    reason = f"a call of it cannot be captured as a CUDA graph: RuntimeError: {NOT_PERMITTED}"
    assert timing.fallback == reason
    assert (timing.method, timing.calls_a_sample, timing.calls_a_change) == (
        DEVICE_EVENTS,
        1,
        EventTimer.CALLS_A_CHANGE,
    )
    assert timing.times_us == pytest.approx([20.0] * 3)
    assert (gpu.capture, gpu.pools, gpu.alive, gpu.current_stream()) == (None, 0, {}, gpu_ready)
    assert timer.time_calls(call, 3, cold=False).fallback == reason
    assert (gpu.journal.count("capture"), timer.settled) == (1, 1), "it is not tried again"
    timer.forget(call)


def test_an_error_that_the_capture_left_pending_does_not_meet_the_backend(gpu, timer, monkeypatch):
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: gpu.launch(0.0) or zeros(*a, **k))

    def call():
        gpu.launch(0.02)
        if gpu.capture is not None:
            gpu.capture, gpu.pending = INVALIDATED, True  # by a library that raises nothing
        return OUT

    timing = timer.time_calls(call, 2, cold=False)
    assert not gpu.pending
    assert timing.fallback == (
        "a call of it cannot be captured as a CUDA graph: "
        "cuStreamEndCapture: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED (901): number 901"
    )


@pytest.mark.parametrize(
    "name",
    [
        "cuStreamBeginCapture_v2",
        "cuGraphCreate",
        "cuGraphAddChildGraphNode",
        "cuGraphAddEventRecordNode",
        "cuGraphInstantiateWithFlags",
        "cuGraphLaunch",
    ],
)
def test_a_graph_that_cannot_be_built_is_none_and_the_function_is_named(gpu, timer, name):
    gpu.failing = {name: NOT_SUPPORTED}
    timing = timer.time_calls(kernel(gpu, 5.0), 3, cold=False)
    assert timing.method == DEVICE_EVENTS
    assert f"{name}: CUDA_ERROR_NOT_SUPPORTED (801): number 801" in timing.fallback
    assert (gpu.capture, gpu.pools, gpu.alive) == (None, 0, {})


def test_a_replay_that_cannot_be_built_later_leaves_nothing_of_itself(gpu, timer):
    call = kernel(gpu, 5.0)
    timer.time_calls(call, 1, cold=False)
    gpu.failing = {"cuGraphInstantiateWithFlags": NOT_SUPPORTED}
    with pytest.raises(DriverError, match=r"^cuGraphInstantiateWithFlags: CUDA_ERROR_NOT_SUPPORTED \(801\)"):
        timer.time_calls(call, 7, cold=False)
    timer.forget(call)
    assert gpu.alive == {}


def test_what_an_eager_call_raises_is_the_backends_failure_and_no_reason_to_fall_back(gpu, timer):
    def call():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        timer.time_calls(call, 3, cold=False)
    assert "capture" not in gpu.journal


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_a_capture_ends_it_and_goes_on(gpu, timer, error):
    def call():
        gpu.launch(0.01)
        if gpu.capture is not None:
            raise error
        return OUT

    with pytest.raises(error):
        timer.time_calls(call, 3, cold=False)
    assert (gpu.capture, gpu.pools, gpu.alive) == (None, 0, {})


def test_without_pools_of_its_own_memory_nothing_is_captured(gpu, timer, monkeypatch):
    def refuse():
        raise RuntimeError("no pools in this allocator")

    timer._cuda.MemPool = refuse
    timing = timer.time_calls(kernel(gpu, 5.0), 3, cold=False)
    assert timing.fallback.endswith(": RuntimeError: no pools in this allocator")


def test_without_a_driver_calls_are_timed_by_events():
    gpu = Gpu()
    timing = GraphTimer(gpu, "cpu", None).time_calls(kernel(gpu, 5.0), 2, cold=False)
    assert (timing.method, timing.times_us) == (DEVICE_EVENTS, pytest.approx([5.0, 5.0]))
    assert timing.fallback == "a graph needs libcuda.so.1 of CUDA 11.4 or newer, and it cannot be loaded"


def test_an_old_driver_is_none(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    assert Driver.load() is None


# Settings and seal


def test_events_can_be_asked_for(monkeypatch):
    assert CudaDevice().timing_method == CUDA_GRAPH
    monkeypatch.setenv("ATTNBENCH_CUDA_TIMING", "events")
    device = CudaDevice()
    assert device.timing_method == DEVICE_EVENTS
    gpu = Gpu()
    timer = Timer(gpu)
    timer.timing_method = device.timing_method
    timing = timer.time_calls(kernel(gpu, 5.0), 2, cold=False)
    assert (timing.method, timing.fallback) == (DEVICE_EVENTS, ""), "it was asked for"
    assert "capture" not in gpu.journal


def test_another_setting_is_refused(monkeypatch):
    monkeypatch.setenv("ATTNBENCH_CUDA_TIMING", "clock")
    with pytest.raises(AttnbenchError, match="ATTNBENCH_CUDA_TIMING must be graph or events, not 'clock'"):
        CudaDevice()


@pytest.mark.parametrize("name", ["cuGraphLaunch", "cuEventElapsedTime", "cuGraphExecEventRecordNodeSetEvent"])
def test_the_drivers_functions_are_sealed(timer, name):
    seal = Seal(timer.timing_functions())
    assert seal.broken() == ""
    setattr(timer._driver, name, lambda *_: 0)
    assert seal.broken() == f"it changed Driver.{name}"


@pytest.mark.parametrize("name", ["MemPool", "use_mem_pool"])
def test_torchs_part_in_a_capture_is_sealed(monkeypatch, name):
    seal = Seal(CudaDevice().timing_functions())
    monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    assert seal.broken().endswith(f".{name}")


# What a worker makes of it

PROBLEM = Problem(seqlen_q=8, seqlen_k=16, head_dim=8, dtype="fp32")
INPUTS = make_inputs(PROBLEM, 0)


def attention(problem, q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) * problem.softmax_scale, -1) @ v


class OnGpu(Backend):
    """Attention by a kernel of 50 µs on the stand-in, on tensors of the CPU."""

    name, device = "on_gpu", "cpu"

    def __init__(self, gpu, **broken):
        self.gpu = gpu
        self.__dict__.update(broken)

    def prepare(self, problem, q, k, v):
        def call():
            out = torch.empty(problem.out_shape)
            self.gpu.launch(0.05, lambda: out.copy_(attention(problem, q, k, v)))
            return out

        return call


class Cached(OnGpu):
    """It launches nothing after its first call, which was right."""

    def prepare(self, problem, q, k, v):
        kept = []

        def call():
            if not kept:
                kept.append(super(Cached, self).prepare(problem, q, k, v)())
            return kept[0]

        return call


class WorksAtCaptureAlone(OnGpu):
    """It does its work on a stream that the capture does not see."""

    def prepare(self, problem, q, k, v):
        call = super().prepare(problem, q, k, v)
        default = self.gpu._streams[0]

        def elsewhere():
            with self.gpu.stream(default):
                return call()

        return elsewhere


class StaleScale(OnGpu):
    """What it computes on the host from the inputs' values is part of the graph for good."""

    def prepare(self, problem, q, k, v):
        def call():
            out, first = torch.empty(problem.out_shape), q.clone()
            self.gpu.launch(0.05, lambda: out.copy_(attention(problem, first, k, v)))
            return out

        return call


class EveryOther(OnGpu):
    """It works in every other call, the one that is captured among them or not."""

    works_when_captured = True

    def prepare(self, problem, q, k, v):
        call, calls = super().prepare(problem, q, k, v), itertools.count(EAGER_CALLS + self.works_when_captured)
        kept = torch.zeros(problem.out_shape)
        return lambda: call() if next(calls) % 2 else kept


class IdleWhenCaptured(EveryOther):
    works_when_captured = False


@pytest.fixture
def lane(gpu, timer):
    """A lane on the stand-in, for a backend of the class given."""
    timer.kind = "cpu"
    timer.info = lambda: SimpleNamespace(cores=None)

    def make(backend, method=None, fallback=""):
        worker = Worker(backend(gpu), timer, 30.0, Seal())
        worker.prepare(PROBLEM, INPUTS)
        bench = SimpleNamespace(device=timer, books=SimpleNamespace(spend=lambda _: contextlib.nullcontext()))
        before = method and Lap(times_us=(1.0,), calls=(1,), host_us=(), timing_method=method, fallback=fallback)
        return _Lane(bench, PROBLEM, INPUTS, 1e-5, worker, before), worker

    return make


def test_a_right_backend_is_right_in_every_replay_and_gone_when_released(gpu, lane):
    made, worker = lane(OnGpu)
    assert made.warm_up(0.001) == pytest.approx(50.0)
    for _ in range(5):
        timing = made.time_calls(10, cold=False)
        assert (timing.method, timing.calls_a_sample) == (CUDA_GRAPH, 4)
        assert statistics.fmean(timing.times_us) == pytest.approx(50.0)
    assert all(now.equal(put) for now, put in zip(worker.inputs(), (INPUTS.q, INPUTS.k, INPUTS.v)))
    assert gpu.alive
    worker.release()
    assert gpu.alive == {}


def test_the_outputs_that_are_looked_at_are_of_the_replays_that_hold_those_calls(lane):
    _, worker = lane(OnGpu)
    timed = worker.time_calls(10, cold=False, seed=3, look_at=[1, 3, 9])
    assert len(timed.outputs) == 3
    for first, output in zip((0, 0, 8), timed.outputs):
        assert spot.fault(PROBLEM, make_inputs(PROBLEM, 0), output, 1e-5, 0, Patch.of(PROBLEM, 3, first)) == ""
    assert spot.fault(PROBLEM, make_inputs(PROBLEM, 0), timed.outputs[2], 1e-5, 0, Patch.of(PROBLEM, 3, 0)) != ""


@pytest.mark.parametrize("backend", [Cached, WorksAtCaptureAlone, StaleScale, IdleWhenCaptured])
def test_what_a_graph_does_not_hold_is_incorrect(lane, backend):
    made, _ = lane(backend)
    made.warm_up(0.001)
    with pytest.raises(CaseFailed) as caught:
        made.time_calls(40, cold=False)
    assert caught.value.status is Status.INCORRECT


def test_what_works_in_some_calls_works_in_all_that_are_replayed(lane):
    made, _ = lane(EveryOther)
    assert made.time_calls(40, cold=False).times_us == pytest.approx([50.0] * 10)


def test_a_case_is_timed_by_one_method_alone(gpu, lane):
    for fallback, why in (("out of memory", ": out of memory"), ("", "")):  # none where events were asked for
        made, _ = lane(OnGpu, DEVICE_EVENTS, fallback)
        with pytest.raises(CaseFailed) as caught:
            made.time_calls(4, cold=False)
        assert (caught.value.status, caught.value.reason) == (
            Status.RUNTIME_ERROR,
            f"timed by cuda_graph, and before by device_events{why}",
        )
    gpu.failing = {"cuGraphCreate": NOT_SUPPORTED}
    made, _ = lane(OnGpu, CUDA_GRAPH)
    with pytest.raises(CaseFailed, match="timed by device_events, and before by cuda_graph: a call of it cannot be"):
        made.time_calls(4, cold=False)
    made, _ = lane(OnGpu, DEVICE_EVENTS)
    assert made.time_calls(4, cold=False).method == DEVICE_EVENTS
    del gpu.failing["cuGraphCreate"]
    made._worker.prepare(PROBLEM, INPUTS)  # where it is tried again
    with pytest.raises(CaseFailed, match="timed by cuda_graph, and before by device_events: a call of it cannot be"):
        made.time_calls(4, cold=False)
