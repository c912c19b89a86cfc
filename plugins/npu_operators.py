"""What torch_npu's attention operators have in common: where they are, their limits, the causal mask. Calls none.

Limits are those of op-plugin's pages of August 2026 for Atlas A2 and A3. Nothing of it was run on hardware yet.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from attnbench import Problem

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SPARSE_MODE_CAUSAL = 3
"""Aligned bottom-right; 2 is top-left. Without a mask each operator ignores it, and next_tokens too."""
CAUSAL_MASK_SIZE = 2048
"""Sparse modes 2 to 4 take one compressed mask of this size, whatever the lengths."""
EVERY_TOKEN = 2**31 - 1
"""Of tokens before and after the diagonal, what hides nothing."""
LONGEST = 20 << 20
"""Keys and queries."""
LONGEST_DECODE = 1 << 18
"""Keys of a single query."""
HOMEPAGE = "https://gitcode.com/Ascend/op-plugin"
LIBRARIES = MappingProxyType({"torch-npu": "2.13.0"})


def operator(name: str) -> Any:
    """An attention operator of torch_npu, on BNSD tensors, which are BHSD by another name.

    Raises AttributeError where this torch_npu has none of that name.
    """
    return getattr(importlib.import_module("torch_npu"), name)


def unavailable(name: str) -> str | None:
    """Why the operator of that name cannot be called here; None where it can."""
    from attnbench.devices import device

    if reason := device("npu").unavailable():
        return reason
    try:
        operator(name)
    except AttributeError:
        return f"this torch_npu has no {name}: install one that attnbench[npu] asks for"
    return None


def limits(problem: Problem, largest_head_dim: int = 512, largest_group: int | None = 64) -> str | None:
    """What none of the operators does, in words; `largest_group` bounds the query heads to a key head."""
    if problem.direction != "fwd":
        return "forward only"
    if problem.head_dim != problem.head_dim_v:
        return "one head size for q, k and v"
    if problem.window is not None:
        return "no sliding window"
    if problem.head_dim > largest_head_dim or problem.head_dim % 8:
        return f"head sizes that are multiples of 8 up to {largest_head_dim}"
    if problem.heads_q > 256:
        return "up to 256 heads"
    if largest_group and problem.heads_q // problem.heads_kv > largest_group:
        return f"up to {largest_group} query heads to a key head"
    return None


def inference_limits(problem: Problem, *, decodes: bool) -> str | None:
    """What the operators for inference do not do, in words; `decodes` where it is the one for a single query."""
    if reason := limits(problem):
        return reason
    if problem.dtype == "fp32":
        return "fp16 and bf16 only"
    if problem.batch > 65535:
        return "batches up to 65535"
    if not decodes and problem.head_dim % 16 and problem.batch > 128:
        return "batches up to 128 of head sizes that are no multiples of 16"
    longest, what = (LONGEST_DECODE, "keys") if decodes else (LONGEST, "keys and queries")
    return f"up to {longest} {what}" if max(problem.seqlen_q, problem.seqlen_k) > longest else None


def causal(device: torch.device) -> dict[str, object]:
    """The options of a causal call: the sparse mode and the mask that it wants, True above the diagonal."""
    import torch

    mask = torch.ones(CAUSAL_MASK_SIZE, CAUSAL_MASK_SIZE, dtype=torch.bool).triu(1).to(device)
    return {"atten_mask": mask, "sparse_mode": SPARSE_MODE_CAUSAL}


def require_contiguous(*tensors: Tensor) -> None:
    """Raise ValueError unless all are: of others the operators read what lies there."""
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ValueError(f"q, k and v must be contiguous, and one of shape {tuple(tensor.shape)} is not")
