"""The mask of a problem as a torch tensor or as flash-attn's window, for plugins whose library wants one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnbench import Problem

if TYPE_CHECKING:
    import torch
    from torch import Tensor


WHOLE = -1
"""Of flash-attn's window: that the side has no limit."""


def hides(problem: Problem) -> bool:
    """Whether some query does not see some key: one query sees all under a causal mask, as all do in a wide window."""
    return problem.visible_pairs < problem.seqlen_q * problem.seqlen_k


def window_size(problem: Problem) -> tuple[int, int]:
    """How many keys to the left and to the right of its own a query sees, as flash-attn's `window_size` counts them."""
    if not hides(problem):
        return (WHOLE, WHOLE)
    side = WHOLE if problem.window is None else problem.window - 1
    return (side, 0 if problem.causal else side)


def visible(problem: Problem, device: torch.device) -> Tensor | None:
    """Which keys each query sees, (seqlen_q, seqlen_k) bool; None where every query sees all."""
    import torch

    if not hides(problem):
        return None
    rows = torch.arange(problem.seqlen_q, device=device)[:, None] + (problem.seqlen_k - problem.seqlen_q)
    keys = torch.arange(problem.seqlen_k, device=device)
    mask = (
        keys <= rows
        if problem.causal
        else torch.ones(problem.seqlen_q, problem.seqlen_k, dtype=torch.bool, device=device)
    )
    if problem.window is not None:
        mask = mask & (keys > rows - problem.window) & (keys < rows + problem.window)
    return mask


def added(problem: Problem, q: Tensor) -> Tensor | None:
    """What is added to the scores, (seqlen_q, seqlen_k) in q's dtype: -inf where a key is hidden. None as above."""
    import torch

    seen = visible(problem, q.device)
    return None if seen is None else torch.zeros_like(seen, dtype=q.dtype).masked_fill_(~seen, -torch.inf)
