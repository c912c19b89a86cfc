"""torch's attention of single operations on a GPU, to which scaled_dot_product_attention falls back."""

from __future__ import annotations

from collections.abc import Iterable

from attnbench import Backend, Problem, hookimpl
from attnbench_plugins.sdpa_kernels import SdpaKernel


class SdpaMath(SdpaKernel):
    """It takes everything; keys and values of grouped heads are copied for each query head, at each call."""

    name = "sdpa_math"
    kernel = "MATH"

    def unsupported(self, problem: Problem) -> str | None:
        # Unlike the fused kernels it gives zeros to a query that sees no key.
        return None if problem.direction == "fwd" else "forward only"


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [SdpaMath()]
