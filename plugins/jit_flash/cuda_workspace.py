"""Owns the memory in which blocks of jit_flash's CUDA kernel meet, and who may use which of it. Knows no kernel."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from attnbench.problem import Problem
from attnbench_plugins.jit_flash.cuda_config import MAX_PARTS, Config, units

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Workspaces:
    """What launches that are in flight at once must not share: counters, and where the parts of a tile meet."""

    STOCK = 32
    """Sets of counters that are zero from the start: clearing one in a capture would clear it at each replay."""

    def __init__(self, problem: Problem, config: Config, device: torch.device) -> None:
        import torch

        tiles = units(problem, config)
        self._meeting = config.meets_in_memory
        counters = tiles * MAX_PARTS if self._meeting else 2 * config.persistent  # 32 bits each, the latter of 64
        parts = tiles * config.parts * config.part_bytes(problem.head_dim_v) if self._meeting else 0
        self._stock = list(torch.zeros((self.STOCK, counters), dtype=torch.int32, device=device)) if counters else []
        self._parts = torch.empty(parts, dtype=torch.uint8, device=device)
        self._taken: list[tuple[Tensor, Tensor]] = []
        self._lock = threading.Lock()  # two threads may launch on new streams at once
        if counters and device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # whichever stream comes first, its counters are zero

    def another(self) -> tuple[int | None, int | None, int | None]:
        """Addresses of taken, arrived and parts that nobody else has; None for what the kernel does not use."""
        import torch

        with self._lock:
            if not (self._stock or self._taken):
                return None, None, None
            counters = self._stock.pop() if self._stock else torch.zeros_like(self._taken[0][0])
            parts = torch.empty_like(self._parts) if self._taken else self._parts
            self._taken.append((counters, parts))
        if counters.is_cuda and not torch.cuda.is_current_stream_capturing():
            for tensor in (counters, parts):  # may be given back while the stream still uses them
                tensor.record_stream(torch.cuda.current_stream(counters.device))
        if self._meeting:
            return None, counters.data_ptr(), parts.data_ptr()
        return counters.data_ptr(), None, None
