"""Owns the CPU: the host's clock, its caches, its frequency and heat. Knows nothing of other devices."""

from __future__ import annotations

import ctypes
import functools
import platform
import re
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from attnbench.devices import DeviceInfo, Exercise, Reading, Timing
from attnbench.problem import DeviceKind
from attnbench.result import HOST_CLOCK, TimingMethod

CPUS = Path("/sys/devices/system/cpu")
THERMAL = Path("/sys/class/thermal")
_CLOCK = time.perf_counter_ns
"""Taken before any plugin is imported."""
DEFAULT_CACHE_BYTES = 64 << 20
"""Taken for the last-level cache where the system does not tell: larger than most, and flushing more does no harm."""


class CpuDevice:
    """The host itself. A call is over when it returns, so its host time is its time."""

    kind: DeviceKind = "cpu"
    timing_method: TimingMethod = HOST_CLOCK

    def unavailable(self) -> str | None:
        return None

    def info(self) -> DeviceInfo:
        return DeviceInfo(kind="cpu", name=cpu_name(), cores=torch.get_num_threads())

    def synchronize(self) -> None:
        """Nothing is queued on a CPU."""

    @functools.cached_property
    def _flush_buffer(self) -> Tensor:
        return torch.zeros(2 * last_level_cache_bytes(), dtype=torch.uint8)

    def flush_cache(self) -> None:
        # Not by torch: its threads would spin on afterwards, beside a kernel that has threads of its own.
        threads = [
            threading.Thread(target=ctypes.memset, args=(part.data_ptr(), 1, part.nbytes))
            for part in self._flush_buffer.chunk(torch.get_num_threads())
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def time_calls(
        self, call: Callable[[], Tensor], count: int, *, cold: bool, exercise: Exercise | None = None
    ) -> Timing:
        clock = _CLOCK
        times = []
        for index in range(count):
            if cold:  # before the inputs change, or a thread of the backend's could work on them meanwhile
                self.flush_cache()
            if exercise is not None:
                exercise.before(index)
            start = clock()
            output = call()
            times.append(clock() - start)
            if exercise is not None:
                exercise.after(index, output)
        return Timing(times_us=[max(nanoseconds, 1) / 1e3 for nanoseconds in times], method=self.timing_method)

    def forget(self, call: Callable[[], Tensor]) -> None:
        """Nothing is kept of a call."""

    def timing_functions(self) -> Iterable[tuple[object, str]]:
        return ()

    def host_us(self, call: Callable[[], Tensor], count: int) -> list[float]:
        return self.time_calls(call, count, cold=False).times_us

    def reading(self) -> Reading:
        return Reading(clock_mhz=_clock_mhz(), temperature_c=_temperature_c())


def _clock_mhz() -> float | None:
    """The busiest core's: on a machine with idle cores theirs say nothing of the one that works."""
    found = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _read("/proc/cpuinfo"), re.MULTILINE)
    if found:
        return max(map(float, found))
    # On ARM /proc/cpuinfo holds no clock; elsewhere the files cost a wake-up of every core, and say the same.
    khz = _numbers(CPUS.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    return max(khz) / 1e3 if khz else None


def _temperature_c() -> float | None:
    """The hottest of the processor's own sensors; a board's and a disk's say nothing of it."""
    zones = (zone for zone in THERMAL.glob("thermal_zone*") if re.search("cpu|pkg|soc", _read(zone / "type"), re.I))
    millidegrees = _numbers(zone / "temp" for zone in zones)
    return max(millidegrees) / 1e3 if millidegrees else None


def cpu_name() -> str:
    """The processor's model as the system tells it, else its architecture."""
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return " ".join(found.group(1).split()) if found else platform.processor() or platform.machine()


def last_level_cache_bytes() -> int:
    """Size of the largest cache that the first core sees."""
    sizes = [_read(path) for path in CPUS.glob("cpu0/cache/index*/size")]
    parsed = [_cache_bytes(size) for size in sizes]
    return max((size for size in parsed if size), default=DEFAULT_CACHE_BYTES)


def total_cache_bytes(level: int) -> int:
    """Size of all caches of that level together, data's and not code's; 0 where the system does not tell."""
    found = {}
    for cache in CPUS.glob("cpu[0-9]*/cache/index*"):
        if _read(cache / "level").strip() == str(level) and _read(cache / "type").strip() != "Instruction":
            found[_read(cache / "shared_cpu_list")] = _cache_bytes(_read(cache / "size"))  # once, whoever shares it
    return sum(found.values())


def _cache_bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+)([KM])", text.strip())
    return int(found.group(1)) << {"K": 10, "M": 20}[found.group(2)] if found else 0


def _numbers(paths: Iterable[Path]) -> list[float]:
    """What stands in those of the files that hold a number above 0; a sensor that is off holds 0, or cannot be read."""
    found = []
    for path in paths:
        with suppress(ValueError):
            found.append(float(_read(path)))
    return [number for number in found if number > 0]


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
