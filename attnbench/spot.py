"""Owns the check of a few rows of an output against the oracle: of timed calls, and of every process a case runs in.

What a whole Reference costs is paid once a problem; here a row costs one row of float64. Knows no backend.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from attnbench.patches import Patch, Patched
from attnbench.problem import Problem
from attnbench.reference import Inputs, derive_seed, form_fault, oracle, torch_dtype

ROWS = 6
"""Random rows of each of two heads, beside the patched one."""
FLOAT32_ROUNDING = 2.0**-24


def fault(
    problem: Problem, inputs: Inputs, output: object, err_budget: float, seed: int, patch: Patch | None = None
) -> str:
    """Why `output` is not attention of `inputs` under `patch`; empty where nothing is found wrong.

    All of it must be finite. Random rows must lie within `err_budget`, which a Reference of the same problem had; the
    patched row, in which one key has most of the weight, within the bound of `_patched_budget`.
    """
    if words := form_fault(problem, output):
        return words
    assert isinstance(output, Tensor)
    infinite = int((~torch.isfinite(output)).sum())
    if infinite:
        return f"{infinite} of {output.numel()} output values are not finite, or were not there yet"
    generator = torch.Generator().manual_seed(derive_seed(seed, problem.case_id, "spot"))

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    patched = Patched(inputs.q, inputs.k, inputs.v)
    patched.lay(patch)
    try:
        heads = {(pick(problem.batch), pick(problem.heads_q))}
        if patch is not None:
            heads.add((patch.batch, patch.head))
        for batch, head in sorted(heads):
            rows = {pick(problem.seqlen_q) for _ in range(ROWS)}
            if words := _head_fault(problem, inputs, output, batch, head, rows, err_budget, patch):
                return words
    finally:
        patched.restore()
    return ""


def _head_fault(
    problem: Problem,
    inputs: Inputs,
    output: Tensor,
    batch: int,
    head: int,
    rows: set[int],
    err_budget: float,
    patch: Patch | None,
) -> str:
    head_kv = head // (problem.heads_q // problem.heads_kv)
    one_head = dataclasses.replace(problem, batch=1, heads_q=1, heads_kv=1)
    part = Inputs(
        inputs.q[batch, head][None, None],
        inputs.k[batch, head_kv][None, None],
        inputs.v[batch, head_kv][None, None],
        inputs.distribution,
    )
    touched = patch is not None and (patch.batch, patch.head_kv) == (batch, head_kv)
    if touched and patch is not None and patch.head == head:
        rows = rows | {patch.row}
    chosen = torch.tensor(sorted(rows))
    expected = oracle(one_head, part, chosen)[0, 0]
    errors = (output[batch, head, chosen].double() - expected).abs().amax(dim=-1)
    for row, error in zip(chosen.tolist(), errors.tolist()):
        if error <= err_budget:
            continue
        # A patched key may weigh in any row of its head; where it does, the row is no longer like those of the budget.
        budget = err_budget + (_patched_budget(one_head, part, row) if touched else 0.0)
        if error > budget:
            where = f"batch {batch}, head {head}, row {row}"
            return f"max error {error:.3g} over the budget {budget:.3g}, at {where}"
    return ""


def _patched_budget(problem: Problem, inputs: Inputs, row: int) -> float:
    """What rounding can do to a row whose weight may lie on one key.

    With u the rounding of the dtype, a score s is off by at most 2·u·|s| (GEMM and scale) and by the float32
    summation of its products, so a weight by the factor exp(2·δ); rounding it and the output adds 4·u. Weighted by
    what lies on each key beyond an even share, times the values there, that bounds the error.
    """
    low, high = problem.key_range(row)
    if low == high:
        return 0.0
    query, keys = inputs.q[0, 0, row].double(), inputs.k[0, 0, low:high].double()
    scale, rounding = problem.softmax_scale, torch.finfo(torch_dtype(problem)).eps / 2
    scores = keys @ query * scale
    weights = torch.softmax(scores, dim=0)
    largest = int(weights.argmax())
    products = float((keys[largest] * query).abs().sum()) * scale
    delta = 2 * rounding * abs(float(scores[largest])) + problem.head_dim * FLOAT32_ROUNDING * products
    value = float(inputs.v[0, 0, low + largest].double().abs().max())
    return (math.expm1(2 * delta) + 4 * rounding) * float(weights[largest]) * value
