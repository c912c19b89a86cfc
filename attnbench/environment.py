"""Owns the fingerprint of hardware and software that a run records. Knows an allow-list only."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attnbench import contention, sources
from attnbench.registry import BackendInfo, Catalogue, installed_version
from attnbench.text import without_home

ENVIRONMENT_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "ATTNBENCH_CPU_ISA",
    "CUDA_VISIBLE_DEVICES",
    "ASCEND_LAUNCH_BLOCKING",
    "ASCEND_RT_VISIBLE_DEVICES",
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "OMP_WAIT_POLICY",
    "OPENBLAS_NUM_THREADS",
    "PER_STREAM_QUEUE",
    "TASK_QUEUE_ENABLE",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
)
"""Settings that move timings. Values are recorded only where they look like numbers, lists of them, or a plain word."""

NPU_DEFAULTS = {"ASCEND_LAUNCH_BLOCKING": "0", "PER_STREAM_QUEUE": "0", "TASK_QUEUE_ENABLE": "1"}
"""What torch_npu takes where the variable is not set."""

_HARMLESS_VALUE = re.compile(r"[A-Za-z0-9_,.:-]{0,24}")
LIBRARIES = ("attnbench", "torch", "torch-npu", "numpy", "pluggy")


def fingerprint(catalogue: Catalogue) -> dict[str, Any]:
    """What a number may depend on, as JSON types: versions, processor, threads, settings from the allow-list."""
    import torch

    from attnbench.devices.cpu import cpu_name

    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "kernel": platform.release().split("-")[0],
        "cpu": cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "cudnn": _cudnn_version(),
        "nvidia_driver": _driver_version(),
        "libraries": _own_libraries() | _libraries(catalogue),
        "plugins": _versions(catalogue, elsewhere=False),
        "plugins_of_other_interpreters": _versions(catalogue, elsewhere=True),
        "libraries_of_other_interpreters": _libraries_elsewhere(catalogue),
        "sources": _digests(catalogue),
        "variables": {
            name: value
            for name in ENVIRONMENT_VARIABLES
            if (value := os.environ.get(name)) is not None and _HARMLESS_VALUE.fullmatch(value)
        },
        "pto_toolchain": _pto_toolchain(),
        "defaults_of_unset_variables": {
            name: value
            for name, value in NPU_DEFAULTS.items()
            if installed_version("torch-npu") and name not in os.environ
        },
    }


def _cudnn_version() -> str | None:
    """Of the cuDNN that torch loads: cuDNN counts 9.19.0 as 91900, and 8.9.2 as 8902."""
    import torch

    number: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    if number is None:
        return None
    major, rest = divmod(number, 10_000 if number >= 90_000 else 1_000)
    return f"{major}.{rest // 100}.{rest % 100}"


def _driver_version(told: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """What NVIDIA's kernel module says of itself in its first line."""
    try:
        first_line = told.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    except OSError:
        return None
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", first_line)
    return found[0] if found else None


def command(arguments: list[str] | None = None) -> list[str]:
    """The command line with every path cut to its last part: what was run, and not where."""
    words = sys.argv[1:] if arguments is None else arguments
    return ["attnbench", *(_without_folder(word) for word in words)]


def _without_folder(word: str) -> str:
    """`word` less its folders, where `--option=` and `NAME=` may stand before them."""
    return re.sub(r"\A((?:--[\w-]+=)?(?:\w+=)?).*/(?=.)", r"\1", word.rstrip("/"), flags=re.DOTALL)


def one_line(text: str) -> str:
    """A plugin's words as a reason: in one line, and without the user's home folder."""
    return " ".join(without_home(text).split())


def _pto_toolchain() -> list[str]:
    """What CANN, its compiler and the PTO library say of their versions, but not where they are."""
    from attnbench import jit

    try:
        said = jit.pto_toolchain().version_output
    except jit.ToolchainMissing:
        return []
    return [line for line in said.splitlines() if line.strip() and not re.search(r"[/\\]", line)]


def _digests(catalogue: Catalogue) -> dict[str, str]:
    """Of what each plugin is made of, by its entry point's name or as `file.py:name`; of two called alike both."""
    found: dict[str, str] = {}
    for plugin in catalogue.plugins:
        source = plugin.source
        name = f"{source.distribution}:{source.name}" if source.file else source.name
        if plugin.sources:
            found[name] = " ".join(filter(None, [found.get(name), sources.digest(plugin.sources)]))
    return found


def _versions(catalogue: Catalogue, *, elsewhere: bool) -> dict[str, str]:
    loaded = (plugin.source for plugin in catalogue.plugins if plugin.error is None)
    return {source.distribution: source.version for source in loaded if bool(source.python) == elsewhere}


def _own_libraries() -> dict[str, str]:
    return {name: version for name in LIBRARIES if (version := installed_version(name))}


def _libraries(catalogue: Catalogue) -> dict[str, str]:
    """What this environment's backends call and is installed."""
    return {name: version for info in catalogue.backends if not info.source.python for name, version in _called(info)}


def _libraries_elsewhere(catalogue: Catalogue) -> dict[str, dict[str, str]]:
    """The same by backend, since each interpreter has versions of its own, and a path that is nobody's business."""
    return {f"{info.name} on {info.device}": dict(_called(info)) for info in catalogue.backends if info.source.python}


def _called(info: BackendInfo) -> Iterator[tuple[str, str]]:
    return ((name, version) for name, version in info.libraries if version)


def busy_share(seconds: float = 0.3) -> float | None:
    """The share of all processors that others use while this process sleeps that long; None where it cannot be read."""
    before = contention.sample()
    time.sleep(seconds)
    after = contention.sample()
    if before is None or after is None:
        return None
    share = contention.between(before, after)
    return min(1.0, share.others + share.steal)


def limitations() -> tuple[str, ...]:
    """What this system does not let attnbench do, one note each; none on Linux."""
    if sys.platform == "linux":
        return ()
    return (
        "what a backend's own processes start may outlive attnbench: only Linux can hold them",
        "the load of other programs and of other virtual machines is not read: look for it yourself",
    )
