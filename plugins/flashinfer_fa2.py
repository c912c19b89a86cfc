"""FlashInfer's FlashAttention-2 template and its kernels for one query: whichever of its functions is the fastest.

Which that is depends on how each splits the keys among the GPU's processors, so that all that can are tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from attnbench import Backend, Problem, hookimpl
from attnbench_plugins.flashinfer_calls import (
    Call,
    FlashInfer,
    batch_decode,
    ragged_prefill,
    single_decode,
    single_prefill,
)

if TYPE_CHECKING:
    from torch import Tensor

TEMPLATE = "fa2"
HEAD_DIM_MULTIPLE, MAX_HEAD_DIM, LARGE_HEAD_DIM = 64, 256, 512
"""A row is loaded 64 values at a time, and what is left over of it not at all. 512 has kernels of its own."""
HEAD_DIMS_V = (64, 128, 256)
"""192 leaves a thread too few registers."""
DECODE_HEAD_DIMS, DECODE_GROUPS = (64, 128, 256, 512), (1, 2, 3, 4, 6, 8, 16)
MAX_VALUES = 1 << 32
"""Offsets within a tensor are 32 bits wide."""


def refusal(problem: Problem) -> str | None:
    """Why it cannot do a problem."""
    dims = (problem.head_dim, problem.head_dim_v)
    if dims != (LARGE_HEAD_DIM, LARGE_HEAD_DIM):
        if problem.head_dim % HEAD_DIM_MULTIPLE or problem.head_dim > MAX_HEAD_DIM:
            return f"a head size that is a multiple of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}, or 512 throughout"
        if problem.head_dim_v not in HEAD_DIMS_V:
            return "head sizes of 64, 128 or 256 for the values"
    if problem.causal and problem.seqlen_q > problem.seqlen_k:
        return "a causal mask needs as many keys as queries"
    rows = max(problem.heads_q * problem.seqlen_q, problem.heads_kv * problem.seqlen_k)
    return "tensors of at most 2**32 values" if problem.batch * rows * max(dims) > MAX_VALUES else None


def candidates(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Call]:
    """FlashInfer's ways to do it."""
    one = problem.seqlen_q == 1
    same_dims = problem.head_dim == problem.head_dim_v in DECODE_HEAD_DIMS
    if one and same_dims and problem.heads_q // problem.heads_kv in DECODE_GROUPS:
        yield single_decode(problem, q, k, v) if splits(problem, q) else batch_decode(problem, q, k, v)
    yield single_prefill(problem, q, k, v, TEMPLATE)
    if problem.window is not None and not problem.causal:
        # A plan that splits counts the keys of a window as if a causal mask ended them, and leaves out the others.
        yield ragged_prefill(problem, q, k, v, TEMPLATE, disable_split_kv=True)
    elif not one or problem.window is not None:  # else it would be what single_prefill is
        yield ragged_prefill(problem, q, k, v, TEMPLATE)
        yield ragged_prefill(problem, q, k, v, TEMPLATE, disable_split_kv=True)


def splits(problem: Problem, q: Tensor) -> bool:
    """Whether the GPU has a processor for every key head: with many more of them single_decode divides by zero."""
    import torch

    processors: int = torch.cuda.get_device_properties(q.device).multi_processor_count
    return problem.batch * problem.heads_kv <= processors


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    summary = "FlashInfer with its FlashAttention-2 template and its kernels for one query"
    return [FlashInfer("flashinfer_fa2", summary, refusal, candidates, least_capability=(8, 0))]
