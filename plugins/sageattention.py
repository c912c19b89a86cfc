"""SageAttention 1 on a GPU: Triton kernels that round q and k to INT8. Its precision is its own, and not the dtype's.

The limits are those of sageattention 1.0.6 (core.py and the kernels beside it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import TYPE_CHECKING

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind
from attnbench_plugins.packages import missing, no_gpu

if TYPE_CHECKING:
    from torch import Tensor

LEAST_CAPABILITY = (8, 0)
HEAD_DIMS = (64, 96, 128)
KEYS_A_BLOCK = 64


class SageAttention(Backend):
    """sageattention.core.sageattn, whose smoothing of k is done before it, since it would do it in place."""

    name = "sageattention"
    device: DeviceKind = "cuda"
    summary = "SageAttention 1: Q Kᵀ in INT8, P V in fp16 (sageattention)"
    homepage = "https://github.com/thu-ml/SageAttention"
    libraries = MappingProxyType({"sageattention": "1.0.6"})

    def unavailable(self) -> str | None:
        absent = missing("sageattention", self.name) or missing("triton", self.name)
        reason: str | None = no_gpu(LEAST_CAPABILITY) or absent
        return reason

    def unsupported(self, problem: Problem) -> str | None:
        if problem.direction != "fwd":
            return "forward only"
        if problem.head_dim not in HEAD_DIMS or problem.head_dim_v != problem.head_dim:
            return "one head size for q, k and v, of 64, 96 and 128"
        if problem.window is not None:
            return "no sliding window"
        if problem.causal and problem.seqlen_q != problem.seqlen_k:
            return "causal only for as many queries as keys"
        if not problem.causal and problem.seqlen_k % KEYS_A_BLOCK:
            return (
                f"without a causal mask, keys in multiples of {KEYS_A_BLOCK}: what fills the last block is not masked"
            )
        return None

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        from sageattention.core import sageattn

        causal, scale = problem.causal, problem.softmax_scale

        def call() -> Tensor:
            # What its own smoothing does, by which less is lost to INT8, and which it does in the caller's k.
            smooth = k - k.mean(dim=2, keepdim=True)
            output: Tensor = sageattn(q, smooth, v, "HND", is_causal=causal, sm_scale=scale, smooth_k=False)
            return output

        call()
        return call


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [SageAttention()]
