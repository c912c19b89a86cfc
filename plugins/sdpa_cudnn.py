"""cuDNN's attention on a GPU, through scaled_dot_product_attention. It takes masks, and grouped heads as they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attnbench import Backend, Problem, hookimpl
from attnbench_plugins.sdpa_kernels import HEAD_DIM_MULTIPLE, SdpaKernel, odd_head_dim

MAX_HEAD_DIM = 128
"""On every GPU and in every cuDNN that has it; 256 takes a new cuDNN on Hopper or Blackwell."""
LEAST_VERSION = 90000


def refusal(problem: Problem) -> str | None:
    """Why it cannot do a problem."""
    if problem.dtype == "fp32":
        return "fp16 and bf16 only"
    if max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
        return f"head sizes up to {MAX_HEAD_DIM}"
    if problem.seqlen_k == 1:
        return "more than one key"
    odd: str | None = odd_head_dim(problem, HEAD_DIM_MULTIPLE)
    return odd


def not_built() -> str | None:
    """Why this torch does not have it."""
    import torch

    cudnn: Any = torch.backends.cudnn
    version = cudnn.version() if cudnn.is_available() else None
    if version is None:
        return "this torch has no cuDNN"
    return None if version >= LEAST_VERSION else f"it needs cuDNN 9, and this torch has {version}"


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [SdpaKernel("sdpa_cudnn", "CUDNN_ATTENTION", refusal, least_capability=(8, 0), not_built=not_built)]
