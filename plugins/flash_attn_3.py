"""FlashAttention-3 on Hopper, in as many splits as are fastest. Knows nothing of its kernels.

It is built from the flash-attention repository (module flash_attn_interface), with any of its features left out, or
comes from PyPI as fa3-fwd (fa3_fwd_interface), with some left out. What was left out stands in a module beside it. The
limits are those of mha_fwd (hopper/flash_api.cpp).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind
from attnbench_plugins.flash_attn_family import HOMEPAGE, attending, no_flash_attn_3, split_counts
from attnbench_plugins.packages import AFTER_HOPPER, HOPPER, cores, no_gpu

if TYPE_CHECKING:
    from torch import Tensor

BUILDS = MappingProxyType({"flash_attn_interface": "flash_attn_config", "fa3_fwd_interface": "fa3_fwd_config"})
"""The modules that have it, the fuller one first, each with the one that says how it was built."""
HEAD_DIMS = (64, 96, 128, 192, 256)
"""What the kernels are built for."""
SMALL_HEAD_DIM = 64
"""Up to which larger values have kernels of their own; where those are missing another runs, which leaves some out."""


class FlashAttn3(Backend):
    """flash_attn_with_kvcache, which is flash_attn_func without gradients."""

    name = "flash_attn_3"
    device: DeviceKind = "cuda"
    summary = "FlashAttention-3, in the fastest number of splits (flash-attn-3 or fa3-fwd)"
    homepage = HOMEPAGE
    libraries = MappingProxyType({"flash-attn-3": "3.0.0", "fa3-fwd": "0.0.3"})

    def unavailable(self) -> str | None:
        reason: str | None = no_gpu(HOPPER, AFTER_HOPPER)
        if reason is None and not installed():
            return (
                "flash_attn_interface is not installed: pip install 'attnbench[fa3-fwd]' for bf16 without windows, "
                "or build the folder hopper of the flash-attention repository"
            )
        return reason

    def unsupported(self, problem: Problem) -> str | None:
        refused: str | None = no_flash_attn_3(problem)
        here = installed()
        return refused or (left_out(here[0], problem) if here else None)

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        attend = importlib.import_module(installed()[0]).flash_attn_with_kvcache
        counts = split_counts(problem, cores(q))
        choices: list[dict[str, Any]] = [{"num_splits": count} for count in counts]
        if problem.heads_q != problem.heads_kv:
            # In splits the heads of a group are always packed; without them it would choose one of these by itself.
            choices.remove({"num_splits": 1})
            choices += [{"num_splits": 1, "pack_gqa": packed} for packed in (True, False)]
        call: Callable[[], Tensor] = attending(attend, choices, problem, q, k, v)
        return call


def installed() -> list[str]:
    """The modules of FlashAttention-3 that are there, the fuller one first."""
    return [module for module in BUILDS if importlib.util.find_spec(module) is not None]


def left_out(module: str, problem: Problem) -> str | None:
    """What a problem needs that was left out of that build, where its kernels give an error or wrong values without."""
    out = disabled(module)
    if problem.dtype == "fp16" and "FP16" in out:
        return f"this {module} is built without fp16"
    largest = max((size for size in HEAD_DIMS if f"HDIM{size}" not in out), default=0)
    if problem.head_dim > largest:
        return f"head sizes up to {largest}"
    if problem.head_dim <= SMALL_HEAD_DIM < problem.head_dim_v and {"HDIM64", "HDIMDIFF64"} & out:
        return f"this {module} is built without values of more than {SMALL_HEAD_DIM} for keys of up to {SMALL_HEAD_DIM}"
    if local(problem) and "LOCAL" in out:
        return f"this {module} is built without windows"
    return None


def disabled(module: str) -> set[str]:
    """What that build left out, as FP16, LOCAL or HDIM256; nothing where it does not say."""
    if importlib.util.find_spec(BUILDS[module]) is None:
        return set()
    flags = importlib.import_module(BUILDS[module]).CONFIG["build_flags"]  # plain data, made by its setup.py
    return {name.rpartition("DISABLE_")[2] for name, is_set in flags.items() if is_set and "DISABLE_" in name}


def local(problem: Problem) -> bool:
    """Whether the mask is a window to it: one that hides nothing is none."""
    if problem.window is None:
        return False
    return problem.window < problem.seqlen_k or (problem.window < problem.seqlen_q and not problem.causal)


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [FlashAttn3()]
