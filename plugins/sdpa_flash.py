"""torch's flash attention on a GPU (FlashAttention-2), through scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Iterable

from attnbench import Backend, Problem, hookimpl
from attnbench_plugins.sdpa_kernels import SdpaKernel

MAX_HEAD_DIM = 256


class SdpaFlash(SdpaKernel):
    """No mask but a causal one. Grouped heads are read in place."""

    name = "sdpa_flash"
    kernel = "FLASH_ATTENTION"
    least_capability = (8, 0)
    lower_right = True

    def not_built(self) -> str | None:
        import torch

        built = torch.backends.cuda.is_flash_attention_available()
        return None if built else "this torch is built without flash attention"

    def unsupported(self, problem: Problem) -> str | None:
        if problem.dtype == "fp32":
            return "fp16 and bf16 only"
        if problem.head_dim != problem.head_dim_v:
            return "one head size for q, k and v"
        if problem.head_dim > MAX_HEAD_DIM:
            return f"head sizes up to {MAX_HEAD_DIM}"
        if problem.window is not None:
            return "no mask but a causal one"
        return super().unsupported(problem)


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [SdpaFlash()]
