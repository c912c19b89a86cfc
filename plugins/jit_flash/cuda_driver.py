"""Owns the calls of NVIDIA's driver that launching a kernel takes: modules, memory, tensor maps, launches.

Through ctypes, as the driver is there wherever torch sees a GPU, and a package of bindings may not be. Knows no kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from attnbench.errors import AttnbenchError

# Names and values from cuda.h.
_MAX_DYNAMIC_SHARED_BYTES = 8
_COOPERATIVE = 2
_FLOAT16, _BFLOAT16 = 6, 9
_SWIZZLE_128B = 3
_OUT_OF_MEMORY, _NO_CONTEXT = 2, 201
_CAPTURING, _CAPTURE_RELAXED = 1, 2
_NON_BLOCKING = 1
_L2_PROMOTION_256B = 3
SM_COUNT, SHARED_BYTES_OF_SM, SHARED_BYTES_OF_BLOCK = 16, 81, 97
"""What `attribute` tells of a device; of a block, as much as it may ask for."""


class DriverError(AttnbenchError):
    """A call of the driver that failed; the message is the driver's own."""


class NoContext(DriverError):
    """A call from a thread that has had no device yet."""


class OutOfMemory(DriverError):
    """A device that has no more memory to give."""


class TensorMap(ctypes.Structure):
    """A CUtensorMap, which its fields tell nothing of."""

    _fields_ = (("words", ctypes.c_uint64 * 16),)

    @classmethod
    def aligned(cls) -> TensorMap:
        """An empty one at a multiple of 64 bytes, where the driver wants it."""
        room = (ctypes.c_uint64 * 24)()
        return cls.from_buffer(room, -ctypes.addressof(room) % 64)


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_uint32), ("pad", ctypes.c_uint32), ("value", ctypes.c_uint32 * 16))


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint32),
    )


@lru_cache
def _driver(*, keeps_gil: bool = False) -> Any:
    return (ctypes.PyDLL if keeps_gil else ctypes.CDLL)("libcuda.so.1")


def _call(name: str, *arguments: Any) -> None:
    if status := getattr(_driver(), name)(*arguments):
        raise _error(name, status)


def _error(name: str, status: int) -> DriverError:
    if status == _NO_CONTEXT:
        return NoContext(f"{name}: this thread has no device")
    if status == _OUT_OF_MEMORY:
        return OutOfMemory(f"{name}: {_words(status)}")
    return DriverError(f"{name}: {_words(status)}")


def _words(status: int) -> str:
    text = ctypes.c_char_p()
    known = _driver().cuGetErrorString(status, ctypes.byref(text)) == 0 and text.value
    return known.decode() if known else f"error {status}"


def attribute(what: int) -> int:
    """A number of the current context's device. Raises DriverError."""
    device, value = ctypes.c_int(), ctypes.c_int()
    _call("cuCtxGetDevice", ctypes.byref(device))
    _call("cuDeviceGetAttribute", ctypes.byref(value), what, device)
    return value.value


class Kernel:
    """One function of a cubin, loaded into the current context."""

    def __init__(self, cubin: Path, function: str) -> None:
        """Raises DriverError where the driver does not load it."""
        module, handle = ctypes.c_void_p(), ctypes.c_void_p()
        _call("cuModuleLoadData", ctypes.byref(module), cubin.read_bytes())
        _call("cuModuleGetFunction", ctypes.byref(handle), module, function.encode())
        self.handle = handle

    def allow(self, shared_bytes: int) -> None:
        """Let blocks have that much shared memory. Raises DriverError."""
        _call("cuFuncSetAttribute", self.handle, _MAX_DYNAMIC_SHARED_BYTES, shared_bytes)


class Memory:
    """Memory of the current context's device, zero at first, given back when nobody refers to it.

    Not torch's: what torch gives out while a stream is captured may be what an earlier call of the graph writes to, and
    zeros that are written then are written again at each replay.
    """

    def __init__(self, size: int) -> None:
        """`size` in bytes. Raises DriverError."""
        context, address, stream = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        with _while_captured():
            _call("cuCtxGetCurrent", ctypes.byref(context))
            _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
            weakref.finalize(self, _free, context, address).atexit = False  # the driver does it, and may be gone
            # One that is not captured, and waits for none that is.
            _call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
            try:
                _call("cuMemsetD8Async", address, ctypes.c_ubyte(0), ctypes.c_size_t(size), stream)
                _call("cuStreamSynchronize", stream)
            finally:
                _call("cuStreamDestroy_v2", stream)
        assert address.value is not None
        self.address = address.value


@contextlib.contextmanager
def _while_captured() -> Iterator[None]:
    """Lets this thread make calls that the driver refuses while a stream is captured, unless it is told that they have
    nothing to do with that stream."""
    mode = ctypes.c_int(_CAPTURE_RELAXED)
    _call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    try:
        yield
    finally:
        _call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))


def _free(context: ctypes.c_void_p, address: ctypes.c_void_p) -> None:
    with contextlib.suppress(DriverError):  # of a context that is gone
        _call("cuCtxPushCurrent_v2", context)
        try:
            with _while_captured():
                _call("cuMemFree_v2", address)  # waits for what uses it
        finally:
            _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


class Launch:
    """A kernel with its grid and arguments, which may be launched any number of times."""

    def __init__(
        self,
        kernel: Kernel,
        *,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        arguments: Callable[[], Sequence[Any]],
        cooperative: bool = False,
    ) -> None:
        """`arguments` gives ctypes values, as the kernel's parameters are laid out; it is called once for every stream
        and every capture, so that what launches in flight may not share need not be shared. `cooperative`: blocks may
        wait for each other, since either all of them run or none.
        """
        self._handle, self._arguments = kernel.handle, arguments
        attributes = [_Attribute(id=_COOPERATIVE, value=(1,))] if cooperative else []
        self._attributes = (_Attribute * len(attributes))(*attributes)
        self.config = _LaunchConfig(
            grid=grid,
            block=(threads, 1, 1),
            shared_bytes=shared_bytes,
            attributes=self._attributes,
            attribute_count=len(attributes),
        )
        # Giving up the GIL and getting it back costs more than a launch takes.
        self._launch = _driver(keeps_gil=True).cuLaunchKernelEx
        self._ready: dict[tuple[int, int] | int, tuple[Any, ...]] = {}
        """What is launched on each stream: one that is changed before each launch is no good to two threads."""

    def __call__(self, stream: int, capture: int = 0) -> None:
        """Queue it on the stream with this handle, which records the capture with this number unless that is 0.

        Raises NoContext and DriverError, and what `arguments` raises.
        """
        key = (stream, capture) if capture else stream
        ready = self._ready.get(key)
        if ready is None:
            config = _LaunchConfig.from_buffer_copy(self.config)
            config.stream = stream
            arguments = self._arguments()
            pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
            kept = (self._attributes, arguments)
            ready = (ctypes.byref(config), self._handle, pointers, None), kept
            self._ready[key] = ready
        if status := self._launch(*ready[0]):
            raise _error("cuLaunchKernelEx", status)


def capture_of(stream: int) -> int:
    """The number of the capture that the stream records, which no other of the process has; 0 where it records none.

    Raises DriverError.
    """
    status, number = ctypes.c_int(), ctypes.c_uint64()
    _call(
        "cuStreamGetCaptureInfo_v2",
        ctypes.c_void_p(stream),
        ctypes.byref(status),
        ctypes.byref(number),
        None,
        None,
        None,
    )
    return number.value if status.value == _CAPTURING else 0


def tensor_map(
    address: int, shape: Sequence[int], strides: Sequence[int], box: Sequence[int], *, bf16: bool
) -> TensorMap:
    """A map of a 16-bit tensor for TMA, with 128-byte swizzle and zeros beyond its shape.

    `shape`, `strides` (in elements) and `box` are outermost first; the innermost dimension is contiguous. Raises
    DriverError where the driver does not take it: an address or a stride that is no multiple of 16 bytes.
    """
    rank = len(shape)
    made = TensorMap.aligned()
    sizes = (ctypes.c_uint64 * rank)(*reversed(shape))
    outer = (ctypes.c_uint64 * (rank - 1))(*(2 * stride for stride in reversed(strides[:-1])))
    boxes = (ctypes.c_uint32 * rank)(*reversed(box))
    steps = (ctypes.c_uint32 * rank)(*[1] * rank)
    _call(
        "cuTensorMapEncodeTiled",
        ctypes.byref(made),
        _BFLOAT16 if bf16 else _FLOAT16,
        rank,
        ctypes.c_void_p(address),
        sizes,
        outer,
        boxes,
        steps,
        0,  # not interleaved
        _SWIZZLE_128B,
        _L2_PROMOTION_256B,
        0,  # zeros beyond the shape
    )
    return made
