"""Transformer Engine's DotProductAttention, held to its fused attention, which is cuDNN's.

It wants heads next to the head size. Where a problem's heads cannot be told as more sequences of one head, it copies
q, k and v into that order at each call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind
from attnbench_plugins.cudnn_frontend import refusal
from attnbench_plugins.masks import hides, window_size
from attnbench_plugins.packages import missing, no_gpu

if TYPE_CHECKING:
    from torch import Tensor

FUSED_ALONE = {"NVTE_FUSED_ATTN": "1", "NVTE_FLASH_ATTN": "0", "NVTE_UNFUSED_ATTN": "0"}
"""Its switches for which attention it may take: with this one alone it raises where cuDNN cannot."""


class TransformerEngine(Backend):
    """A DotProductAttention for the problem; its first call picks cuDNN's plan."""

    name = "transformer_engine"
    device: DeviceKind = "cuda"
    summary = "Transformer Engine's DotProductAttention, with cuDNN's fused attention alone"
    homepage = "https://docs.nvidia.com/deeplearning/transformer-engine/user-guide/api/pytorch.html"
    libraries = MappingProxyType({"transformer-engine": "2.20.2", "transformer-engine-torch": "2.20.2"})

    def unavailable(self) -> str | None:
        reason: str | None = no_gpu((8, 0))
        for module in ("transformer_engine", "transformer_engine_torch"):
            reason = reason or missing(module, "transformer-engine")
        return reason

    def unsupported(self, problem: Problem) -> str | None:
        reason: str | None = refusal(problem)
        return reason

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        import torch

        os.environ.update(FUSED_ALONE)
        from transformer_engine.pytorch import DotProductAttention

        folded = problem.heads_q == problem.heads_kv or problem.seqlen_q == 1
        sequences = problem.batch * problem.heads_kv if folded else problem.batch
        heads_q, heads_kv = (problem.heads_q * problem.batch // sequences, 1 if folded else problem.heads_kv)
        lengths = (problem.seqlen_q, problem.seqlen_k)
        attention: Any = DotProductAttention(
            heads_q,
            (problem.head_dim, problem.head_dim_v),
            num_gqa_groups=heads_kv,
            qkv_format="bshd",
            attn_mask_type="causal_bottom_right" if problem.causal and hides(problem) else "no_mask",
            window_size=window_size(problem),
            attention_type="self" if lengths[0] == lengths[1] else "cross",
            softmax_scale=problem.softmax_scale,
        ).eval()
        if folded:
            queries = q.view(sequences, problem.seqlen_q, heads_q, problem.head_dim)
            keys, values = (tensor.view(sequences, problem.seqlen_k, 1, -1) for tensor in (k, v))
        else:
            queries, keys, values = (tensor.transpose(1, 2) for tensor in (q, k, v))

        def call() -> Tensor:
            with torch.no_grad():
                out: Tensor = attention(queries, keys, values)
            if folded:
                return out.view(problem.out_shape)
            return out.view(problem.batch, problem.seqlen_q, problem.heads_q, -1).transpose(1, 2)

        call()
        return call


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [TransformerEngine()]
