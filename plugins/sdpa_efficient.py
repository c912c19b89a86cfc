"""torch's memory-efficient attention on a GPU (from xFormers), through scaled_dot_product_attention.

It takes masks, fp32, and values of another size than keys.
"""

from __future__ import annotations

from collections.abc import Iterable

from attnbench import Backend, Problem, hookimpl
from attnbench_plugins.sdpa_kernels import HEAD_DIM_MULTIPLE, SdpaKernel, odd_head_dim


def refusal(problem: Problem) -> str | None:
    """Why it cannot do a problem."""
    if problem.heads_q != problem.heads_kv:
        return "no grouped heads, which it takes in the newest versions of torch alone"
    odd: str | None = odd_head_dim(problem, HEAD_DIM_MULTIPLE // 2 if problem.dtype == "fp32" else HEAD_DIM_MULTIPLE)
    return odd


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [SdpaKernel("sdpa_efficient", "EFFICIENT_ATTENTION", refusal, lower_right=True)]
