"""A stand-in for an Ascend NPU: memory, streams that keep their own time, torch_npu's task queue, capture.

Tensors on it are plain torch.Tensors on the device `npu` whose memory is the host's, so that torch and a C library can
both compute on them. A stream's clock is virtual and moves by what each task says it takes: times are the same on every
machine. With TASK_QUEUE_ENABLE=0 or ASCEND_LAUNCH_BLOCKING=1 a task runs when it is called for; otherwise torch's tasks
wait in a queue until something drains it, as late as a real queue might, while what a library launches by itself on a
stream's handle does not wait: it overtakes them, unless `npu_stream` was read just before, which drains the queue.
"""

from __future__ import annotations

import ctypes
import os

import torch

TORCH_OP_US = 2.0
"""What any operation of torch's takes."""
_CPU, _EXTENSION = 1, 12
"""DLPack's codes of the host and of an out-of-tree device, which torch takes for its `npu`."""

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def on(tensor, kind):
    """The same memory as a tensor of that device."""
    capsule = torch.utils.dlpack.to_dlpack(tensor)
    device = (ctypes.c_int32 * 2).from_address(_pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p))
    device[:] = ({"cpu": _CPU, "npu": _EXTENSION}[kind], 0)
    return torch.utils.dlpack.from_dlpack(capsule)


Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
Launch = ctypes.CFUNCTYPE(None, ctypes.c_void_p, Task, ctypes.c_void_p, ctypes.c_double)


class Handle(ctypes.Structure):
    """What `npu_stream` points to: in C a `double now_us; void (*launch)(void *self, task, void *arg, double us);`.

    A library that stands in for a kernel calls `launch` with what to do, its argument, and how long it takes; it may
    also do its work at once and add its time to `now_us`, which a capture then does not see.
    """

    _fields_ = (("now_us", ctypes.c_double), ("launch", Launch))


class Stream:
    """An in-order queue of the device."""

    def __init__(self):
        self.handle = Handle(0.0, Launch(self._launch))
        self.capture = None
        """The tasks of the capture that goes on."""

    @property
    def address(self):
        return ctypes.addressof(self.handle)

    def execute(self, task, us):
        """Run a task, or put it into the capture that goes on."""
        if self.capture is not None:
            self.capture.append((task, us))
        else:
            task()
            self.handle.now_us += us

    def _launch(self, _stream, task, argument, us):
        keep = Task(ctypes.cast(task, ctypes.c_void_p).value)
        self.execute(lambda: keep(argument), us)


class Machine:
    """The device, and the host's queue for it."""

    def __init__(self):
        self.default = self.current = Stream()
        self.queue = []
        self.capturing = False
        self.refused = ""
        """What invalidated the capture that goes on."""

    def enqueue(self, task, us=0.0):
        """What torch and torch_npu do with a task for the current stream."""
        stream = self.current
        if os.environ.get("TASK_QUEUE_ENABLE", "1") == "0" or os.environ.get("ASCEND_LAUNCH_BLOCKING") == "1":
            stream.execute(task, us)
        else:
            self.queue.append((stream, task, us))

    def drain(self):
        waiting, self.queue = self.queue, []
        for stream, task, us in waiting:
            stream.execute(task, us)

    def wait(self, what):
        """Drain, and refuse where a capture goes on: the host may not wait for what has not run."""
        if self.current.capture is not None:
            self.refused = f"{what} is not permitted when a stream is capturing"
            raise RuntimeError(f"{self.refused}, error code is 107027")
        self.drain()


MACHINE = Machine()


def fallback(op, *arguments, **options):
    """Every operation of torch's on tensors of the device: the host's, on the same memory."""
    if op.overloadpacket is torch.ops.aten._copy_from:
        return _copy(*arguments)
    if "device" in options:
        options["device"] = "cpu"
    taken = [_host(argument) for argument in arguments]
    named = {name: _host(argument) for name, argument in options.items()}
    written = _written(op, arguments, options)
    if written:
        if any(not tensor.numel() for tensor in written):  # which is how torch asks for an output of the right shape
            _grow(written, lambda: op(*taken, **named), _written(op, taken, named))
        else:
            MACHINE.enqueue(lambda: op(*taken, **named), TORCH_OP_US)
        return written[0] if len(written) == 1 else tuple(written)
    if op.overloadpacket is torch.ops.aten._local_scalar_dense:
        MACHINE.wait("reading a value")
        return op(*taken, **named)
    if any(argument.alias_info is not None for argument in op._schema.arguments) or "empty" in op.name():
        return _device(op(*taken, **named))
    return _device(_made(lambda: op(*taken, **named)))


def _made(work):
    """What `work` gives, which no more than its shape is where a capture goes on."""
    MACHINE.drain()
    made = work()
    if MACHINE.current.capture is None:
        MACHINE.current.execute(lambda: None, TORCH_OP_US)
    else:
        MACHINE.current.execute(lambda: _assign(made, work()), TORCH_OP_US)
    return made


def _grow(tensors, work, aliases):
    """Let `work` resize what stands for empty tensors of the device, and these with it."""
    _made(work)
    as_host = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    for tensor, alias in zip(tensors, aliases):
        grown = on(alias, "npu")
        place = (grown.untyped_storage(), grown.storage_offset(), grown.shape, grown.stride())
        torch.ops.aten.set_.source_Storage_storage_offset.redispatch(as_host, tensor, *place)


def _written(op, arguments, options):
    """The arguments that an operation writes."""
    found = []
    for index, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = options.get(argument.name) if argument.kwarg_only or index >= len(arguments) else arguments[index]
            if isinstance(value, torch.Tensor):
                found.append(value)
    return found


def _copy(source, target, *_):
    if target.device.type != "npu":
        MACHINE.wait("copying to the host")
        return target.copy_(_host(source))
    from_host, to = source.device.type != "npu", _host(target)
    if from_host:
        MACHINE.wait("copying from the host")
    values = _host(source)
    MACHINE.enqueue(lambda: to.copy_(values), TORCH_OP_US)
    if from_host:
        MACHINE.drain()
    return target


def _assign(targets, values):
    if isinstance(targets, torch.Tensor):
        targets.copy_(values)
    else:
        for target, value in zip(targets, values):
            target.copy_(value)


def _host(value):
    if isinstance(value, torch.Tensor):
        if value.device.type != "npu":
            return value
        return on(value, "cpu") if value.numel() else torch.empty(value.shape, dtype=value.dtype)
    if isinstance(value, (list, tuple)):
        return type(value)(map(_host, value))
    return value


def _device(value):
    if isinstance(value, torch.Tensor):
        return on(value, "npu")
    if isinstance(value, (list, tuple)):
        return type(value)(map(_device, value))
    return value
