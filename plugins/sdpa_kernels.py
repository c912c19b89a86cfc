"""torch's scaled_dot_product_attention held to one of its kernels. Knows none: each has a plugin of its own.

The limits are those of torch's own checks (sdp_utils.cpp); what torch refuses beyond them is a RUNTIME_ERROR.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from attnbench import Backend, Problem
from attnbench.problem import DeviceKind
from attnbench_plugins.packages import GPU, no_gpu
from attnbench_plugins.sdpa import Sdpa, attending, bottom_right

if TYPE_CHECKING:
    from torch import Tensor

HEAD_DIM_MULTIPLE = 8
"""Of the kernels that load 16 bytes at once, in fp16 and bf16."""


class SdpaKernel(Backend):
    """sdpa with one of its kernels."""

    def __init__(
        self,
        name: str,
        kernel: str,
        refusal: Callable[[Problem], str | None],
        *,
        least_capability: GPU = (5, 0),
        not_built: Callable[[], str | None] = lambda: None,
        lower_right: bool = False,
        zeros: bool = False,
        device: DeviceKind = "cuda",
    ) -> None:
        """`kernel` is its name in torch.nn.attention.SDPBackend, `refusal` why it cannot do a problem, `not_built` why
        this torch does not have it, and `least_capability` the compute capability that it needs of a GPU.

        With `lower_right` it has a causal mask aligned bottom-right of its own, so that none is built; with `zeros` it
        gives zeros to a query that sees no key.
        """
        self._sdpa: Backend = Sdpa(device)
        self.device = device
        self.name, self.homepage = name, self._sdpa.homepage
        self.summary = f"sdpa's {kernel.lower().replace('_', ' ')} kernel alone (torch)"
        self.kernel = kernel
        self._refusal, self._least_capability, self._not_built = refusal, least_capability, not_built
        self._lower_right, self._zeros = lower_right, zeros

    def unavailable(self) -> str | None:
        if self.device == "cpu":
            return self._sdpa.unavailable()
        return no_gpu(self._least_capability) or self._not_built()

    def unsupported(self, problem: Problem) -> str | None:
        if problem.direction == "fwd" and self._zeros:
            return self._refusal(problem)
        return self._refusal(problem) or self._sdpa.unsupported(problem)

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        attend: Callable[[], Tensor] = attending(problem, q, k, v, self._mask)
        kernel = getattr(SDPBackend, self.kernel)

        def call() -> Tensor:
            with sdpa_kernel(kernel):
                return attend()

        return call

    def parallel_units(self, problem: Problem) -> int | None:
        return self._sdpa.parallel_units(problem)

    def _mask(self, problem: Problem, q: Tensor) -> Tensor | None:
        mask: Tensor | None = bottom_right(problem, q, own=self._lower_right)
        return mask


def odd_head_dim(problem: Problem, multiple: int) -> str | None:
    """That a head size is no multiple of that, in words."""
    if problem.head_dim % multiple or problem.head_dim_v % multiple:
        return f"head sizes must be multiples of {multiple} in {problem.dtype}"
    return None
