"""FlashAttention-4, written in CuTe DSL, on Hopper and Blackwell. Knows nothing of its kernels.

The limits are those of flash_attn/cute/interface.py, which knows three kinds of these GPUs: Hopper, where it splits no
keys and takes any two head sizes that its tiles have registers for; compute capability 10.x and 11.x, where it splits
them and takes some head sizes; and 12.x, where it has the kernels of 8.x, and tiles must fit into little memory.
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
    split_counts,
)
from attnbench_plugins.packages import AFTER_HOPPER, GPU, HOPPER, capability, cores, no_gpu, not_installed
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
LEAST_CAPABILITY: GPU = (8, 0)
CAPABILITY_12: GPU = (12, 0)
BELOW_CAPABILITY: GPU = (13, 0)
MAX_HEAD_DIM_OF_12 = 192
"""Of 128 queries and 64 keys and values the tiles fill 96 of 99 KiB then; the output is put where the queries were."""


class FlashAttn4(Backend):
    """flash_attn.cute.flash_attn_func, compiled at its first call for what is constant in the problem."""

    name = "flash_attn_4"
    device: DeviceKind = "cuda"
    summary = "FlashAttention-4 in CuTe DSL (flash-attn-4)"
    homepage = HOMEPAGE
    libraries = MappingProxyType({DISTRIBUTION: "4.0.0b36"})

    def unavailable(self) -> str | None:
        reason: str | None = no_gpu(LEAST_CAPABILITY, BELOW_CAPABILITY)
        if reason is None and capability() < HOPPER:
            reason = "attnbench does not ask for its kernels for compute capability 8.x, which it has not run"
        return reason or not_installed(DISTRIBUTION) or overwritten()

    def unsupported(self, problem: Problem) -> str | None:
        return no_flash_attn_4(problem)

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        from flash_attn.cute import flash_attn_func

        call: Callable[[], Tensor] = attending(flash_attn_func, choices(problem, cores(q)), problem, q, k, v)
        return call


def no_flash_attn_4(problem: Problem) -> str | None:
    """Why FlashAttention-4 cannot do a problem on this GPU, whoever brings it."""
    if problem.direction != "fwd":
        return "forward only"
    if problem.dtype == "fp32":
        return "fp16 and bf16 only"
    return odd_head_dim(problem, HEAD_DIM_MULTIPLE) or _other_head_dims(problem.head_dim, problem.head_dim_v)


def choices(problem: Problem, cores: int) -> list[dict[str, Any]]:
    """What it leaves to the caller: the splits of the keys where it has them, and whether grouped heads are packed."""
    found: list[dict[str, Any]] = [{}]
    if _splits():
        found = [{"num_splits": count} for count in split_counts(problem, cores)]
    if problem.heads_q != problem.heads_kv:  # by itself it packs the heads of a group, always
        found.append({"pack_gqa": False})
    return found


def _splits() -> bool:
    has_them: bool = AFTER_HOPPER <= capability() < CAPABILITY_12
    return has_them


def _other_head_dims(d: int, e: int) -> str | None:
    """Why it does not take head sizes of d for q and k, and e for v, on this GPU."""
    if capability() >= CAPABILITY_12:
        if e <= d <= MAX_HEAD_DIM_OF_12:
            return None
        return f"on compute capability 12.x head sizes up to {MAX_HEAD_DIM_OF_12}, and values no larger than keys"
    if _splits():
        if max(d, e) <= BLACKWELL_HEAD_DIM or (d, e) in BLACKWELL_PAIRS:
            return None
        return f"on compute capability 10.x and 11.x head sizes up to {BLACKWELL_HEAD_DIM}, 192×128 and 256"
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
