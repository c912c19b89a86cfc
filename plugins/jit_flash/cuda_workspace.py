"""Owns the memory in which blocks of jit_flash's CUDA kernel meet, and who may use which of it. Knows no kernel."""

from __future__ import annotations

import threading

from attnbench.problem import Problem
from attnbench_plugins.jit_flash.cuda_config import Config, units
from attnbench_plugins.jit_flash.cuda_driver import Memory


class Workspaces:
    """What launches that are in flight at once must not share: counters, and where the parts of a tile meet."""

    def __init__(self, problem: Problem, config: Config) -> None:
        """Takes the first one on the current context's device. Raises DriverError."""
        self._meeting = config.parts > 1
        blocks = units(problem, config) * config.parts
        self._parts = 16 * -(-4 * blocks // 16)  # where they begin: behind a counter of 32 bits for each block
        self._bytes = self._parts + blocks * config.part_bytes(problem.head_dim_v) if self._meeting else 8
        self._spare = [Memory(self._bytes)] if config.has_workspace else []
        self._taken: list[Memory] = []
        self._lock = threading.Lock()  # two threads may launch on new streams at once

    def another(self) -> tuple[int | None, int | None, int | None]:
        """Addresses of taken, launches and parts that nobody else has; None for what the kernel does not use.

        Raises DriverError.
        """
        with self._lock:
            if not (self._spare or self._taken):
                return None, None, None
            memory = self._spare.pop() if self._spare else Memory(self._bytes)
            self._taken.append(memory)
        if self._meeting:
            return None, memory.address, memory.address + self._parts
        return memory.address, None, None
