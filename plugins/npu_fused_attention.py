"""torch_npu's fused inference attention: the baseline on an Ascend NPU. Not yet run on hardware."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind

if TYPE_CHECKING:
    from torch import Tensor

SPARSE_MODE_CAUSAL_LOWER_RIGHT = 3
CAUSAL_MASK_SIZE = 2048
"""Sparse modes 2 to 4 take one compressed mask of this size, whatever the lengths."""


class NpuFusedAttention(Backend):
    """torch_npu.npu_fused_infer_attention_score on BNSD tensors, which are BHSD by another name."""

    name = "npu_fused_attention"
    device: DeviceKind = "npu"
    summary = "torch_npu.npu_fused_infer_attention_score (not yet run on hardware)"
    homepage = "https://gitee.com/ascend/pytorch"

    def unavailable(self) -> str | None:
        from attnbench.devices import device

        return device("npu").unavailable()

    def unsupported(self, problem: Problem) -> str | None:
        if problem.direction != "fwd":
            return "forward only"
        if problem.dtype == "fp32":
            return "fp16 and bf16 only"
        if problem.head_dim != problem.head_dim_v:
            return "one head size for q, k and v"
        if problem.window is not None:
            return "no sliding window"
        return None

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        import torch
        import torch_npu

        attend = torch_npu.npu_fused_infer_attention_score
        # The scale is always given: its default is 1.
        options: dict[str, object] = {
            "num_heads": problem.heads_q,
            "num_key_value_heads": problem.heads_kv,
            "scale": problem.softmax_scale,
            "input_layout": "BNSD",
        }
        if problem.causal:
            size = (CAUSAL_MASK_SIZE, CAUSAL_MASK_SIZE)
            options["atten_mask"] = torch.ones(size, dtype=torch.bool, device=q.device).triu_(1)
            options["sparse_mode"] = SPARSE_MODE_CAUSAL_LOWER_RIGHT

        def call() -> Tensor:
            output: Tensor = attend(q, k, v, **options)[0]
            return output

        return call


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [NpuFusedAttention()]
