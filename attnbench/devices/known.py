"""Owns what is known of devices by name alone: cores, peak rates, bandwidths. Needs no SDK."""

from __future__ import annotations

import re
from typing import NamedTuple

from attnbench.devices import DeviceInfo
from attnbench.problem import DeviceKind


class Npu(NamedTuple):
    """An Ascend NPU, or one die of it, as its toolkit's platform_config has it."""

    cores: int
    """AI cores: a cube core with its two vector cores."""
    clock_mhz: int
    l2_mib: int

    @property
    def tflops(self) -> float:
        """Of fp16 and bf16: a cube core does 16³ multiply-adds a clock."""
        return self.cores * 16**3 * 2 * self.clock_mhz / 1e6


ASCEND: dict[str, Npu] = {
    r"910B1(?!\d)": Npu(24, 1850, 192),
    r"910B2(?!\d)": Npu(24, 1800, 192),
    r"910B3(?!\d)": Npu(20, 1800, 192),
    r"910B4(?!\d)": Npu(20, 1500, 96),
    r"910_939\d": Npu(24, 1850, 192),
}
"""By what stands in the name. The last is a die of an A3."""


class Gpu(NamedTuple):
    """An NVIDIA GPU by its data sheet; rates are dense, at the boost clock."""

    cores: int
    """SMs."""
    fp16: float
    """TFLOP/s of the tensor cores, the faster of both accumulator widths."""
    bf16: float | None
    """The same for bf16, which accumulates in fp32 alone; None where the tensor cores do not have it."""
    fp32: float
    """TFLOP/s of plain multiply-adds: 256 × SMs × clock, half that before GA102."""
    l2_mib: int
    l2_gbps: float
    """No more than that comes out of L2: its published bytes a clock at the highest clock, else 64 an SM."""
    memory_gbps: float


NVIDIA: dict[str, Gpu] = {
    r"V100": Gpu(80, 125.0, None, 15.7, 6, 3_140, 900),
    r"T4": Gpu(40, 65.0, None, 8.1, 4, 4_070, 320),
    r"A100": Gpu(108, 312.0, 312.0, 19.5, 40, 7_220, 2_039),
    r"A10": Gpu(72, 125.0, 125.0, 31.2, 6, 7_820, 600),
    r"A30": Gpu(56, 165.0, 165.0, 10.3, 24, 5_170, 933),
    r"A40": Gpu(84, 149.7, 149.7, 37.4, 6, 9_360, 696),
    r"L4": Gpu(58, 121.0, 121.0, 30.3, 48, 7_580, 300),
    r"L40S": Gpu(142, 362.1, 362.1, 91.6, 96, 22_910, 864),
    r"RTX 3090(?! Ti| Laptop)": Gpu(82, 142.0, 71.0, 35.6, 6, 9_770, 936),
    r"RTX 4090(?! D\b| Laptop)": Gpu(128, 330.3, 165.2, 82.6, 72, 20_650, 1_008),
    r"H100 PCIe": Gpu(114, 756.0, 756.0, 51.2, 50, 8_990, 2_039),
    r"H100 NVL": Gpu(132, 835.5, 835.5, 60.3, 50, 10_140, 3_938),
    r"H100": Gpu(132, 989.4, 989.4, 66.9, 50, 10_140, 3_352),
    r"H200 NVL": Gpu(132, 835.5, 835.5, 60.3, 50, 10_140, 4_917),
    r"H200": Gpu(132, 989.4, 989.4, 66.9, 50, 10_140, 4_917),
    r"H20": Gpu(78, 148.0, 148.0, 44.0, 60, 10_140, 4_096),
    r"GH200": Gpu(132, 989.4, 989.4, 66.9, 50, 10_140, 4_917),
    r"B200": Gpu(148, 2250.0, 2250.0, 80.0, 126, 18_620, 8_000),
}
"""By what stands in torch's name for it, the first that fits."""

MEMORY_PER_L2 = 8
"""A working set of so many times the L2 is read from memory: what stays of it in the L2 makes an eighth at most."""


def known_device(name: str, kind: DeviceKind) -> DeviceInfo:
    """The device of that name with what is known of it: `Ascend 910B2` has 24 cores and 353.9 TFLOP/s.

    Of a name not known the cores and the peaks stay open, and of a part of a GPU (MIG) too.
    """
    if npu := known_npu(name):
        return npu_device(name, npu)
    if kind == "cuda" and not re.search(r"\bMIG\b", name):
        for model, gpu in NVIDIA.items():
            if re.search(rf"\b(?:{model})\b", name, re.IGNORECASE):
                return _nvidia(name, gpu)
    return DeviceInfo(kind=kind, name=name, cores=None)


def known_npu(name: str) -> Npu | None:
    """The facts of the Ascend NPU of that name, where they are known."""
    return next((npu for model, npu in ASCEND.items() if re.search(model, name, re.IGNORECASE)), None)


def npu_device(name: str, npu: Npu) -> DeviceInfo:
    """An Ascend NPU of these facts."""
    peaks = dict.fromkeys(("fp16", "bf16"), round(npu.tflops, 1))
    return DeviceInfo(kind="npu", name=name, cores=npu.cores, peak_tflops=peaks, peak_source="table")


def _nvidia(name: str, gpu: Gpu) -> DeviceInfo:
    peaks = {"fp16": gpu.fp16, "fp32": gpu.fp32} | ({} if gpu.bf16 is None else {"bf16": gpu.bf16})
    l2_bytes = gpu.l2_mib << 20
    bandwidths = ((l2_bytes, gpu.l2_gbps), (MEMORY_PER_L2 * l2_bytes, gpu.memory_gbps))
    return DeviceInfo(
        kind="cuda", name=name, cores=gpu.cores, peak_tflops=peaks, peak_source="table", bandwidths=bandwidths
    )
