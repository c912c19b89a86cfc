"""torch_npu's attention for training, forward: FlashAttentionScore. Not yet run on hardware."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from attnbench import Backend, Problem, hookimpl
from attnbench_plugins.npu_operators import SPARSE_MODE_CAUSAL, NpuOperator, causal_mask, require_contiguous

if TYPE_CHECKING:
    from torch import Tensor

EVERY_TOKEN = 2**31 - 1
"""What pre_tockens and next_tockens, so spelled, are where they hide nothing."""
LONGEST = 1 << 20


class NpuFusionAttention(NpuOperator):  # type: ignore[misc]
    """torch_npu.npu_fusion_attention, which gives softmax's maxima and sums too. It cannot be captured as a graph."""

    name = "npu_fusion_attention"
    summary = "torch_npu.npu_fusion_attention, the operator for training (not yet run on hardware)"
    largest_head_dim = 768
    largest_group = None

    def unsupported(self, problem: Problem) -> str | None:
        reason: str | None = super().unsupported(problem)
        if reason:
            return reason
        return f"up to {LONGEST} keys and queries" if max(problem.seqlen_q, problem.seqlen_k) > LONGEST else None

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        require_contiguous(q, k, v)
        attend = self.operator
        heads, layout = problem.heads_q, "BNSD"
        # The scale is always given: its default is 1.
        options: dict[str, object] = {
            "scale": problem.softmax_scale,
            "keep_prob": 1.0,
            "pre_tockens": EVERY_TOKEN,
            "next_tockens": EVERY_TOKEN,
        }
        if problem.causal:
            options |= {"atten_mask": causal_mask(q.device), "sparse_mode": SPARSE_MODE_CAUSAL}

        def call() -> Tensor:
            output: Tensor = attend(q, k, v, heads, layout, **options)[0]
            return output

        return call


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [NpuFusionAttention()]
