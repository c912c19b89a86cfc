"""FlashInfer's FlashAttention-3 template, for Hopper GPUs alone: the faster of its two functions.

One gives each block of queries a thread block, the other shares them out in its plan. Neither splits the keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from attnbench import Backend, Problem, hookimpl
from attnbench_plugins.flashinfer_calls import Call, FlashInfer, hides_right, ragged_prefill, single_prefill

if TYPE_CHECKING:
    from torch import Tensor

TEMPLATE = "fa3"
HEAD_DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))
"""Of the keys and of the values."""


def refusal(problem: Problem) -> str | None:
    """Why it cannot do a problem."""
    if (problem.head_dim, problem.head_dim_v) not in HEAD_DIMS:
        return "head sizes of 64, 128 or 256 throughout, or 192 with values of 128"
    return "no mask but a causal one and a window's left side" if hides_right(problem) else None


def candidates(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Call]:
    """FlashInfer's ways to do it."""
    for make in (single_prefill, ragged_prefill):
        yield make(problem, q, k, v, TEMPLATE)


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    summary = "FlashInfer with its FlashAttention-3 template"
    hopper = {"least_capability": (9, 0), "below_capability": (10, 0)}
    return [FlashInfer("flashinfer_fa3", summary, refusal, candidates, **hopper)]
