"""Attention as the textbook has it: a GEMM, a softmax, a GEMM. The yardstick that every fused kernel should beat."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind
from attnbench_plugins.masks import visible

if TYPE_CHECKING:
    from torch import Tensor


class GemmRef(Backend):
    """softmax(scale·Q Kᵀ) V through torch.matmul and torch.softmax, on any device torch knows."""

    name = "gemm_ref"
    summary = "scale·QKᵀ by GEMM, softmax, GEMM (torch)"
    homepage = "https://pytorch.org"

    def __init__(self, device: DeviceKind) -> None:
        self.device = device
        if device == "npu":
            self.summary += " (not yet run on hardware)"

    def unavailable(self) -> str | None:
        from attnbench.devices import device

        return device(self.device).unavailable()

    def unsupported(self, problem: Problem) -> str | None:
        return None if problem.direction == "fwd" else "forward only"

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        import torch

        group = problem.heads_q // problem.heads_kv
        grouped = (problem.batch, problem.heads_kv, group * problem.seqlen_q)
        q_rows = q.view(*grouped, problem.head_dim)
        k_columns = k.transpose(-1, -2)
        mask = visible(problem, q.device)
        hidden = None if mask is None else ~mask
        scores_shape = (problem.batch, problem.heads_kv, group, problem.seqlen_q, problem.seqlen_k)

        def call() -> Tensor:
            # One GEMM for all query heads of a group, so that K and V are not copied for each.
            scores = torch.matmul(q_rows, k_columns).mul_(problem.softmax_scale)
            if hidden is not None:
                scores.view(scores_shape).masked_fill_(hidden, -torch.inf)
            weights = torch.softmax(scores, dim=-1)
            if hidden is not None:
                weights.view(scores_shape).masked_fill_(hidden, 0.0)
            return torch.matmul(weights, v).view(problem.out_shape)

        return call

    def parallel_units(self, problem: Problem) -> int | None:
        if self.device != "cpu":
            return None
        import torch

        return torch.get_num_threads()


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [GemmRef("cpu"), GemmRef("cuda"), GemmRef("npu")]
