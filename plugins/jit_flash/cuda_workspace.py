"""Owns the memory in which blocks of jit_flash's CUDA kernels meet, and who may use which of it. Knows no kernel."""

from __future__ import annotations

import threading

from attnbench_plugins.jit_flash.cuda_driver import Memory, OutOfMemory


class Workspaces:
    """What launches that are in flight at once must not share: counters, and where the parts of a tile meet."""

    def __init__(self, counter_bytes: int, part_bytes: int) -> None:
        """Takes the first one on the current context's device, unless there are no counters. Raises DriverError."""
        self._parts = 16 * -(-counter_bytes // 16)  # where they begin
        self._bytes = self._parts + part_bytes
        self._spare = [_memory(self._bytes)] if counter_bytes else []
        self._taken: list[Memory] = []
        self._lock = threading.Lock()  # two threads may launch on new streams at once

    def another(self) -> tuple[int | None, int | None]:
        """Addresses of counters, zero at first, and of parts that nobody else has; None where there are no counters.

        Raises DriverError.
        """
        with self._lock:
            if not (self._spare or self._taken):
                return None, None
            memory = self._spare.pop() if self._spare else _memory(self._bytes)
            self._taken.append(memory)
        return memory.address, memory.address + self._parts


def _memory(size: int) -> Memory:
    """Raises DriverError."""
    import torch

    try:
        return Memory(size)
    except OutOfMemory:
        if torch.cuda.is_current_stream_capturing():
            raise
        torch.cuda.empty_cache()  # what torch keeps for later the driver cannot give
        return Memory(size)
