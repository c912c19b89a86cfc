"""torch's flash attention on a GPU (FlashAttention-2), through scaled_dot_product_attention.

It takes no mask but a causal one, and grouped heads as they are.
"""

from __future__ import annotations

from collections.abc import Iterable

from attnbench import Backend, Problem, hookimpl
from attnbench_plugins.flash_attn_family import no_flash_attn_2
from attnbench_plugins.sdpa_kernels import SdpaKernel


def refusal(problem: Problem) -> str | None:
    """Why it cannot do a problem."""
    reason: str | None = no_flash_attn_2(problem)
    return reason or ("no mask but a causal one" if problem.window is not None else None)


def not_built() -> str | None:
    """Why this torch does not have it."""
    import torch

    built = torch.backends.cuda.is_flash_attention_available()
    return None if built else "this torch is built without flash attention"


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    own = {"least_capability": (8, 0), "not_built": not_built, "lower_right": True}
    return [SdpaKernel("sdpa_flash", "FLASH_ATTENTION", refusal, **own)]
