"""Whether a peer's library can be used: is it installed, new enough, and what GPU is there. Imports none of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from attnbench.registry import installed_version

if TYPE_CHECKING:
    from torch import Tensor

GPU = tuple[int, int]
"""A compute capability, (major, minor)."""
HOPPER: GPU = (9, 0)
AFTER_HOPPER: GPU = (10, 0)


def missing(module: str, extra: str) -> str | None:
    """That no package `module` is installed, or what attnbench's extra for it wants is too old; None otherwise."""
    return _too_old(extra) if importlib.util.find_spec(module) is not None else _told(module, extra)


def not_installed(distribution: str, extra: str | None = None) -> str | None:
    """The same of a distribution, for those whose module does not tell; its extra has its name if none is given.

    flash-attn and flash-attn-4 both have a folder flash_attn, and flash_attn.cute in it; kernels may be any folder.
    """
    extra = extra or distribution
    return _too_old(extra) if installed_version(distribution) else _told(distribution, extra)


def no_gpu(least: GPU = (0, 0), below: GPU | None = None) -> str | None:
    """Why there is no GPU of compute capability `least` or later, and less than `below`; None where one is."""
    from attnbench.devices import device

    if reason := device("cuda").unavailable():
        return reason
    has = capability()
    if has < least or (below is not None and has >= below):
        needs = f"{_shown(least)} or later" if below is None else f"from {_shown(least)} to below {_shown(below)}"
        return f"it needs a GPU of compute capability {needs}, and this one has {_shown(has)}"
    return None


def capability() -> GPU:
    """The GPU's; Hopper's where there is none to ask, so that problems are refused as there."""
    import torch

    from attnbench.devices import device

    return HOPPER if device("cuda").unavailable() else torch.cuda.get_device_capability()


def cores(tensor: Tensor) -> int:
    """How many cores the tensor's device has, as attnbench counts them."""
    from attnbench.devices import device

    return device("cuda" if tensor.is_cuda else "cpu").info().cores or 1


def _too_old(extra: str) -> str | None:
    """That what is installed of an extra is not what attnbench's own metadata ask for."""
    try:
        needs = importlib.metadata.requires("attnbench") or []
    except importlib.metadata.PackageNotFoundError:  # run from its folder
        return None
    for need in map(Requirement, needs):
        has = installed_version(need.name)
        if has and need.marker and need.marker.evaluate({"extra": extra}) and not need.specifier.contains(has, True):
            return f"{need.name} {has} is installed, and it takes {need.specifier}: pip install 'attnbench[{extra}]'"
    return None


def _told(name: str, extra: str) -> str:
    return f"{name} is not installed: pip install 'attnbench[{extra}]'"


def _shown(capability: GPU) -> str:
    return ".".join(map(str, capability))
