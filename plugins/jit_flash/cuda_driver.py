"""Owns the calls of NVIDIA's driver that launching a kernel takes: modules, tensor maps, launches in clusters.

Through ctypes, as the driver is there wherever torch sees a GPU, and a package of bindings may not be. Knows no kernel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from attnbench.errors import AttnbenchError

# Names and values from cuda.h.
_MAX_DYNAMIC_SHARED_BYTES = 8
_NON_PORTABLE_CLUSTER = 14
_COOPERATIVE, _CLUSTER_DIMENSION = 2, 4
_FLOAT16, _BFLOAT16 = 6, 9
_SWIZZLE_128B = 3
_NO_CONTEXT = 201
_CAPTURING = 1
_L2_PROMOTION_256B = 3
SM_COUNT, SHARED_BYTES_OF_SM, SHARED_BYTES_OF_BLOCK = 16, 81, 97
"""What `attribute` tells of a device; of a block, as much as it may ask for."""
PORTABLE_CLUSTER = 8
"""Blocks that a cluster may have on every device that has clusters."""


class DriverError(AttnbenchError):
    """A call of the driver that failed; the message is the driver's own."""


class NoContext(DriverError):
    """A call from a thread that has had no device yet."""


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
def _driver() -> Any:
    # PyDLL keeps the GIL, since giving it up and getting it back costs more than a launch takes.
    return ctypes.PyDLL("libcuda.so.1")


def _call(name: str, *arguments: Any) -> None:
    if status := getattr(_driver(), name)(*arguments):
        raise DriverError(f"{name}: {_words(status)}")


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

    def allow(self, *, shared_bytes: int, cluster: int) -> None:
        """Let blocks have that much shared memory, and clusters that many blocks. Raises DriverError."""
        _call("cuFuncSetAttribute", self.handle, _MAX_DYNAMIC_SHARED_BYTES, shared_bytes)
        if cluster > PORTABLE_CLUSTER:
            _call("cuFuncSetAttribute", self.handle, _NON_PORTABLE_CLUSTER, 1)

    def active_clusters(self, launch: Launch) -> int:
        """How many clusters of such a launch the device runs at once."""
        count = ctypes.c_int()
        _call("cuOccupancyMaxActiveClusters", ctypes.byref(count), self.handle, ctypes.byref(launch.config))
        return count.value


class Launch:
    """A kernel with its grid and arguments, which may be launched any number of times."""

    def __init__(
        self,
        kernel: Kernel,
        *,
        blocks: int,
        threads: int,
        shared_bytes: int,
        arguments: Callable[[], Sequence[Any]],
        cluster: int = 1,
        cooperative: bool = False,
    ) -> None:
        """`arguments` gives ctypes values, as the kernel's parameters are laid out; it is called once for every stream
        and every capture, so that what launches in flight may not share need not be shared. `cooperative`: blocks may
        wait for each other, since either all of them run or none.
        """
        self._handle, self._arguments = kernel.handle, arguments
        attributes = []
        if cluster > 1:  # a device that has no clusters knows no attribute of theirs
            attributes.append(_Attribute(id=_CLUSTER_DIMENSION, value=(cluster, 1, 1)))
        if cooperative:
            attributes.append(_Attribute(id=_COOPERATIVE, value=(1,)))
        self._attributes = (_Attribute * len(attributes))(*attributes)
        self.config = _LaunchConfig(
            grid=(blocks, 1, 1),
            block=(threads, 1, 1),
            shared_bytes=shared_bytes,
            attributes=self._attributes,
            attribute_count=len(attributes),
        )
        self._launch = _driver().cuLaunchKernelEx
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
            if status == _NO_CONTEXT:
                raise NoContext("cuLaunchKernelEx: this thread has no device")
            raise DriverError(f"cuLaunchKernelEx: {_words(status)}")


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
