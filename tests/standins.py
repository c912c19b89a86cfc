"""What stands in for a library that no test machine has: modules in sys.modules, and attention that they compute."""

from __future__ import annotations

import itertools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench import Problem
from attnbench.backend import Backend
from attnbench.problem import Dtype
from attnbench.reference import Reference, make_inputs


def problem(seqlen_q: int = 40, seqlen_k: int = 56, dtype: Dtype = "fp16", **fields: Any) -> Problem:
    return Problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, dtype=dtype, **{"head_dim": 64, **fields})


SHAPES = (
    problem(),
    problem(dtype="bf16", heads_q=3, batch=2),
    problem(48, 48, causal=True, batch=2, heads_q=6, heads_kv=2),
    problem(causal=True, heads_q=4, heads_kv=2),
    problem(causal=True, window=7, heads_q=2),
    problem(window=7, batch=2, heads_q=2, heads_kv=1),
    problem(window=50),
    problem(56, 40),
    problem(56, 40, causal=True),
    problem(56, 20, window=9),
    problem(head_dim=192, head_dim_v=128, causal=True, heads_q=2),
    problem(head_dim=128, head_dim_v=64),
    problem(softmax_scale=0.3),
    problem(1, 70, batch=2, heads_q=8, heads_kv=2, causal=True),
    problem(1, 70, batch=2, heads_q=4, causal=True, window=9),
    problem(1, 70, heads_q=4, heads_kv=1, window=9),
    problem(1, 1),
)
"""(56, 40, causal) and (56, 20, window) have queries that see no key."""


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> ModuleType:
    """A module of that name, to be imported as if it were installed."""
    module = ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor) -> Tensor:
    """softmax(scale · q kᵀ) v over the keys that are `seen`, (rows, keys) bool, zeros where none is; heads come first.

    Heads of q are grouped over those of k. Computed in fp32, rounded once.
    """
    group = q.shape[-3] // k.shape[-3]
    wide_q, wide_k, wide_v = (t.float() for t in (q, *(t.repeat_interleave(group, -3) for t in (k, v))))
    scores = (scale * wide_q @ wide_k.mT).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1).nan_to_num(0.0) @ wide_v).to(q.dtype)


def band(rows: int, keys: int, left: int | None, right: int | None) -> Tensor:
    """Which keys each row sees, at most so many to each side of its own, the last row's own being the last key."""
    own = torch.arange(rows)[:, None] + keys - rows
    key = torch.arange(keys)
    seen = torch.ones(rows, keys, dtype=torch.bool)
    if left is not None:
        seen &= key >= own - left
    if right is not None:
        seen &= key <= own + right
    return seen


def tensors(case: Problem, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    inputs = make_inputs(case, seed)
    return inputs.q, inputs.k, inputs.v


def fault(case: Problem, output: Tensor) -> str:
    """What is wrong with the output on `tensors(case)`; empty where nothing is."""
    return Reference.of(case, make_inputs(case, 0), 0).judge(output).fault


def follows_inputs(backend: Backend, case: Problem) -> bool:
    """Whether each call reads what q, k and v hold then: after each has changed, the output is another."""
    given, others = tensors(case), tensors(case, 1)
    call = backend.prepare(case, *given)
    outputs = [call().clone()]
    for tensor, other in zip(given, others):
        tensor.data.copy_(other)
        outputs.append(call().clone())
    fresh = backend.prepare(case, *others)().clone()
    return not any(a.equal(b) for a, b in itertools.pairwise(outputs)) and outputs[-1].equal(fresh)
