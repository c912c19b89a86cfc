"""Why a peer's library cannot be used: it is not installed, or the GPU is not one that it runs on. Imports none."""

from __future__ import annotations

import importlib.util

GPU = tuple[int, int]
"""A compute capability, (major, minor)."""


def missing(module: str, extra: str) -> str | None:
    """That no package `module` is installed, with the extra of attnbench that has it; None where it is."""
    if importlib.util.find_spec(module) is not None:
        return None
    return f"{module} is not installed: pip install 'attnbench[{extra}]'"


def no_gpu(least: GPU = (0, 0), below: GPU | None = None) -> str | None:
    """Why there is no GPU of compute capability `least` or later, and less than `below`; None where one is."""
    from attnbench.devices import device

    if reason := device("cuda").unavailable():
        return reason
    import torch

    has = torch.cuda.get_device_capability()
    if has < least or (below is not None and has >= below):
        needs = f"{_shown(least)} or later" if below is None else f"from {_shown(least)} to below {_shown(below)}"
        return f"it needs a GPU of compute capability {needs}, and this one has {_shown(has)}"
    return None


def _shown(capability: GPU) -> str:
    return ".".join(map(str, capability))
