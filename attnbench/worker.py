"""Owns one backend while it runs: its tensors, its callable, and what its exceptions mean. Knows no judge and no table.

It answers in plain values and CPU tensors: to the runner in its own process, or by serve.py to one in another.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor

from attnbench.backend import Backend
from attnbench.devices import Device, Timing
from attnbench.errors import in_a_line
from attnbench.jit import CompileError
from attnbench.patches import Patch, Patched
from attnbench.problem import Problem
from attnbench.reference import Inputs, form_fault
from attnbench.result import Check, Status
from attnbench.seal import Seal
from attnbench.text import without_home

# Taken before any plugin is imported: a plugin that replaces them later changes nothing here.
_COPY, _FILL, _TO = torch.Tensor.copy_, torch.Tensor.fill_, torch.Tensor.to
_SIGNAL, _SET_TIMER = signal.signal, signal.setitimer
_COLLECT, _COLLECTS, _STOP_COLLECTING, _GO_ON_COLLECTING = gc.collect, gc.isenabled, gc.disable, gc.enable
_THIS_THREAD, _MAIN_THREAD = threading.current_thread, threading.main_thread
_MONOTONIC, _PERF_COUNTER = time.monotonic, time.perf_counter

REASON_LENGTH = 400
NOT_A_PLUGIN = frozenset({"attnbench", "torch"})
"""Packages whose lines say little to the author of a plugin that called them."""
ONE_THREAD_VALUES = 1 << 14
"""Half of what torch deals out to several threads."""
MAX_CORES = 1 << 20
"""More than any device has; the bound where the device does not tell."""


class CaseFailed(Exception):
    """A case ended with a status other than PASSED, why and, where the judge compared anything, with what errors."""

    def __init__(self, status: Status, reason: str, check: Check | None = None) -> None:
        super().__init__(f"{status}: {reason}")
        self.status = status
        self.reason = reason or "no reason given"
        self.check = check


class _TimeIsUp(BaseException):
    """Raised by the alarm in whatever a backend is doing; no `except Exception` of its own stops it."""


@dataclass(frozen=True)
class Timed:
    """What timing some calls gave."""

    timing: Timing
    elapsed_s: float
    """All of it by the worker's clock, with what is not timed between the calls."""
    outputs: list[Tensor]
    """On the CPU: what those calls returned that were asked for."""


class Worker:
    """One backend on one device. Every method raises CaseFailed where the backend fails, never its own exceptions."""

    def __init__(self, backend: Backend, device: Device, timeout_s: float, seal: Seal) -> None:
        """`timeout_s` bounds what the backend takes in all between one `begin` and the next.

        `seal` was taken before the backend's plugin was imported.
        """
        self._backend = backend
        self._device = device
        self._timeout_s = timeout_s
        self._left_s = timeout_s
        self._seal = seal
        self._inputs: tuple[Tensor, Tensor, Tensor] | None = None
        self._call: Callable[[], Tensor] | None = None
        self._twin: tuple[tuple[Tensor, Tensor, Tensor], Callable[[], Tensor]] | None = None
        self._problem: Problem | None = None

    def begin(self) -> None:
        """Start a phase (prepare and check, or timing) with the whole of `timeout_s` before it."""
        self._left_s = self._timeout_s
        self._require_seal()

    def unsupported(self, problem: Problem) -> str | None:
        with self._guard("unsupported()"):
            reason = self._backend.unsupported(problem)
            if reason is not None and not (type(reason) is str and reason):
                raise TypeError(f"it returned a {type(reason).__name__}, neither a reason nor None")
        return reason

    def parallel_units(self, problem: Problem) -> int | None:
        with self._guard("parallel_units()"):
            units = getattr(self._backend, "parallel_units", lambda _: None)(problem)
            if units is None:
                return None
            if type(units) is not int:
                raise TypeError(f"it returned a {type(units).__name__}, not a number of cores")
            cores = self._device.info().cores
            if not 1 <= units <= (cores or MAX_CORES):
                raise ValueError(f"it is not between 1 and {cores or MAX_CORES}, the device's cores")
        return units

    def prepare(self, problem: Problem, inputs: Inputs) -> None:
        """Put the inputs on the device and let the backend prepare on them."""
        self.release()
        self._inputs, self._call = self._prepare(problem, inputs)
        self._problem = problem

    def prepare_twin(self, problem: Problem, inputs: Inputs) -> None:
        """Let the backend prepare the same problem once more, on other inputs, beside the first."""
        self._twin = None
        self._twin = self._prepare(problem, inputs)

    def _prepare(self, problem: Problem, inputs: Inputs) -> tuple[tuple[Tensor, Tensor, Tensor], Callable[[], Tensor]]:
        with self._guard("prepare()"):
            q, k, v = (tensor.to(self._device.kind, copy=True) for tensor in (inputs.q, inputs.k, inputs.v))
            call = self._backend.prepare(problem, q, k, v)
            self._device.synchronize()
            if not callable(call):
                raise TypeError(f"it returned a {type(call).__name__}, nothing to call")
        _COLLECT()
        return (q, k, v), call

    def renew(self, inputs: Inputs) -> None:
        """Overwrite the prepared q, k and v with other values of the same problem."""
        tensors = self._tensors
        with self._guard("renewing the inputs"):
            for tensor, value in zip(tensors, (inputs.q, inputs.k, inputs.v)):
                _COPY(tensor, value)
            self._device.synchronize()

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """What q, k and v hold now, on the CPU."""
        q, k, v = self._tensors
        with self._guard("reading the inputs back"):
            return _TO(q, "cpu"), _TO(k, "cpu"), _TO(v, "cpu")

    def output(self, *, twin: bool = False) -> object:
        """Call once; a plain tensor comes back as a copy on the CPU, anything else as it is."""
        inputs, call = (self._tensors, self._prepared) if not twin else self._second
        with self._guard("the call"):
            output = call()
            self._device.synchronize()
        return self._taken(output, inputs)

    def warm_up(self, seconds: float, seed: int) -> float:
        """Call as `time_calls` does, for at least that long; gives the median time in µs of the later half."""
        exercise = self._exercise(seed)
        with _no_collection(), self._guard("a warm-up call"):
            start_s, count, done = _MONOTONIC(), 1, 0
            times: list[float] = []
            try:
                while True:
                    times += self._device.time_calls(self._prepared, count, cold=False, exercise=exercise).times_us
                    done += count
                    passed_s = _MONOTONIC() - start_s
                    if passed_s >= seconds:
                        return statistics.median(times[len(times) // 2 :])
                    still = math.ceil((seconds - passed_s) / passed_s * done)
                    count = min(2 * count, still)  # the first calls are slow, and say little of how many there will be
            finally:
                exercise.end()

    def time_calls(self, count: int, *, cold: bool, seed: int, look_at: Sequence[int]) -> Timed:
        """Time `count` calls, on inputs changed by patches of `seed` and their numbers, and restore the inputs.

        What the calls in `look_at` return is copied the moment they do. Every returned tensor is filled with NaN.
        """
        call, exercise = self._prepared, self._exercise(seed, look_at)
        clock = _PERF_COUNTER
        with _no_collection(), self._guard("a timed call"):
            start_s = clock()
            try:
                timing = self._device.time_calls(call, count, cold=cold, exercise=exercise)
            finally:
                exercise.end()
            self._device.synchronize()
            elapsed_s = clock() - start_s
        return Timed(timing, elapsed_s, [self._plain(output) for output in exercise.outputs])

    def host_us(self, count: int) -> list[float]:
        """CPU times in µs until each of `count` eager calls returns."""
        call = self._prepared
        with _no_collection(), self._guard("a call"):
            return self._device.host_us(call, count)

    def ready(self) -> None:
        """Nothing is being started."""

    def pause(self) -> None:
        """Nothing of this worker runs between its calls, but for threads that the backend keeps spinning."""

    def close(self) -> None:
        """End; nothing may be asked afterwards."""
        self.release()

    def release(self) -> None:
        """Let go of the inputs and the callables, and with them of the backend's memory."""
        if self._call is not None:
            self._device.forget(self._call)
        self._inputs = self._call = self._twin = self._problem = None

    def release_twin(self) -> None:
        self._twin = None

    def _taken(self, output: object, inputs: tuple[Tensor, Tensor, Tensor]) -> object:
        """A copy on the CPU of a plain tensor on the device; anything else as it is."""
        with self._guard("reading the output"):
            if type(output) is torch.Tensor and output.device.type == self._device.kind:
                _refuse_alias(output, inputs)
                return _TO(output.detach(), "cpu", copy=True)
        return output

    def _exercise(self, seed: int, look_at: Sequence[int] = ()) -> _Exercise:
        assert self._problem is not None
        return _Exercise(self._problem, self._tensors, seed, frozenset(look_at))

    def _plain(self, output: object) -> Tensor:
        assert self._problem is not None
        taken = self._taken(output, self._tensors)
        if fault := form_fault(self._problem, taken):
            raise CaseFailed(Status.INCORRECT, f"a timed call: {fault}")
        assert isinstance(taken, torch.Tensor)
        return taken

    def _require_seal(self) -> None:
        if fault := self._seal.broken():
            raise CaseFailed(Status.TAMPERED, fault)

    @property
    def _prepared(self) -> Callable[[], Tensor]:
        if self._call is None:
            raise RuntimeError("prepare() comes before any call")
        return self._call

    @property
    def _second(self) -> tuple[tuple[Tensor, Tensor, Tensor], Callable[[], Tensor]]:
        if self._twin is None:
            raise RuntimeError("prepare_twin() comes before any call of the twin")
        return self._twin

    @property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._inputs is None:
            raise RuntimeError("prepare() comes before its inputs are used")
        return self._inputs

    @contextlib.contextmanager
    def _guard(self, doing: str) -> Iterator[None]:
        """Turn whatever the backend raises, its running out of time, or what it changed, into CaseFailed."""
        start_s = _MONOTONIC()
        try:
            with _alarm(self._left_s):
                yield
        except _TimeIsUp:
            raise CaseFailed(Status.TIMEOUT, f"the limit of {self._timeout_s:g} s ran out at {doing}") from None
        except (KeyboardInterrupt, CaseFailed):
            raise
        except BaseException as error:  # a backend may raise anything, and may try to end the process
            if isinstance(error, CompileError) and error.log:
                print(error.log, file=sys.stderr)  # a reason is one line; this is what its author needs
            words = without_home(f"{doing}: {in_a_line(error)}")
            raise CaseFailed(_status(error), words[:REASON_LENGTH] + _place(error)) from error
        finally:
            # Time that is up is up at once: a timer of 0 s would never ring.
            self._left_s = max(self._left_s - (_MONOTONIC() - start_s), 1e-6)
        self._require_seal()


class _Exercise:
    """Changes the inputs before calls and keeps what some of them return."""

    def __init__(
        self,
        problem: Problem,
        tensors: tuple[Tensor, Tensor, Tensor],
        seed: int,
        look_at: frozenset[int],
    ) -> None:
        self._problem = problem
        self._tensors = tensors
        self._patched = Patched(*tensors)
        self._seed = seed
        self._look_at = look_at
        self.outputs: list[object] = []

    def before(self, index: int) -> None:
        self._patched.lay(Patch.of(self._problem, self._seed, index))

    def after(self, index: int, output: object, calls: int = 1) -> None:
        plain = output if type(output) is torch.Tensor else None
        for _ in self._look_at.intersection(range(index, index + calls)):
            if plain is not None:
                _refuse_alias(plain, self._tensors)
            self.outputs.append(output if plain is None else _copy(plain))
        # A call that returns without having written all of its output cannot hide behind what the last one wrote.
        if plain is not None:
            with contextlib.suppress(RuntimeError):  # of a shape that cannot be filled, as the judge will say
                for piece in _pieces(plain.data):
                    _FILL(piece, math.nan)

    def end(self) -> None:
        self._patched.restore()


def _copy(tensor: Tensor) -> Tensor:
    copy = torch.empty_like(tensor)
    for place, piece in zip(_pieces(copy), _pieces(tensor)):
        _COPY(place, piece)
    return copy


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Parts of a tensor, on a CPU so small that torch works on each in the calling thread.

    A larger one would wake torch's thread pool, whose threads then spin for a while: on two cores a kernel with threads
    of its own took 1.3 to 1.6 times as long after that.
    """
    if tensor.device.type != "cpu" or tensor.numel() <= ONE_THREAD_VALUES or not tensor.dim():
        yield tensor
    elif tensor.shape[0] == 1:
        yield from _pieces(tensor[0])
    else:
        rows, step = tensor.shape[0], max(1, ONE_THREAD_VALUES * tensor.shape[0] // tensor.numel())
        for start in range(0, rows, step):
            yield from _pieces(tensor.narrow(0, start, min(step, rows - start)))


def _refuse_alias(output: Tensor, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Raise CaseFailed where the output lies in an input's memory."""
    if output.layout is not torch.strided or output.is_nested:
        return
    mine = output.untyped_storage().data_ptr()
    for name, tensor in zip("qkv", inputs):
        storage = tensor.untyped_storage()
        if storage.data_ptr() <= mine < storage.data_ptr() + storage.nbytes():
            raise CaseFailed(Status.INCORRECT, f"the output lies in the memory of its input {name}")


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's cycle collector from running inside a timed call."""
    was_enabled = _COLLECTS()
    _STOP_COLLECTING()
    try:
        yield
    finally:
        if was_enabled:
            _GO_ON_COLLECTING()


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise _TimeIsUp in the main thread after that long; it reaches Python code, and C code when it returns."""
    if _THIS_THREAD() is not _MAIN_THREAD():
        yield
        return

    def ring(_signal: int, _frame: FrameType | None) -> None:
        raise _TimeIsUp

    before = _SIGNAL(signal.SIGALRM, ring)
    _SET_TIMER(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        _SET_TIMER(signal.ITIMER_REAL, 0)
        _SIGNAL(signal.SIGALRM, before)


def _place(error: BaseException) -> str:
    """The file and line of a plugin that an exception came from, for its author; nothing where it came from elsewhere.

    A compiler's error names its own source.
    """
    place, frames = "", error.__traceback__
    while frames is not None and not isinstance(error, CompileError):
        module = str(frames.tb_frame.f_globals.get("__name__")).partition(".")[0]
        if module not in NOT_A_PLUGIN:
            place = f" ({os.path.basename(frames.tb_frame.f_code.co_filename)}, line {frames.tb_lineno})"
        frames = frames.tb_next
    return place


def _status(error: BaseException) -> Status:
    if isinstance(error, CompileError):
        return Status.COMPILE_ERROR
    # The CPU's allocator has no exception type of its own.
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in in_a_line(error):
        return Status.OOM
    return Status.RUNTIME_ERROR
