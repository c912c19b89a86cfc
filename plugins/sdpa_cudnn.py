"""cuDNN's attention on a GPU, through scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attnbench import Backend, Problem, hookimpl
from attnbench_plugins.sdpa_kernels import HEAD_DIM_MULTIPLE, SdpaKernel, odd_head_dim

MAX_HEAD_DIM = 128
"""On every GPU and in every cuDNN that has it; 256 takes a new cuDNN on Hopper or Blackwell."""
LEAST_VERSION = 90000


class SdpaCudnn(SdpaKernel):
    """It takes masks, and grouped heads as they are."""

    name = "sdpa_cudnn"
    kernel = "CUDNN_ATTENTION"
    least_capability = (8, 0)

    def not_built(self) -> str | None:
        import torch

        cudnn: Any = torch.backends.cudnn
        version = cudnn.version() if cudnn.is_available() else None
        if version is None:
            return "this torch has no cuDNN"
        return None if version >= LEAST_VERSION else f"it needs cuDNN 9, and this torch has {version}"

    def unsupported(self, problem: Problem) -> str | None:
        if problem.dtype == "fp32":
            return "fp16 and bf16 only"
        if max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
            return f"head sizes up to {MAX_HEAD_DIM}"
        if problem.seqlen_k == 1:
            return "more than one key"
        return odd_head_dim(problem, HEAD_DIM_MULTIPLE) or super().unsupported(problem)


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [SdpaCudnn()]
