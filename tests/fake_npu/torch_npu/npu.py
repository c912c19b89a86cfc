"""torch.npu, as far as attnbench and its plugins use it, on the stand-in."""

from __future__ import annotations

import contextlib
import os
import types

from .machine import MACHINE
from .machine import Stream as Queue


def is_available():
    return os.environ.get("FAKE_NPU") != "absent"


def is_initialized():
    return True


def _is_in_bad_fork():
    return False


def manual_seed_all(seed):
    """Nothing random is drawn on the device."""


def device_count():
    return int(is_available())


def current_device():
    return 0


def get_device_name(device=None):
    return os.environ.get("FAKE_NPU_NAME", "Ascend910B2")


def get_device_properties(device=None):
    """FAKE_NPU_CORES are those of a part of an NPU."""
    cores = int(os.environ.get("FAKE_NPU_CORES", "20" if "B3" in get_device_name() else "24"))
    return types.SimpleNamespace(
        name=get_device_name(), cube_core_num=cores, vector_core_num=2 * cores, L2_cache_size=192 << 20
    )


def empty_cache():
    """Nothing is kept."""


def synchronize(device=None):
    MACHINE.wait("synchronize")


class Stream:
    def __init__(self, device=None, priority=0, *, queue=None):
        self._queue = queue or Queue()

    @property
    def npu_stream(self):
        """The handle; reading it drains the task queue."""
        MACHINE.drain()
        return self._queue.address

    def wait_stream(self, stream):
        with _on(self._queue):
            MACHINE.enqueue(lambda: self._catch_up(stream._queue))

    def _catch_up(self, other):
        self._queue.handle.now_us = max(self._queue.handle.now_us, other.handle.now_us)

    def synchronize(self):
        MACHINE.wait("synchronize")


class Event:
    def __init__(self, enable_timing=False, blocking=False, interprocess=False):
        self._timed = enable_timing
        self._recorded = False
        """By the host; the device comes to it later, at the time that follows."""
        self._at_us = None

    def record(self, stream=None):
        self._recorded = True
        queue = MACHINE.current if stream is None else stream._queue
        with _on(queue):
            MACHINE.enqueue(lambda: setattr(self, "_at_us", queue.handle.now_us))

    def wait(self, stream=None):
        """What is recorded here has run by the time that anything is asked of it."""

    def query(self):
        return self._at_us is not None

    def synchronize(self):
        MACHINE.wait("synchronize")

    def elapsed_time(self, end_event):
        """In ms. As the real one it waits for both, which at a recorded event is no wait of the timer's."""
        if not (self._recorded and end_event._recorded):
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        if not (self._timed and end_event._timed):
            raise RuntimeError("an event without enable_timing has no time")
        MACHINE.wait("synchronize")
        return (end_event._at_us - self._at_us) / 1e3


class NPUGraph:
    def __init__(self):
        self._tasks = None
        self._queue = None

    def capture_begin(self, pool=None, capture_error_mode="global"):
        if os.environ.get("TASK_QUEUE_ENABLE") == "2":
            raise RuntimeError("Do not support TASK_QUEUE_ENABLE = 2 during NPU graph capture")
        if self._tasks is not None:
            raise RuntimeError("a graph is captured once: make another")
        if MACHINE.capturing:
            raise RuntimeError("another capture goes on")
        if MACHINE.current is MACHINE.default:
            raise RuntimeError("NPU graphs must be captured on a non-default stream")
        MACHINE.drain()
        self._queue, MACHINE.capturing, MACHINE.refused = MACHINE.current, True, ""
        self._queue.capture = []

    def capture_end(self):
        MACHINE.drain()
        self._tasks, self._queue.capture, MACHINE.capturing = self._queue.capture, None, False
        if MACHINE.refused:
            self._tasks = None
            raise RuntimeError(f"the capture has failed: {MACHINE.refused}")

    def replay(self):
        if self._tasks is None:
            raise RuntimeError("a graph is replayed after a capture")
        tasks = self._tasks
        MACHINE.enqueue(lambda: [task() for task, _ in tasks], sum(us for _, us in tasks))

    def reset(self):
        self._tasks = None


@contextlib.contextmanager
def _on(queue):
    before, MACHINE.current = MACHINE.current, queue
    try:
        yield
    finally:
        MACHINE.current = before


def stream(stream):
    return _on(stream._queue)


def current_stream(device=None):
    return Stream(queue=MACHINE.current)


def default_stream(device=None):
    return Stream(queue=MACHINE.default)


def module():
    """All this as torch.npu."""
    made = types.ModuleType("torch.npu")
    vars(made).update({name: value for name, value in globals().items() if not name.startswith("__")})
    return made
