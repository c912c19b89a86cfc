"""FlashAttention-2 of the distribution flash-attn, in as many splits as are fastest. Knows nothing of its kernels.

Its function for a cache of keys is the one that lets the caller choose the splits; with no cache lengths it is the same
attention. The limits are those of its mha_fwd_kvcache (csrc/flash_attn/flash_api.cpp).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import TYPE_CHECKING

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind
from attnbench_plugins.flash_attn_family import (
    HOMEPAGE,
    attending,
    lost_window,
    no_flash_attn_2,
    split_counts,
)
from attnbench_plugins.packages import cores, no_gpu, not_installed

if TYPE_CHECKING:
    from torch import Tensor


class FlashAttn(Backend):
    """flash_attn_with_kvcache, which is flash_attn_func with a choice of splits."""

    name = "flash_attn"
    device: DeviceKind = "cuda"
    summary = "FlashAttention-2, in the fastest number of splits (flash-attn)"
    homepage = HOMEPAGE
    libraries = MappingProxyType({"flash-attn": "2.8.3.post2"})

    def unavailable(self) -> str | None:
        reason: str | None = no_gpu((8, 0)) or not_installed("flash-attn")
        return reason

    def unsupported(self, problem: Problem) -> str | None:
        reason: str | None = no_flash_attn_2(problem) or lost_window(problem)
        return reason

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        from flash_attn import flash_attn_with_kvcache

        choices = [{"num_splits": count} for count in split_counts(problem, cores(q))]
        call: Callable[[], Tensor] = attending(flash_attn_with_kvcache, choices, problem, q, k, v)
        return call


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [FlashAttn()]
