"""torch's flex_attention on a GPU: a Triton kernel that torch.compile writes for the problem's mask.

Blocks of keys that the mask hides altogether are skipped, so a causal mask or a window saves its share of the work.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind

if TYPE_CHECKING:
    from torch import Tensor

LEAST_HEAD_DIM = 16
"""What Triton's products of matrices need."""
MOST_DECODING_ROWS = 128
"""Queries times the query heads of a key head."""
RECOMPILATIONS = 256
"""torch compiles a function anew for at most eight shapes unless it is told otherwise; a suite has more."""

MaskMod = Callable[[Any, Any, Any, Any], Any]


class FlexAttention(Backend):
    """torch.compile(flex_attention) with a block mask, compiled in `prepare` for the shape."""

    name = "flex_attention"
    device: DeviceKind = "cuda"
    summary = "torch.nn.attention.flex_attention, compiled with a block mask"
    homepage = "https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html"

    def unavailable(self) -> str | None:
        from attnbench.devices import device

        reason = device(self.device).unavailable()
        if reason is None and importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install triton"
        return reason

    def unsupported(self, problem: Problem) -> str | None:
        if problem.direction != "fwd":
            return "forward only"
        if min(problem.head_dim, problem.head_dim_v) < LEAST_HEAD_DIM:
            return f"head sizes of at least {LEAST_HEAD_DIM}"
        return None

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        import torch
        import torch._dynamo
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        config: Any = torch._dynamo.config
        config.recompile_limit = config.accumulated_recompile_limit = RECOMPILATIONS
        visible = mask_mod(problem)
        lengths = (problem.seqlen_q, problem.seqlen_k)
        blocks = None if visible is None else create_block_mask(visible, None, None, *lengths, device=q.device)
        scale, grouped = problem.softmax_scale, problem.heads_q != problem.heads_kv
        # For fewer than 128 queries torch takes its kernel for decoding, which has no tile for many rows of a key head.
        rows = problem.seqlen_q * problem.heads_q // problem.heads_kv
        options: Any = {"FORCE_USE_FLEX_ATTENTION": True} if grouped and rows > MOST_DECODING_ROWS else None

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
            return flex_attention(q, k, v, block_mask=blocks, scale=scale, enable_gqa=grouped, kernel_options=options)

        # fullgraph: where torch cannot compile it, it raises, and does not take its slow way without a word.
        compiled: Any = torch.compile(attend, dynamic=False, fullgraph=True)

        def call() -> Tensor:
            with torch.no_grad():  # with gradients it writes the log-sum-exp, too
                output: Tensor = compiled(q, k, v)
            return output

        call()
        return call


def mask_mod(problem: Problem) -> MaskMod | None:
    """Which key a query sees, as flex_attention asks for it; None where every query sees all."""
    if not problem.causal and problem.window is None:
        return None
    shift, causal, window = problem.seqlen_k - problem.seqlen_q, problem.causal, problem.window

    def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
        row = query + shift
        near = key > row - window if window is not None else key >= 0
        return near & (key <= row if causal else key < row + window)

    return visible


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [FlexAttention()]
