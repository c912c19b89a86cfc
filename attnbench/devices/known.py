"""Owns what is known of devices by name alone: cores and peak rates. Needs no SDK."""

from __future__ import annotations

import re

from attnbench.devices import DeviceInfo
from attnbench.problem import DeviceKind

ASCEND: dict[str, tuple[int, float]] = {
    "910B1": (24, 363.7),
    "910B2": (24, 353.9),
    "910B3": (20, 294.9),
    "910B4": (20, 245.8),
}
"""AI cores and peak fp16 TFLOP/s: cores × 16³ × 2 × clock, at 1.85, 1.80, 1.80 and 1.50 GHz."""


def known_device(name: str, kind: DeviceKind) -> DeviceInfo:
    """The device of that name with what is known of it: `Ascend 910B2` has 24 cores and 353.9 TFLOP/s.

    Of a name not known the cores and the peaks stay open.
    """
    for model, (cores, peak) in ASCEND.items():
        if re.search(rf"{model}(?!\d)", name, re.IGNORECASE):
            return DeviceInfo(kind="npu", name=name, cores=cores, peak_tflops={"fp16": peak, "bf16": peak})
    return DeviceInfo(kind=kind, name=name, cores=None)
