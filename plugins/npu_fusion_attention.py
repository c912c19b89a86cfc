"""torch_npu's attention for training, forward: FlashAttentionScore. Not yet run on hardware."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind
from attnbench_plugins import npu_operators
from attnbench_plugins.masks import hides

if TYPE_CHECKING:
    from torch import Tensor

OPERATOR = "npu_fusion_attention"
LONGEST = 1 << 20


class NpuFusionAttention(Backend):
    """torch_npu.npu_fusion_attention, which gives softmax's maxima and sums too. It cannot be captured as a graph."""

    name = "npu_fusion_attention"
    device: DeviceKind = "npu"
    summary = "torch_npu.npu_fusion_attention, the operator for training (not yet run on hardware)"
    homepage: str = npu_operators.HOMEPAGE
    libraries: Mapping[str, str] = npu_operators.LIBRARIES

    def unavailable(self) -> str | None:
        reason: str | None = npu_operators.unavailable(OPERATOR)
        return reason

    def unsupported(self, problem: Problem) -> str | None:
        reason: str | None = npu_operators.limits(problem, largest_head_dim=768, largest_group=None)
        if reason is None and max(problem.seqlen_q, problem.seqlen_k) > LONGEST:
            return f"up to {LONGEST} keys and queries"
        return reason

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        npu_operators.require_contiguous(q, k, v)
        attend = npu_operators.operator(OPERATOR)
        heads, layout = problem.heads_q, "BNSD"
        # The scale is always given: its default is 1.
        options: dict[str, object] = {
            "scale": problem.softmax_scale,
            "keep_prob": 1.0,
            "pre_tockens": npu_operators.EVERY_TOKEN,  # so spelled
            "next_tockens": npu_operators.EVERY_TOKEN,
        }
        if hides(problem):
            options |= npu_operators.causal(q.device)

        def call() -> Tensor:
            output: Tensor = attend(q, k, v, heads, layout, **options)[0]
            return output

        return call


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [NpuFusionAttention()]
