"""Attention kernels of the Hugging Face Hub that lie in the cache of its package `kernels`, one backend for each.

Nothing is ever downloaded: discovering reads folder names alone, and loading runs with the Hub offline. Knows the
interface of flash-attn, which the kernels named after it share, and no other: each is asked, and refused problems, as
the plugin of the same generation does (flash_attn_family).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind
from attnbench_plugins import flash_attn_4
from attnbench_plugins.flash_attn_family import attending, lost_window, no_flash_attn_2, no_flash_attn_3, split_counts
from attnbench_plugins.packages import AFTER_HOPPER, GPU, HOPPER, cores, no_gpu, not_installed

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = "kernels-community/flash-attn2"
COMMUNITY = "kernels-community"
"""Whose kernels are named without their publisher."""
KNOWN = re.compile(r"(?:vllm-)?flash-attn-?([234]?)")
"""Kernels with flash_attn_func, and which flash-attn they are: the second, where no number is there."""
GPUS: dict[str, tuple[GPU, GPU | None]] = {"2": ((8, 0), None), "3": ((8, 0), AFTER_HOPPER), "4": (HOPPER, None)}
ATTENTION = re.compile("att(?:entio)?n", re.IGNORECASE)
BUILDS: tuple[tuple[str, DeviceKind], ...] = (
    (r"(?:^|-)cpu(?:-|$)", "cpu"),
    (r"(?:^|-)cu(?:da|\d+)(?:-|$)", "cuda"),
    (r"(?:^|-)(?:cann\d+|npu)(?:-|$)", "npu"),
)
"""What in the name of a build says which device it is for."""


@dataclass(frozen=True)
class Cached:
    """A kernel in the cache: owner/name, the newest commit that is there, and the devices that it is built for."""

    repo: str
    commit: str
    devices: tuple[DeviceKind, ...]


class HubKernel(Backend):
    """One kernel on one device, called as flash-attn is."""

    libraries = MappingProxyType({"kernels": "0.17.2"})

    def __init__(self, cached: Cached, device: DeviceKind) -> None:
        owner, _, kernel = cached.repo.partition("/")
        self._cached, self.device = cached, device
        self.name = "hf_" + re.sub(r"[^a-z0-9]+", "_", (kernel if owner == COMMUNITY else cached.repo).lower())
        self.summary = f"{cached.repo} of the Hugging Face Hub, from the local cache"
        self.homepage = f"https://huggingface.co/{cached.repo}"
        known = KNOWN.fullmatch(kernel)
        self._generation = known and (known[1] or "2")
        """Which flash-attn it is; None where its interface is another."""

    def unavailable(self) -> str | None:
        from attnbench.devices import device

        if self._generation is None:
            return f"attnbench does not know how to call {self._cached.repo}"
        if self.device == "cpu":
            return f"on a CPU {self._cached.repo} has a kernel for sequences of various lengths alone"
        if reason := no_gpu(*GPUS[self._generation]) if self.device == "cuda" else device(self.device).unavailable():
            return str(reason)
        return no_package() or _no_build(self._cached.repo, self._cached.commit, self.device)

    def unsupported(self, problem: Problem) -> str | None:
        reason: str | None
        if self._generation == "4":
            reason = flash_attn_4.no_flash_attn_4(problem)
        elif self._generation == "3":
            reason = no_flash_attn_3(problem)
        else:
            reason = no_flash_attn_2(problem) or lost_window(problem)
        return reason

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        attend = _load(self._cached.repo, self._cached.commit, self.device).flash_attn_func
        choices: list[dict[str, Any]] = [{}]
        if self._generation == "4":
            choices = flash_attn_4.choices(problem, cores(q))
        elif "num_splits" in inspect.signature(attend).parameters:
            choices = [{"num_splits": count} for count in split_counts(problem, cores(q))]
        call: Callable[[], Tensor] = attending(attend, choices, problem, q, k, v)
        return call


class NoHubKernel(Backend):
    """What stands there while the cache holds no kernel."""

    name = "hf_kernels"
    device: DeviceKind = "cuda"
    summary = "attention kernels of the Hugging Face Hub, from the local cache"
    homepage = "https://huggingface.co/docs/kernels"
    libraries = MappingProxyType({"kernels": "0.17.2"})

    def unavailable(self) -> str | None:
        fill = f"python -c 'import kernels; kernels.install_kernel(\"{EXAMPLE}\", version=1)'"
        return no_package() or f"no attention kernel of the Hugging Face Hub is cached: {fill}"

    def unsupported(self, problem: Problem) -> str | None:
        return self.unavailable()

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        raise RuntimeError(self.unavailable())


def no_package() -> str | None:
    """Why the package cannot be imported. Its name is short, and also that of a folder of attnbench's own checkout."""
    if reason := not_installed("kernels", "hf-kernels"):
        return str(reason)
    spec = importlib.util.find_spec("kernels")
    folders = (spec and spec.submodule_search_locations) or []
    if any((Path(folder) / "load.py").exists() for folder in folders):
        return None
    return "another package called kernels comes before it on sys.path: run attnbench from another folder"


def cache_folder() -> Path:
    """Where the package keeps kernels, by the same variables."""
    hub = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    home = Path(os.environ.get("HF_HOME") or hub)
    named = os.environ.get("KERNELS_CACHE") or os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(named or home / "hub").expanduser()


def cached_kernels(folder: Path) -> Iterator[Cached]:
    """The attention kernels in a cache. One whose folders cannot be read is passed over."""
    for repo in sorted(folder.glob("kernels--*--*")):
        _, owner, kernel = repo.name.split("--", 2)
        if not ATTENTION.search(kernel):
            continue
        try:
            builds = sorted(repo.glob("snapshots/*/build"), key=lambda build: build.stat().st_mtime)
            names = [build.name for build in builds[-1].iterdir()] if builds else []
        except OSError:
            continue
        devices = tuple(kind for sign, kind in BUILDS if any(re.search(sign, name) for name in names))
        if devices:
            yield Cached(f"{owner}/{kernel}", builds[-1].parent.name, devices)


@functools.cache
def _no_build(repo: str, commit: str, device: DeviceKind) -> str | None:
    """Why none of its builds is for this torch, processor and GPU."""
    fits = _offline().has_kernel(repo, revision=commit, backend=_backend(device))
    return None if fits else f"{repo} has no build in the cache for this torch and this {device}"


def _load(repo: str, commit: str, device: DeviceKind) -> Any:
    """The kernel's module. Raises FileNotFoundError where it is not in the cache for this torch."""
    return _offline().get_kernel(repo, revision=commit, backend=_backend(device))


def _backend(device: DeviceKind) -> str | None:
    """The package takes cpu, or else what torch is built for."""
    return "cpu" if device == "cpu" else None


def _offline() -> Any:
    """The package, which is to look nowhere but in its cache."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants: Any = importlib.import_module("huggingface_hub.constants")
    constants.HF_HUB_OFFLINE = True  # where it was imported before
    return importlib.import_module("kernels")


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    found: dict[tuple[str, DeviceKind], Backend] = {}
    for cached in cached_kernels(cache_folder()):
        for kind in cached.devices:
            backend = HubKernel(cached, kind)
            found.setdefault((backend.name, kind), backend)  # names that differ in what is no letter or digit alone
    return list(found.values()) or [NoHubKernel()]
