"""Owns what is Ascend's: whether an NPU is there, its name and cores, its peaks. Timing itself is in events.py."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch

from attnbench.devices import DeviceInfo, Reading
from attnbench.devices.events import EventTimer
from attnbench.devices.known import known_device
from attnbench.problem import DeviceKind


class NpuDevice(EventTimer):
    """The current Ascend NPU, timed by events. Not yet run on hardware."""

    kind: DeviceKind = "npu"

    def __init__(self) -> None:
        _probe()  # importing torch_npu is what puts torch.npu there
        super().__init__(getattr(torch, "npu", None), "npu")

    def unavailable(self) -> str | None:
        return _probe()

    def info(self) -> DeviceInfo:
        return known_device(str(self._api.get_device_name(self._api.current_device())), "npu")

    def reading(self) -> Reading:
        """Nothing yet: torch_npu tells neither clock nor heat."""
        return Reading()


@functools.lru_cache(maxsize=1)
def _probe() -> str | None:
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed: on an Ascend machine, pip install 'attnbench[npu]'"
    try:
        importlib.import_module("torch_npu")
        npu: Any = getattr(torch, "npu", None)
        if npu is None or not npu.is_available():
            return "torch_npu sees no NPU: check npu-smi info and ASCEND_RT_VISIBLE_DEVICES"
    except (ImportError, RuntimeError, OSError) as error:
        return f"torch_npu does not import: {error}; is the CANN toolkit's set_env.sh sourced?"
    return None
