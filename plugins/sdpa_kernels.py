"""torch's scaled_dot_product_attention held to one of its kernels on a GPU. Knows what each kernel refuses.

The limits are those of torch's own checks (sdp_utils.cpp); what torch refuses beyond them is a RUNTIME_ERROR.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from attnbench import Problem
from attnbench.problem import DeviceKind
from attnbench_plugins.sdpa import Sdpa

if TYPE_CHECKING:
    from torch import Tensor

HEAD_DIM_MULTIPLE = 8
"""Of the kernels that load 16 bytes at once, in fp16 and bf16."""


class SdpaKernel(Sdpa):
    """sdpa on a GPU with one kernel of the four. A plugin names it, its place in torch, and what it takes."""

    kernel: str
    """Its name in torch.nn.attention.SDPBackend."""
    least_capability: tuple[int, int] = (5, 0)
    """Compute capability that it needs."""
    lower_right = False
    """Whether it has a causal mask aligned bottom-right of its own, so that none is built."""

    def __init__(self) -> None:
        device: DeviceKind = "cuda"
        super().__init__(device)
        self.summary = f"sdpa's {self.kernel.lower().replace('_', ' ')} kernel alone (torch)"

    def unavailable(self) -> str | None:
        reason = super().unavailable()
        if reason is not None:
            return reason
        import torch

        capability = torch.cuda.get_device_capability()
        if capability < self.least_capability:
            has, needs = (".".join(map(str, pair)) for pair in (capability, self.least_capability))
            return f"it needs a GPU of compute capability {needs}, and this one has {has}"
        return self.not_built()

    def not_built(self) -> str | None:
        """Why this torch does not have it; None where it does."""
        return None

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        attend, kernel = super().prepare(problem, q, k, v), getattr(SDPBackend, self.kernel)

        def call() -> Tensor:
            with sdpa_kernel(kernel):
                return attend()

        return call

    def _mask(self, problem: Problem, q: Tensor) -> Tensor | None:
        import torch

        from attnbench_plugins.masks import visible

        # Where the kernel has none of its own, torch would build the mask of a causal_lower_right anew at each call…
        if self.lower_right and problem.causal and problem.window is None:
            return super()._mask(problem, q)
        seen = visible(problem, q.device)
        # …and of a mask of booleans one to be added, which is therefore what it gets.
        return None if seen is None else torch.zeros_like(seen, dtype=q.dtype).masked_fill_(~seen, -torch.inf)


def odd_head_dim(problem: Problem, multiple: int) -> str | None:
    """That a head size is no multiple of that, in words."""
    if problem.head_dim % multiple or problem.head_dim_v % multiple:
        return f"head sizes must be multiples of {multiple} in {problem.dtype}"
    return None
