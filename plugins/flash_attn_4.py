"""FlashAttention-4, written in CuTe DSL, on Hopper and Blackwell. Knows nothing of its kernels.

The limits are those of flash_attn/cute/interface.py: on Hopper it splits no keys, and takes any two head sizes that
its tiles have registers for; on Blackwell it splits them, and takes some head sizes.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind
from attnbench_plugins.flash_attn_family import (
    HEAD_DIM_MULTIPLE,
    HOMEPAGE,
    attending,
    cores,
    is_blackwell,
    not_installed,
    split_counts,
)
from attnbench_plugins.packages import no_gpu
from attnbench_plugins.sdpa_kernels import odd_head_dim

if TYPE_CHECKING:
    from torch import Tensor

DISTRIBUTION = "flash-attn-4"
INTERFACE = "flash_attn/cute/interface.py"
MAX_HEAD_DIM = 256
WIDE_TILE_HEAD_DIM, WIDE_TILE_MAX_VALUES = 96, 192
"""Up to that head size Hopper's tiles have 192 queries, not 128, and ptxas finds no registers for more values."""
BLACKWELL_HEAD_DIM = 128
BLACKWELL_PAIRS = ((192, 128), (256, 256))
"""Beside any two up to that."""


class FlashAttn4(Backend):
    """flash_attn.cute.flash_attn_func, compiled at its first call for what is constant in the problem."""

    name = "flash_attn_4"
    device: DeviceKind = "cuda"
    summary = "FlashAttention-4 in CuTe DSL (flash-attn-4)"
    homepage = HOMEPAGE
    libraries = MappingProxyType({DISTRIBUTION: "4.0.0b36"})

    def unavailable(self) -> str | None:
        return no_gpu((9, 0)) or not_installed(DISTRIBUTION) or overwritten()

    def unsupported(self, problem: Problem) -> str | None:
        if problem.direction != "fwd":
            return "forward only"
        if problem.dtype == "fp32":
            return "fp16 and bf16 only"
        return odd_head_dim(problem, HEAD_DIM_MULTIPLE) or _other_head_dims(problem.head_dim, problem.head_dim_v)

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        from flash_attn.cute import flash_attn_func

        choices: list[dict[str, Any]] = [{}]
        if is_blackwell():
            choices = [{"num_splits": count} for count in split_counts(problem, cores(q))]
        if problem.heads_q != problem.heads_kv:  # by itself it packs the heads of a group, always
            choices.append({"pack_gqa": False})
        call: Callable[[], Tensor] = attending(flash_attn_func, choices, problem, q, k, v)
        return call


def _other_head_dims(d: int, e: int) -> str | None:
    """Why it does not take head sizes of d for q and k, and e for v, on this GPU."""
    if is_blackwell():
        if max(d, e) <= BLACKWELL_HEAD_DIM or (d, e) in BLACKWELL_PAIRS:
            return None
        return f"on Blackwell head sizes up to {BLACKWELL_HEAD_DIM}, 192×128 and 256"
    if max(d, e) > MAX_HEAD_DIM:
        return f"head sizes up to {MAX_HEAD_DIM}"
    if d <= WIDE_TILE_HEAD_DIM and e > WIDE_TILE_MAX_VALUES:
        return f"values of up to {WIDE_TILE_MAX_VALUES} for head sizes up to {WIDE_TILE_HEAD_DIM}"
    return None


def overwritten() -> str | None:
    """That another distribution has written over it: flash-attn brings an older flash_attn.cute of the same name."""
    for file in importlib.metadata.files(DISTRIBUTION) or ():
        if str(file) == INTERFACE and file.size is not None and len(file.read_binary()) != file.size:
            return (
                f"flash-attn has written over its {INTERFACE}: "
                f"pip install --force-reinstall --no-deps {DISTRIBUTION} puts it back"
            )
    return None


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [FlashAttn4()]
