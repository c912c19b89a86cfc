"""torch's memory-efficient attention on a GPU (from xFormers), through scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Iterable

from attnbench import Backend, Problem, hookimpl
from attnbench_plugins.sdpa_kernels import HEAD_DIM_MULTIPLE, SdpaKernel, odd_head_dim


class SdpaEfficient(SdpaKernel):
    """It takes masks, fp32, and values of another size than keys."""

    name = "sdpa_efficient"
    kernel = "EFFICIENT_ATTENTION"
    lower_right = True

    def unsupported(self, problem: Problem) -> str | None:
        if problem.heads_q != problem.heads_kv:
            return "no grouped heads, which it takes in the newest versions of torch alone"
        multiple = HEAD_DIM_MULTIPLE // 2 if problem.dtype == "fp32" else HEAD_DIM_MULTIPLE
        return odd_head_dim(problem, multiple) or super().unsupported(problem)


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [SdpaEfficient()]
