"""Owns what is NVIDIA's: whether a GPU is there, its name and cores, its clock. Timing itself is in events.py."""

from __future__ import annotations

import torch

from attnbench.devices import DeviceInfo
from attnbench.devices.events import EventTimer
from attnbench.problem import DeviceKind


class CudaDevice(EventTimer):
    """The current CUDA device, timed by events."""

    kind: DeviceKind = "cuda"

    def __init__(self) -> None:
        super().__init__(torch.cuda, "cuda")

    def unavailable(self) -> str | None:
        if torch.version.cuda is None:
            return "this torch is built without CUDA: install a CUDA build of torch (https://pytorch.org/get-started)"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device: check nvidia-smi and CUDA_VISIBLE_DEVICES"
        return None

    def info(self) -> DeviceInfo:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return DeviceInfo(kind="cuda", name=properties.name, cores=properties.multi_processor_count)

    def clock_mhz(self) -> float | None:
        try:
            return float(torch.cuda.clock_rate())
        except (RuntimeError, ImportError):  # no nvidia-ml-py, or the driver does not tell
            return None
