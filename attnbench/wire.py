"""Owns how the runner and a worker process talk: framed JSON on a private socket, tensors in shared memory.

Knows no question and no answer. What comes in is untrusted: limited in size, and JSON with finite numbers.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import select
import socket
import struct
import tempfile
import time
from typing import TYPE_CHECKING, Any

from attnbench.problem import ITEM_BYTES, Problem

if TYPE_CHECKING:
    from torch import Tensor

    from attnbench.reference import Inputs

VERSION = 3
MAX_MESSAGE_BYTES = 4 << 20
"""5000 times take about 50 KB."""
OUTPUTS = 2
"""How many outputs of one request the shared memory has room for."""
_HEADER = struct.Struct(">I")
ALIGNMENT = 64


class WireError(Exception):
    """What came over the wire is no message."""


class Closed(WireError):
    """The other end is gone."""


class NoAnswer(WireError):
    """Nothing came in time."""


class Channel:
    """One end of the socket."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, message: dict[str, Any], descriptor: int | None = None) -> None:
        """Send one message, and with it a file descriptor. Raises Closed."""
        body = json.dumps(message, allow_nan=False, separators=(",", ":")).encode()
        if len(body) > MAX_MESSAGE_BYTES:
            raise WireError(f"a message of {len(body)} bytes is too large")
        try:
            socket.send_fds(self._socket, [_HEADER.pack(len(body))], [] if descriptor is None else [descriptor])
            self._socket.sendall(body)
        except OSError as error:
            raise Closed(str(error)) from error

    def receive(self, timeout_s: float | None = None) -> tuple[dict[str, Any], int | None]:
        """The next message and the descriptor that came with it. Raises Closed, NoAnswer or WireError."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        self._wait(until)
        try:
            header, descriptors, _, _ = socket.recv_fds(self._socket, _HEADER.size, 1)
        except OSError as error:
            raise Closed(str(error)) from error
        descriptor = descriptors[0] if descriptors else None
        try:
            header += self._exactly(_HEADER.size - len(header), until) if header else b""
            if not header:
                raise Closed("the other end closed the connection")
            (size,) = _HEADER.unpack(header)
            if size > MAX_MESSAGE_BYTES:
                raise WireError(f"a message of {size} bytes is too large")
            return _parse(self._exactly(size, until)), descriptor
        except WireError:
            if descriptor is not None:
                os.close(descriptor)
            raise

    def _exactly(self, size: int, until: float | None) -> bytes:
        parts = []
        while size:
            self._wait(until)
            try:
                part = self._socket.recv(min(size, 1 << 16))
            except OSError as error:
                raise Closed(str(error)) from error
            if not part:
                raise Closed("the other end closed the connection")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _wait(self, until: float | None) -> None:
        if until is None:
            return
        ready, _, _ = select.select([self._socket], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            raise NoAnswer("nothing came in time")

    def close(self) -> None:
        self._socket.close()


def _nameless_file(size: int) -> int:
    """A descriptor of memory that is gone with the last process that has it open, however that ends. Raises OSError."""
    if hasattr(os, "memfd_create"):  # which, unlike /dev/shm, no mount of a container makes small
        descriptor = os.memfd_create("attnbench", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:  # macOS: what is not there shows when it is written
            os.ftruncate(descriptor, size)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _parse(body: bytes) -> dict[str, Any]:
    def finite(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text} is no finite number")
        return value

    try:
        message = json.loads(body, parse_constant=finite, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise WireError(f"it is no JSON: {error}") from error
    if not isinstance(message, dict):
        raise WireError("it is no object")
    return message


class Region:
    """Shared memory for one prepared problem: q, k, v on their way in, outputs on their way out."""

    def __init__(self, problem: Problem, descriptor: int | None = None) -> None:
        """Make the memory, or map what `descriptor`, which is closed, refers to."""
        import torch

        from attnbench.reference import torch_dtype

        shapes = (problem.q_shape, problem.k_shape, problem.v_shape, *[problem.out_shape] * OUTPUTS)
        item = ITEM_BYTES[problem.dtype]
        sizes = [-(-math.prod(shape) * item // ALIGNMENT) * ALIGNMENT for shape in shapes]
        given = descriptor
        descriptor = _nameless_file(sum(sizes)) if given is None else given
        self.descriptor: int | None = descriptor
        """None where it was given: the mapping lives as long as its tensors, and nobody else needs it."""
        try:
            memory = mmap.mmap(descriptor, sum(sizes))
        except OSError:
            os.close(descriptor)
            raise
        if given is not None:
            os.close(given)
            self.descriptor = None
        self._memory = memory
        offsets = [sum(sizes[:index]) for index in range(len(sizes))]
        self.q, self.k, self.v, *self.outputs = (
            torch.frombuffer(memory, dtype=torch_dtype(problem), count=math.prod(shape), offset=offset).view(shape)
            for shape, offset in zip(shapes, offsets)
        )

    def put(self, inputs: Inputs) -> None:
        for mine, value in ((self.q, inputs.q), (self.k, inputs.k), (self.v, inputs.v)):
            mine.copy_(value)

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return (self.q, self.k, self.v)

    def close(self) -> None:
        """Give the memory back; the tensors must not be used afterwards."""
        del self.q, self.k, self.v, self.outputs
        with contextlib.suppress(BufferError):  # a view is still alive somewhere: the mapping goes with it
            self._memory.close()
        if self.descriptor is not None:
            os.close(self.descriptor)
