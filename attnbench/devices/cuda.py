"""Owns what is NVIDIA's: whether a GPU is there, its name and cores, what NVML tells of it. Timing is in graphs.py."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from attnbench import settings
from attnbench.devices import DeviceInfo, Reading
from attnbench.devices.driver import Driver
from attnbench.devices.graphs import GraphTimer
from attnbench.devices.known import known_device
from attnbench.problem import DeviceKind
from attnbench.result import DEVICE_EVENTS

THROTTLE_REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "heat",
    0x40: "heat",
    0x80: "power brake",
    0x100: "display clocks",
}
"""NVML's clock event bits in words. Not there: 0x1, an idle GPU, and 0x2, clocks that somebody has set."""


class CudaDevice(GraphTimer):
    """The current CUDA device, timed by graphs, or by events of eager calls where the settings ask for that."""

    kind: DeviceKind = "cuda"

    def __init__(self) -> None:
        """Raises AttnbenchError where the setting is none."""
        super().__init__(torch.cuda, "cuda", Driver.load())
        if settings.cuda_timing() == "events":
            self.timing_method = DEVICE_EVENTS

    def unavailable(self) -> str | None:
        if torch.version.cuda is None:
            return "this torch is built without CUDA: install a CUDA build of torch (https://pytorch.org/get-started)"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device: check nvidia-smi and CUDA_VISIBLE_DEVICES"
        return None

    def info(self) -> DeviceInfo:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        known = known_device(properties.name, "cuda")
        return dataclasses.replace(known, cores=properties.multi_processor_count)

    def reading(self) -> Reading:
        nvml = _nvml()
        handle = None if nvml is None else _handle(nvml, torch.cuda.current_device())
        if nvml is None or handle is None:
            return Reading()

        def ask(question: str, *words: Any) -> float | None:
            answer = _answer(nvml, lambda: getattr(nvml, question)(handle, *words))
            return None if answer is None else float(answer)

        bits = ask("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:  # its name before driver 535
            bits = ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        return Reading(
            clock_mhz=ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            temperature_c=ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            throttled=tuple(dict.fromkeys(words for bit, words in THROTTLE_REASONS.items() if int(bits or 0) & bit)),
        )


@functools.lru_cache(maxsize=1)
def _nvml() -> Any:
    """nvidia-ml-py, ready for questions; None where it is not installed or there is no driver."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    return _answer(nvml, lambda: (nvml.nvmlInit(), nvml)[1])


@functools.lru_cache
def _handle(nvml: Any, index: int) -> Any:
    """NVML's handle for torch's device `index`; NVML counts all GPUs, torch those in CUDA_VISIBLE_DEVICES alone."""
    properties: Any = torch.cuda.get_device_properties(index)
    by_uuid = _answer(nvml, lambda: nvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}"))
    if by_uuid is not None:
        return by_uuid

    def by_bus() -> Any:
        place = f"{properties.pci_domain_id:08X}:{properties.pci_bus_id:02X}:{properties.pci_device_id:02X}.0"
        return nvml.nvmlDeviceGetHandleByPciBusId(place)

    return _answer(nvml, by_bus)


def _answer(nvml: Any, question: Callable[[], Any]) -> Any:
    """What NVML answers; None where this GPU, driver, nvidia-ml-py or torch does not know the question."""
    try:
        return question()
    except (nvml.NVMLError, AttributeError):
        return None
