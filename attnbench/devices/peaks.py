"""Owns what a device can do at most where no table tells: measuring it, and keeping what was measured.

Knows no problem and no verdict: what a bound is made of them is roofline.py's.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from attnbench import jit
from attnbench.devices import Device, DeviceInfo
from attnbench.devices.cpu import DEFAULT_CACHE_BYTES, total_cache_bytes
from attnbench.errors import AttnbenchError
from attnbench.jit import cache
from attnbench.problem import DTYPES

CPU_SOURCE = Path(__file__).with_name("cpu_peak.cpp")
CPU_FLAGS = ("-pthread", "-ffp-contract=fast")

L1_BYTES = 16 << 10
"""A thread's share of a working set that any L1 holds: half the smallest in use."""
MOST_BYTES = 512 << 20
"""What is allocated at most: at twice the largest L3 in use it is still read from memory."""

MM_SIZES = {"cpu": (256, 512, 1024), "cuda": (1024, 4096, 8192), "npu": (1024, 4096, 8192)}
"""n of the n × n matrices, small first: where one takes long, the larger ones are left out."""
MM_CALLS = 5
MM_LIMIT_US = 50_000.0
"""A size is left out where a call of it would take longer: on an AVX2 CPU fp16 takes 200 ms at 512, and is no peak."""

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_FILE = "peaks.json"


@dataclass(frozen=True)
class Peaks:
    """What was measured: no more than that was reached, and only the best of it counts."""

    tflops: Mapping[str, float] = field(default_factory=dict)
    bandwidths: tuple[tuple[int, float], ...] = ()

    def merged(self, other: Peaks) -> Peaks:
        """The maximum of both."""
        return Peaks(_larger(self.tflops, other.tflops), _falling([*self.bandwidths, *other.bandwidths]))


def with_peaks(info: DeviceInfo, device: Device, *, refresh: bool = False) -> DeviceInfo:
    """`info` with its peaks: as it is where a table has told them, else from the cache, else measured in a second.

    `refresh` measures in any case and keeps the maximum of what was known and what was measured; it is for the moment
    before something is called faster than the device can be, since on a busy machine the first measurement falls short.
    The device must be there and idle. Without a cache that can be written, every call measures.
    """
    table = info.peak_source == "table"
    if table and not refresh:
        return info
    found = _kept(info, device, refresh=refresh)
    tflops = _larger(info.peak_tflops, found.tflops)
    return dataclasses.replace(
        info,
        peak_tflops=tflops,
        peak_source="table" if table and tflops == info.peak_tflops else "measured" if tflops else "",
        bandwidths=info.bandwidths if table else found.merged(Peaks(bandwidths=info.bandwidths)).bandwidths,
    )


def _kept(info: DeviceInfo, device: Device, *, refresh: bool) -> Peaks:
    """The peaks in the cache, measured before if they are not there, or in any case with `refresh`."""
    try:
        kept = cache.default()
        key, record = _key(info), {"source": f"peaks of {info.name}", "version": f"torch {torch.__version__}"}
        path, there = kept.get(key, _FILE, record, lambda staging: _write(staging, measure(device)))
        peaks = _read(path)
        if refresh and there:
            peaks = peaks.merged(measure(device))
            kept.get(key, _FILE, record, lambda staging: _write(staging, peaks), replace=True)
        return peaks
    except AttnbenchError:  # no folder, or a full disk: a run can do without keeping what it has measured
        return measure(device)


def _key(info: DeviceInfo) -> str:
    """What the peaks depend on: device, threads, libraries, and for a CPU how it is measured."""
    compiler = ""
    with suppress(AttnbenchError):
        compiler = jit.cpp_toolchain().version_output
    parts = ["peaks-1", info.kind, info.name, info.cores, torch.__version__, str(torch.version.cuda), compiler]
    return hashlib.sha256(json.dumps(parts).encode() + CPU_SOURCE.read_bytes()).hexdigest()


def _write(folder: Path, peaks: Peaks) -> None:
    (folder / _FILE).write_text(json.dumps(dataclasses.asdict(peaks)))


def _read(path: Path) -> Peaks:
    data = json.loads(path.read_text())  # intact: the cache has compared its checksum
    return Peaks(data["tflops"], tuple((size, gbps) for size, gbps in data["bandwidths"]))


def measure(device: Device) -> Peaks:
    """The best rates that the device reaches now; on a CPU with the threads that torch uses."""
    # First: after a product of matrices, torch's threads go on spinning for a while.
    own = _cpu(torch.get_num_threads()) if device.kind == "cpu" else Peaks()
    tflops = _larger(own.tflops, _matrix_products(device))
    if device.kind != "cpu":
        getattr(torch, device.kind).empty_cache()  # torch keeps freed memory, which the backends' processes would lack
    if device.kind == "cpu" and "fp32" in tflops:  # what is narrower can be computed in fp32, no slower
        tflops = _larger(tflops, dict.fromkeys(DTYPES, tflops["fp32"]))
    return Peaks(tflops, own.bandwidths)


def _cpu(threads: int) -> Peaks:
    """What cpu_peak.cpp measures; nothing where it cannot be compiled."""
    try:
        library = jit.compile(CPU_SOURCE, flags=CPU_FLAGS).load()
    except AttnbenchError:
        return Peaks()
    library.attnbench_fp32_gflops.restype = ctypes.c_double
    library.attnbench_bf16_gflops.restype = ctypes.c_double
    library.attnbench_read_gbps.restype = ctypes.c_double
    library.attnbench_read_gbps.argtypes = (ctypes.c_int, ctypes.c_int64)
    tflops = {
        "fp32": library.attnbench_fp32_gflops(threads) / 1e3,
        "bf16": library.attnbench_bf16_gflops(threads) / 1e3,
    }
    rates = [
        (size, library.attnbench_read_gbps(threads, min(size, MOST_BYTES) // threads))
        for size in working_sets(threads, total_cache_bytes(2), total_cache_bytes(3))
    ]
    return Peaks({dtype: rate for dtype, rate in tflops.items() if rate > 0}, _falling(rates))


def working_sets(threads: int, l2_bytes: int, l3_bytes: int) -> list[int]:
    """Bytes in all that fit L1, half of L2, half of L3, and no cache; the sizes are those of all caches of a level."""
    memory = 4 * ((l2_bytes + l3_bytes) or DEFAULT_CACHE_BYTES)
    return sorted({size for size in (threads * L1_BYTES, l2_bytes // 2, l3_bytes // 2, memory) if size})


def _matrix_products(device: Device) -> dict[str, float]:
    """TFLOP/s of torch.mm by dtype: no peak, but what surely can be reached."""
    return {dtype: rate for dtype in DTYPES if (rate := _matrix_product(device, _DTYPES[dtype])) > 0}


def _matrix_product(device: Device, dtype: torch.dtype) -> float:
    best = 0.0
    # RuntimeError: the device does not have that dtype, or not that much memory left.
    with suppress(RuntimeError):
        for n in MM_SIZES[device.kind]:
            if best and 2 * n**3 / best / 1e6 > MM_LIMIT_US:
                break
            a, b, out = (torch.ones(n, n, dtype=dtype, device=device.kind) for _ in range(3))
            call = functools.partial(torch.mm, a, b, out=out)
            try:
                best = max(best, 2 * n**3 / min(device.time_calls(call, MM_CALLS, cold=False).times_us) / 1e6)
            finally:
                device.forget(call)
    return best


def _larger(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: max(one.get(name, 0.0), other.get(name, 0.0)) for name in {**one, **other}}


def _falling(rates: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """By rising bytes, each size once, none slower than a larger one: what measured otherwise was disturbed."""
    found: dict[int, float] = {}
    best = 0.0
    for size, gbps in sorted(rates, reverse=True):
        best = max(best, gbps)
        found[size] = best
    return tuple((size, gbps) for size, gbps in sorted(found.items()) if gbps > 0)
