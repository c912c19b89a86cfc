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
from attnbench_plugins.flash_attn_family import HEAD_DIM_MULTIPLE, HOMEPAGE, attending, cores, split_counts
from attnbench_plugins.packages import no_gpu
from attnbench_plugins.sdpa_kernels import odd_head_dim

if TYPE_CHECKING:
    from torch import Tensor

BUILDS = MappingProxyType({"flash_attn_interface": "flash_attn_config", "fa3_fwd_interface": "fa3_fwd_config"})
"""The modules that have it, the fuller one first, each with the one that says how it was built."""
HEAD_DIMS = (64, 96, 128, 192, 256)
"""What the kernels are built for."""


class FlashAttn3(Backend):
    """flash_attn_with_kvcache, which is flash_attn_func without gradients."""

    name = "flash_attn_3"
    device: DeviceKind = "cuda"
    summary = "FlashAttention-3, in the fastest number of splits (flash-attn-3 or fa3-fwd)"
    homepage = HOMEPAGE
    libraries = MappingProxyType({"flash-attn-3": "3.0.0", "fa3-fwd": "0.0.3"})

    def unavailable(self) -> str | None:
        reason: str | None = no_gpu((9, 0), (10, 0))
        if reason is None and installed() is None:
            return (
                "flash_attn_interface is not installed: pip install 'attnbench[fa3-fwd]' for bf16 without windows, "
                "or build the folder hopper of the flash-attention repository"
            )
        return reason

    def unsupported(self, problem: Problem) -> str | None:
        module = installed()
        left_out = set() if module is None else disabled(module)
        d, e = problem.head_dim, problem.head_dim_v
        if problem.direction != "fwd":
            return "forward only"
        if problem.dtype == "fp32":
            return "fp16 and bf16 only"
        if problem.dtype == "fp16" and "FP16" in left_out:
            return f"this {module} is built without fp16"
        odd: str | None = odd_head_dim(problem, HEAD_DIM_MULTIPLE)
        if odd:
            return odd
        largest = max((size for size in HEAD_DIMS if f"HDIM{size}" not in left_out), default=0)
        if d > largest:
            return f"head sizes up to {largest}"
        if d != e and not (d <= 64 and e <= 512) and not (128 < d <= 192 and 96 < e <= 128):
            return "values of another size than keys only for head sizes up to 64×512, or of 136–192×104–128"
        if local(problem) and "LOCAL" in left_out:
            return f"this {module} is built without windows"
        return None

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        attend = importlib.import_module(installed() or next(iter(BUILDS))).flash_attn_with_kvcache
        choices: list[dict[str, Any]] = [{"num_splits": count} for count in split_counts(problem, cores(q))]
        if problem.heads_q != problem.heads_kv:  # in splits the heads of a group are always packed
            choices += [{"num_splits": 1, "pack_gqa": packed} for packed in (True, False)]
        call: Callable[[], Tensor] = attending(attend, choices, problem, q, k, v)
        return call


def installed() -> str | None:
    """The module of FlashAttention-3 that is there."""
    return next((module for module in BUILDS if importlib.util.find_spec(module) is not None), None)


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
