"""Grouped heads as more queries a head, for libraries whose attention knows no groups. Knows no library."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnbench import Problem
from attnbench_plugins.masks import visible

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def fold(problem: Problem, tensor: Tensor) -> Tensor:
    """A view of q, k, v or the output as (batch, heads_kv, rows, dim): all queries that read a key head, or its keys.

    Where they see the same keys, or are masked one by one, this is the same attention. Raises ValueError where the
    tensor is not contiguous.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"q, k and v must be contiguous, and one of shape {tuple(tensor.shape)} is not")
    return tensor.view(problem.batch, problem.heads_kv, -1, tensor.shape[-1])


def folded_visible(problem: Problem, device: torch.device) -> Tensor | None:
    """Which keys each query of a key head sees, (group · seqlen_q, seqlen_k) bool; None where every query sees all."""
    mask = visible(problem, device)
    return None if mask is None else mask.repeat(problem.heads_q // problem.heads_kv, 1)
