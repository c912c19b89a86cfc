"""torch_npu's attention for decoding: IncreFlashAttention, one query a head. Not yet run on hardware."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from attnbench import Backend, Problem, hookimpl
from attnbench_plugins.npu_operators import NpuOperator, inference_limits, require_contiguous

if TYPE_CHECKING:
    from torch import Tensor

INNER_PRECISE = 0
"""High precision, as npu_fused_attention has it; the default here is 1, high performance."""


class NpuIncreFlashAttention(NpuOperator):  # type: ignore[misc]
    """torch_npu.npu_incre_flash_attention, whose scale is called scale_value. Its single query sees all keys."""

    name = "npu_incre_flash_attention"
    summary = f"torch_npu.npu_incre_flash_attention, inner_precise {INNER_PRECISE} (not yet run on hardware)"

    def unsupported(self, problem: Problem) -> str | None:
        reason: str | None = super().unsupported(problem) or inference_limits(problem)
        if reason:
            return reason
        return "one query a head, as in decoding" if problem.seqlen_q != 1 else None

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        require_contiguous(q, k, v)
        attend = self.operator
        # The scale is always given: its default is 1.
        options: dict[str, object] = {
            "num_heads": problem.heads_q,
            "num_key_value_heads": problem.heads_kv,
            "scale_value": problem.softmax_scale,
            "input_layout": "BNSD",
            "inner_precise": INNER_PRECISE,
        }

        def call() -> Tensor:
            output: Tensor = attend(q, k, v, **options)
            return output

        return call


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [NpuIncreFlashAttention()]
