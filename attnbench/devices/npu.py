"""Owns what is Ascend's: whether an NPU is there and what is missing, its name, cores and peaks. Timing is not its own.

Nothing of it was run on hardware yet.
"""

from __future__ import annotations

import configparser
import functools
import importlib
import importlib.util
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from attnbench import settings
from attnbench.devices import DeviceInfo, Reading
from attnbench.devices.known import Npu, known_npu, npu_device
from attnbench.devices.npu_graphs import NpuGraphTimer
from attnbench.errors import in_a_line
from attnbench.problem import DeviceKind
from attnbench.result import DEVICE_EVENTS

PLATFORM_CONFIG = ("*-linux/data/platform_config", "data/platform_config", "compiler/data/platform_config")
"""Where in a toolkit the facts of each SoC lie, in a file of the SoC's name."""
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD=0"


class NpuDevice(NpuGraphTimer):
    """The current Ascend NPU, timed by NPUGraph, or by events of eager calls where the settings ask for that."""

    kind: DeviceKind = "npu"

    def __init__(self) -> None:
        """Raises AttnbenchError where the setting is none."""
        _probe()  # importing torch_npu is what puts torch.npu there
        super().__init__(getattr(torch, "npu", None), "npu")
        if settings.npu_timing() == "events":
            self.timing_method = DEVICE_EVENTS

    def unavailable(self) -> str | None:
        return _probe()

    def info(self) -> DeviceInfo:
        """Its cores are those that torch_npu has: of a part of an NPU they are fewer than the name tells."""
        name, cores = str(self._api.get_device_name(self._api.current_device())), self._cube_cores()
        npu = platform_config(name) or known_npu(name)
        if npu is None:
            return DeviceInfo(kind="npu", name=name, cores=cores)
        return npu_device(name, npu._replace(cores=cores or npu.cores))

    def _cube_cores(self) -> int | None:
        """None where torch_npu does not tell."""
        with suppress(RuntimeError, AttributeError):
            properties = self._api.get_device_properties(self._api.current_device())
            return int(properties.cube_core_num) or None
        return None

    def reading(self) -> Reading:
        """Nothing yet: torch_npu tells neither clock nor heat."""
        return Reading()


def platform_config(name: str) -> Npu | None:
    """What the toolkit says of the SoC of that name; None where there is no toolkit, or it says nothing of it."""
    home = settings.ascend_home()
    if home is None or not re.fullmatch(r"[\w-]+", name):
        return None
    for folder in PLATFORM_CONFIG:
        for path in sorted(Path(home).glob(f"{folder}/{name}.ini")):
            with suppress(OSError, ValueError, configparser.Error):
                parser = configparser.ConfigParser(strict=False, interpolation=None)
                parser.read_string(path.read_text(encoding="utf-8"))
                cores, clock_mhz = parser.getint("SoCInfo", "ai_core_cnt"), parser.getint("AICoreSpec", "cube_freq")
                l2_bytes = parser.getint("SoCInfo", "l2_size")
                if min(cores, clock_mhz, l2_bytes) > 0:
                    return Npu(cores, clock_mhz, l2_bytes >> 20)
    return None


@functools.lru_cache(maxsize=1)
def _probe() -> str | None:
    """Why no NPU can be used, with what would help; torch_npu is imported only where it is installed."""
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed: on an Ascend machine, pip install 'attnbench[npu]'"
    try:
        importlib.import_module("torch_npu")
    except Exception as error:  # of a library that is not there ImportError, of what torch_npu finds amiss RuntimeError
        return f"torch_npu does not import: {in_a_line(error)}: {_help_with(str(error))}"
    npu: Any = getattr(torch, "npu", None)
    if npu is None or not npu.is_available():
        return "torch_npu sees no NPU: check npu-smi info and ASCEND_RT_VISIBLE_DEVICES"
    return None


def _help_with(words: str) -> str:
    """The step that helps where importing torch_npu fails with these words."""
    home = settings.ascend_home()
    if home is None:
        step = "install CANN and source its set_env.sh (neither ASCEND_HOME_PATH nor ASCEND_TOOLKIT_HOME is set)"
    elif not os.path.isdir(home):
        step = f"source the set_env.sh of an installed CANN ({home} is not there)"
    elif "cannot open shared object file" in words:
        step = f"source CANN's set_env.sh anew, or repair CANN ({home})"
    else:
        step = "torch and torch_npu must be of the same version, and torch a CPU build"
    return f"{step}; until then `import torch` fails too, unless {AUTOLOAD} is set"
