"""Owns one backend while it runs: its tensors, its callable, and what its exceptions mean. Knows no judge and no table.

It answers in plain values and CPU tensors: to the runner in its own process, or by serve.py to one in another.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from attnbench.backend import Backend
from attnbench.devices import Device
from attnbench.environment import without_home
from attnbench.errors import in_a_line
from attnbench.jit import CompileError
from attnbench.problem import Problem
from attnbench.result import Status

if TYPE_CHECKING:
    from torch import Tensor

    from attnbench.reference import Inputs

REASON_LENGTH = 400
MAX_CORES = 1 << 20
"""More than any device has; the bound where the device does not tell."""


class CaseFailed(Exception):
    """A case ended with a status other than PASSED, and why."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status = status
        self.reason = reason


class _TimeIsUp(BaseException):
    """Raised by the alarm in whatever a backend is doing; no `except Exception` of its own stops it."""


class Worker:
    """One backend on one device. Every method raises CaseFailed where the backend fails, never its own exceptions."""

    def __init__(self, backend: Backend, device: Device, timeout_s: float) -> None:
        """`timeout_s` bounds what the backend takes in all between one `begin` and the next."""
        self._backend = backend
        self._device = device
        self._timeout_s = timeout_s
        self._left_s = timeout_s
        self._inputs: tuple[Tensor, Tensor, Tensor] | None = None
        self._call: Callable[[], Tensor] | None = None

    def begin(self) -> None:
        """Start a phase (prepare and check, or timing) with the whole of `timeout_s` before it."""
        self._left_s = self._timeout_s

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
        with self._guard("prepare()"):
            q, k, v = (tensor.to(self._device.kind, copy=True) for tensor in (inputs.q, inputs.k, inputs.v))
            self._inputs = (q, k, v)
            call = self._backend.prepare(problem, q, k, v)
            self._device.synchronize()
            if not callable(call):
                raise TypeError(f"it returned a {type(call).__name__}, nothing to call")
        gc.collect()
        self._call = call

    def renew(self, inputs: Inputs) -> None:
        """Overwrite the prepared q, k and v with other values of the same problem."""
        tensors = self._tensors
        with self._guard("renewing the inputs"):
            for tensor, value in zip(tensors, (inputs.q, inputs.k, inputs.v)):
                tensor.copy_(value)
            self._device.synchronize()

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """What q, k and v hold now, on the CPU."""
        q, k, v = self._tensors
        with self._guard("reading the inputs back"):
            return q.cpu(), k.cpu(), v.cpu()

    def output(self) -> object:
        """Call once; a plain tensor comes back as a copy on the CPU, anything else as it is."""
        import torch

        call = self._prepared
        with self._guard("the call"):
            output = call()
            self._device.synchronize()
            if type(output) is torch.Tensor and output.device.type == self._device.kind:
                return output.detach().to("cpu", copy=True)
        return output

    def warm_up(self, seconds: float) -> float:
        """Call for at least that long; gives the median time of a call in µs, of the later half of the calls."""
        call = self._prepared
        with _no_collection(), self._guard("a warm-up call"):
            start_s, count = time.monotonic(), 1
            while True:
                times = self._device.time_calls(call, count, cold=False)
                if time.monotonic() - start_s >= seconds:
                    return statistics.median(times)
                count *= 2

    def time_calls(self, count: int, *, cold: bool) -> list[float]:
        """Times in µs of `count` calls."""
        call = self._prepared
        with _no_collection(), self._guard("a timed call"):
            return self._device.time_calls(call, count, cold=cold)

    def host_us(self, count: int) -> list[float]:
        """CPU times in µs until each of `count` eager calls returns."""
        call = self._prepared
        with _no_collection(), self._guard("a call"):
            return self._device.host_us(call, count)

    def pause(self) -> None:
        """Nothing of this worker runs between its calls, but for threads that the backend keeps spinning."""

    def close(self) -> None:
        """End; nothing may be asked afterwards."""
        self.release()

    def release(self) -> None:
        """Let go of the inputs and the callable, and with them of the backend's memory."""
        self._inputs = self._call = None

    @property
    def _prepared(self) -> Callable[[], Tensor]:
        if self._call is None:
            raise RuntimeError("prepare() comes before any call")
        return self._call

    @property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._inputs is None:
            raise RuntimeError("prepare() comes before its inputs are used")
        return self._inputs

    @contextlib.contextmanager
    def _guard(self, doing: str) -> Iterator[None]:
        """Turn whatever the backend raises, or its running out of time, into CaseFailed."""
        start_s = time.monotonic()
        try:
            with _alarm(self._left_s):
                yield
        except _TimeIsUp:
            raise CaseFailed(Status.TIMEOUT, f"the limit of {self._timeout_s:g} s ran out at {doing}") from None
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a backend may raise anything, and may try to end the process
            if isinstance(error, CompileError) and error.log:
                print(error.log, file=sys.stderr)  # a reason is one line; this is what its author needs
            words = without_home(f"{doing}: {in_a_line(error)}")
            raise CaseFailed(_status(error), words[:REASON_LENGTH]) from error
        finally:
            # Time that is up is up at once: a timer of 0 s would never ring.
            self._left_s = max(self._left_s - (time.monotonic() - start_s), 1e-6)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's cycle collector from running inside a timed call."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise _TimeIsUp in the main thread after that long; it reaches Python code, and C code when it returns."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_signal: int, _frame: FrameType | None) -> None:
        raise _TimeIsUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@functools.cache
def _out_of_memory_errors() -> tuple[type[BaseException], ...]:
    import torch

    return (MemoryError, torch.OutOfMemoryError)


def _status(error: BaseException) -> Status:
    if isinstance(error, CompileError):
        return Status.COMPILE_ERROR
    # The CPU's allocator has no exception type of its own.
    if isinstance(error, _out_of_memory_errors()) or "can't allocate memory" in in_a_line(error):
        return Status.OOM
    return Status.RUNTIME_ERROR
