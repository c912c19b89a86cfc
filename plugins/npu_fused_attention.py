"""torch_npu's fused inference attention: the baseline on an Ascend NPU. Not yet run on hardware."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind
from attnbench_plugins import npu_operators
from attnbench_plugins.masks import hides

if TYPE_CHECKING:
    from torch import Tensor

OPERATOR = "npu_fused_infer_attention_score"
INNER_PRECISE = 0
"""High precision, its default; 1 trades precision of fp16 for speed."""


class NpuFusedAttention(Backend):
    """torch_npu.npu_fused_infer_attention_score; of a single query it becomes the operator for decoding."""

    name = "npu_fused_attention"
    device: DeviceKind = "npu"
    summary = f"torch_npu.npu_fused_infer_attention_score, inner_precise {INNER_PRECISE} (not yet run on hardware)"
    homepage: str = npu_operators.HOMEPAGE
    libraries: Mapping[str, str] = npu_operators.LIBRARIES

    def unavailable(self) -> str | None:
        reason: str | None = npu_operators.unavailable(OPERATOR)
        return reason

    def unsupported(self, problem: Problem) -> str | None:
        reason: str | None = npu_operators.inference_limits(problem, decodes=problem.seqlen_q == 1)
        return reason

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        npu_operators.require_contiguous(q, k, v)
        attend = npu_operators.operator(OPERATOR)
        # The scale is always given: its default is 1.
        options: dict[str, object] = {
            "num_heads": problem.heads_q,
            "num_key_value_heads": problem.heads_kv,
            "scale": problem.softmax_scale,
            "input_layout": "BNSD",
            "inner_precise": INNER_PRECISE,
        }
        if hides(problem):  # a single query knows no sparse mode
            options |= npu_operators.causal(q.device)

        def call() -> Tensor:
            output: Tensor = attend(q, k, v, **options)[0]
            return output

        return call


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [NpuFusedAttention()]
