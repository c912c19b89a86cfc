"""Owns what a device is to attnbench, and which of them this machine has. Knows no backend, problem or protocol."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from attnbench.errors import AttnbenchError
from attnbench.problem import DEVICE_KINDS, DeviceKind
from attnbench.result import TimingMethod, sample_sizes

if TYPE_CHECKING:
    from torch import Tensor

AUTO_ORDER: tuple[DeviceKind, ...] = ("npu", "cuda", "cpu")
"""`--device auto` takes the first that is there."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a device tells of itself at one moment; None where it does not."""

    clock_mhz: float | None = None
    temperature_c: float | None = None
    throttled: tuple[str, ...] = ()
    """Why the device runs slower than it could, in words: power cap, heat."""


@dataclass(frozen=True, kw_only=True)
class DeviceInfo:
    """Plain facts about one device, as they stand in run.json and beside every number."""

    kind: DeviceKind
    name: str
    cores: int | None
    """What `normalized_tflops` projects to: AI cores, SMs, or the threads in use on a CPU."""
    peak_tflops: Mapping[str, float] = field(default_factory=dict)
    """Peak rate of the matrix unit by dtype, where it is known."""
    peak_source: str = ""
    """Where the peaks come from: `table` (this project's or a toolkit's) or `measured`; empty where there are none."""
    bandwidths: tuple[tuple[int, float], ...] = ()
    """(bytes, GB/s), by rising bytes: no more than that can be read, over and over, of that many bytes in all."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DeviceInfo:
        """The facts that `dataclasses.asdict` wrote. Raises TypeError or ValueError where they are none."""
        if not isinstance(data, Mapping):
            raise ValueError(f"a device must be a table, not {data!r}")
        bandwidths = tuple((int(size), float(gbps)) for size, gbps in data.get("bandwidths", ()))
        info = cls(**{**data, "bandwidths": bandwidths})
        if info.kind not in DEVICE_KINDS:
            raise ValueError(f"device kind must be one of {', '.join(DEVICE_KINDS)}, not {info.kind!r}")
        if not isinstance(info.name, str) or not isinstance(info.peak_tflops, Mapping):
            raise ValueError("a device needs a name and a table of peaks")
        if not all(isinstance(peak, (int, float)) and 0 < peak < 1e9 for peak in info.peak_tflops.values()):
            raise ValueError("a device's peaks must be TFLOP/s above 0")
        sizes = [size for size, _ in bandwidths]
        if sizes != sorted(set(sizes)) or not all(size > 0 and 0 < gbps < 1e9 for size, gbps in bandwidths):
            raise ValueError("a device's bandwidths must be GB/s above 0, by rising bytes")
        if info.cores is not None and (not isinstance(info.cores, int) or info.cores < 1):
            raise ValueError(f"a device's cores must be at least 1, not {info.cores!r}")
        return info


class Exercise(Protocol):
    """What happens between timed calls, untimed."""

    def before(self, index: int) -> None:
        """Change the inputs before call `index`."""
        ...

    def after(self, index: int, output: Tensor, calls: int = 1) -> None:
        """Look at what call `index` returned, at once; with `calls`, what so many from it on returned, all the same."""
        ...


MOST_CALLS_A_CHANGE = 20
"""No device times more calls than these on the same inputs."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long some calls took."""

    times_us: list[float]
    """In µs a call, a sample each: of one call, or the mean of several that were launched at once."""
    method: TimingMethod
    calls_a_sample: int = 1
    """The last sample is of what is left of the calls."""
    calls_a_change: int = 1
    """How many calls in a row had the same inputs: those of call `n` changed before call `n - n % calls_a_change`."""
    fallback: str = ""
    """Why the method is not the device's `timing_method`; empty where it is."""

    def total_us(self, calls: int) -> float:
        """What so many calls, those that were timed, took together."""
        sizes = sample_sizes(calls, self.calls_a_sample)
        return math.fsum(time_us * size for time_us, size in zip(self.times_us, sizes))


class Device(Protocol):
    """How one kind of device is synchronised, timed, flushed and read."""

    kind: DeviceKind
    timing_method: TimingMethod
    """How `time_calls` takes its times where the call lets it; every row names the method that it had."""

    def unavailable(self) -> str | None:
        """Why this machine has no such device, with the step that would help; None where it has."""
        ...

    def info(self) -> DeviceInfo:
        """Facts about the device, nothing measured; only asked of an available one."""
        ...

    def synchronize(self) -> None:
        """Wait until everything queued on the device is done."""
        ...

    def flush_cache(self) -> None:
        """Evict what the last-level cache holds of earlier calls."""
        ...

    def time_calls(
        self, call: Callable[[], Tensor], count: int, *, cold: bool, exercise: Exercise | None = None
    ) -> Timing:
        """Time `count` calls; `cold` flushes the cache, untimed, before each.

        `exercise.before` is told of the first of every `calls_a_change` calls, `exercise.after` of every sample. What
        it takes to time a call at all is done in the first of these, and kept until `forget`.
        """
        ...

    def forget(self, call: Callable[[], Tensor]) -> None:
        """Let go of what was kept for a call that was timed; it may never have been."""
        ...

    def timing_functions(self) -> Iterable[tuple[object, str]]:
        """(owner, name) of what synchronises and times the device, beside the clocks of module `time`."""
        ...

    def host_us(self, call: Callable[[], Tensor], count: int) -> list[float]:
        """CPU time in µs until each of `count` eager calls returns, the queue being empty before it."""
        ...

    def reading(self) -> Reading:
        """What the device tells of its clock, its heat and its limits now; asked while nothing is timed."""
        ...


def device(kind: DeviceKind) -> Device:
    """The device of that kind, there or not; only its own module is imported."""
    if kind == "cpu":
        from attnbench.devices.cpu import CpuDevice

        return CpuDevice()
    if kind == "cuda":
        from attnbench.devices.cuda import CudaDevice

        return CudaDevice()
    from attnbench.devices.npu import NpuDevice

    return NpuDevice()


def choose(name: str) -> Device:
    """The device that `--device name` asks for. Raises AttnbenchError for an unknown name."""
    if name == "auto":
        return next(found for found in map(device, AUTO_ORDER) if found.unavailable() is None)
    for kind in DEVICE_KINDS:
        if name == kind:
            return device(kind)
    raise AttnbenchError(f"no device is called {name!r}", f"choose auto, {', '.join(DEVICE_KINDS)}")
