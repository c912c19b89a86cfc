"""Owns timing on the CPU: the host's clock, its last-level cache, its frequency. Knows nothing of other devices."""

from __future__ import annotations

import functools
import platform
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from attnbench.devices import DeviceInfo, Exercise
from attnbench.problem import DeviceKind

DEFAULT_CACHE_BYTES = 64 << 20
"""Taken for the last-level cache where the system does not tell: larger than most, and flushing more does no harm."""


class CpuDevice:
    """The host itself. A call is over when it returns, so its host time is its time."""

    kind: DeviceKind = "cpu"
    timing_method = "host_clock"
    calls_a_change = 1

    def unavailable(self) -> str | None:
        return None

    def info(self) -> DeviceInfo:
        return DeviceInfo(kind="cpu", name=cpu_name(), cores=torch.get_num_threads())

    def synchronize(self) -> None:
        """Nothing is queued on a CPU."""

    @functools.cached_property
    def _flush_buffer(self) -> Tensor:
        return torch.zeros(2 * last_level_cache_bytes() // 4, dtype=torch.float32)

    def flush_cache(self) -> None:
        self._flush_buffer.add_(1.0)

    def time_calls(
        self, call: Callable[[], Tensor], count: int, *, cold: bool, exercise: Exercise | None = None
    ) -> list[float]:
        clock = time.perf_counter_ns
        times = []
        for index in range(count):
            if exercise is not None:
                exercise.before(index)
            if cold:
                self.flush_cache()
            start = clock()
            output = call()
            times.append(clock() - start)
            if exercise is not None:
                exercise.after(index, output)
        return [max(nanoseconds, 1) / 1e3 for nanoseconds in times]

    def timing_functions(self) -> Iterable[tuple[object, str]]:
        return ()

    def host_us(self, call: Callable[[], Tensor], count: int) -> list[float]:
        return self.time_calls(call, count, cold=False)

    def reading(self):
        from attnbench.devices import Reading

        return Reading(clock_mhz=self.clock_mhz())

    def clock_mhz(self) -> float | None:
        readings = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _read("/proc/cpuinfo"), re.MULTILINE)
        # The busiest core's: on a machine with idle cores theirs say nothing of the one that works.
        return max(map(float, readings)) if readings else None


def cpu_name() -> str:
    """The processor's model as the system tells it, else its architecture."""
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return " ".join(found.group(1).split()) if found else platform.processor() or platform.machine()


def last_level_cache_bytes() -> int:
    """Size of the largest cache that the first core sees."""
    sizes = [_read(path) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    parsed = [_cache_bytes(size) for size in sizes]
    return max((size for size in parsed if size), default=DEFAULT_CACHE_BYTES)


def _cache_bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+)([KM])", text.strip())
    return int(found.group(1)) << {"K": 10, "M": 20}[found.group(2)] if found else 0


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
