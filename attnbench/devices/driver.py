"""Owns the functions of CUDA's driver that graphs are captured, built, launched and timed with. Knows no backend.

By ctypes on the library that torch has loaded already, so that no package is needed and no version of one. Handles are
the driver's pointers as whole numbers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

LIBRARY = "libcuda.so.1"
THREAD_LOCAL = 1
"""CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: what this thread does may break a capture, what others do meanwhile may not."""

_OUT = ctypes.POINTER(ctypes.c_void_p)
_HANDLE, _COUNT = ctypes.c_void_p, ctypes.c_size_t
_TEXT = ctypes.POINTER(ctypes.c_char_p)
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuGetErrorName": (ctypes.c_int, _TEXT),
    "cuGetErrorString": (ctypes.c_int, _TEXT),
    "cuStreamBeginCapture_v2": (_HANDLE, ctypes.c_int),
    "cuStreamEndCapture": (_HANDLE, _OUT),
    "cuGraphCreate": (_OUT, ctypes.c_uint),
    "cuGraphGetNodes": (_HANDLE, _OUT, ctypes.POINTER(_COUNT)),
    "cuGraphAddChildGraphNode": (_OUT, _HANDLE, _OUT, _COUNT, _HANDLE),
    "cuGraphAddEventRecordNode": (_OUT, _HANDLE, _OUT, _COUNT, _HANDLE),
    "cuGraphInstantiateWithFlags": (_OUT, _HANDLE, ctypes.c_ulonglong),
    "cuGraphExecEventRecordNodeSetEvent": (_HANDLE, _HANDLE, _HANDLE),
    "cuGraphLaunch": (_HANDLE, _HANDLE),
    "cuGraphExecDestroy": (_HANDLE,),
    "cuGraphDestroy": (_HANDLE,),
    "cuEventCreate": (_OUT, ctypes.c_uint),
    "cuEventElapsedTime": (ctypes.POINTER(ctypes.c_float), _HANDLE, _HANDLE),
    "cuEventDestroy_v2": (_HANDLE,),
}
"""What is called, by the name that the library exports, with its arguments; each returns a CUresult."""


class DriverError(Exception):
    """A function of the driver's failed: its name, the error's name and number, and what the driver says of it."""


class Driver:
    """The functions, ready to be called on the context that torch has made current. Every method raises DriverError."""

    def __init__(self, library: Any) -> None:
        for name, arguments in FUNCTIONS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
            setattr(self, name, function)  # where a seal finds it

    @classmethod
    def load(cls) -> Driver | None:
        """None where there is no driver, or one older than CUDA 11.4."""
        try:
            return cls(ctypes.CDLL(LIBRARY))
        except (OSError, AttributeError):
            return None

    def begin_capture(self, stream: int) -> None:
        self._do("cuStreamBeginCapture_v2", stream, THREAD_LOCAL)

    def end_capture(self, stream: int) -> int:
        """The graph. Where it raises, the stream captures no longer all the same."""
        return self._made("cuStreamEndCapture", lambda out: (stream, out))

    def is_empty(self, graph: int) -> bool:
        count = _COUNT()
        self._do("cuGraphGetNodes", graph, None, ctypes.byref(count))
        return count.value == 0

    def new_graph(self) -> int:
        return self._made("cuGraphCreate", lambda out: (out, 0))

    def add_child(self, graph: int, after: Sequence[int], child: int) -> int:
        """A node that is the whole of `child`, as it is now; nothing of it begins before all of `after` has ended."""
        return self._made("cuGraphAddChildGraphNode", lambda out: (out, graph, _array(after), len(after), child))

    def add_event(self, graph: int, after: Sequence[int], event: int) -> int:
        """A node that records `event` once all of `after` has ended."""
        return self._made("cuGraphAddEventRecordNode", lambda out: (out, graph, _array(after), len(after), event))

    def instantiate(self, graph: int) -> int:
        return self._made("cuGraphInstantiateWithFlags", lambda out: (out, graph, 0))

    def set_event(self, executable: int, node: int, event: int) -> None:
        """Let `node` record `event` in launches to come; those that are queued are as they were."""
        self._do("cuGraphExecEventRecordNodeSetEvent", executable, node, event)

    def launch(self, executable: int, stream: int) -> None:
        self._do("cuGraphLaunch", executable, stream)

    def destroy_executable(self, executable: int) -> None:
        self._do("cuGraphExecDestroy", executable)

    def destroy_graph(self, graph: int) -> None:
        self._do("cuGraphDestroy", graph)

    def new_event(self) -> int:
        """One that can be timed with."""
        return self._made("cuEventCreate", lambda out: (out, 0))

    def elapsed_ms(self, start: int, end: int) -> float:
        """Between two events that were recorded."""
        found = ctypes.c_float()
        self._do("cuEventElapsedTime", ctypes.byref(found), start, end)
        return found.value

    def destroy_event(self, event: int) -> None:
        self._do("cuEventDestroy_v2", event)

    def _made(self, name: str, arguments: Any) -> int:
        """The handle that a function writes to `out`."""
        out = _HANDLE()
        self._do(name, *arguments(ctypes.byref(out)))
        return out.value or 0

    def _do(self, name: str, *arguments: Any) -> None:
        if code := getattr(self, name)(*arguments):
            words = self._words("cuGetErrorString", code)
            raise DriverError(f"{name}: {self._words('cuGetErrorName', code)} ({code}): {words}")

    def _words(self, name: str, code: int) -> str:
        text = ctypes.c_char_p()
        getattr(self, name)(code, ctypes.byref(text))
        return (text.value or b"unknown").decode(errors="replace")


def _array(handles: Sequence[int]) -> Any:
    return (_HANDLE * len(handles))(*handles)
