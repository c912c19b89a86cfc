"""torch_npu's attention for decoding: IncreFlashAttention, one query a head. Not yet run on hardware."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind
from attnbench_plugins import npu_operators

if TYPE_CHECKING:
    from torch import Tensor

OPERATOR = "npu_incre_flash_attention"
INNER_PRECISE = 0
"""High precision, as npu_fused_attention has it; the default here is 1, high performance."""


class NpuIncreFlashAttention(Backend):
    """torch_npu.npu_incre_flash_attention, whose scale is called scale_value. Its single query sees all keys."""

    name = "npu_incre_flash_attention"
    device: DeviceKind = "npu"
    summary = f"torch_npu.npu_incre_flash_attention, inner_precise {INNER_PRECISE} (not yet run on hardware)"
    homepage: str = npu_operators.HOMEPAGE
    libraries: Mapping[str, str] = npu_operators.LIBRARIES

    def unavailable(self) -> str | None:
        reason: str | None = npu_operators.unavailable(OPERATOR)
        return reason

    def unsupported(self, problem: Problem) -> str | None:
        reason: str | None = npu_operators.inference_limits(problem, decodes=True)
        if reason is None and problem.seqlen_q != 1:
            return "one query a head, as in decoding"
        return reason

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        npu_operators.require_contiguous(q, k, v)
        attend = npu_operators.operator(OPERATOR)
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
