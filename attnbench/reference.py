"""Owns what is right: seeded inputs, the float64 oracle, the error budget, the verdict. Knows no backend and no clock.

Everything here runs on the CPU, whatever device is judged.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from attnbench.problem import Dtype, Problem
from attnbench.result import Check

Distribution = Literal["normal", "outliers", "large_logits"]
DISTRIBUTIONS: tuple[Distribution, ...] = get_args(Distribution)

TORCH_DTYPES: dict[Dtype, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

ORACLE_BLOCK_BYTES = 64 << 20
"""Size of one float64 block of scores; three of them are alive at once, which stays under 256 MB."""
FULL_CHECK_PAIRS = 1 << 25
"""Up to this many (query, key) pairs every row is checked: 2048×8192 with two heads, about a second of float64."""
CHECK_TILE = 128
"""However large the problem, one row of each tile of this many queries is checked."""
PLAIN_VALUES, MAX_ORDERS = 1 << 18, 32
"""How many outputs, in how many orders at most, the error of plain PyTorch is the maximum of."""
OUTLIER_SHARE, OUTLIER_SCALE = 1e-3, 20.0
LARGE_LOGIT_SCALE = 16.0
"""Logits then have a standard deviation of about 16 and reach 60 to 80: one key takes nearly all the weight."""
CLASSIC_TOLERANCE = 1e-3


class Unjudgeable(Exception):
    """There is no right answer to compare with, or no budget that wrong ones would exceed; the message says why."""


@dataclass(frozen=True)
class Inputs:
    """q, k, v of a problem on the CPU, in its shapes and dtype, and where they came from."""

    q: Tensor
    k: Tensor
    v: Tensor
    distribution: Distribution


def torch_dtype(problem: Problem) -> torch.dtype:
    """The problem's dtype as torch knows it. Raises ValueError for `auto`."""
    if problem.dtype == "auto":
        raise ValueError("dtype auto has no torch dtype: call resolve(device) first")
    return TORCH_DTYPES[problem.dtype]


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part, and on nothing else, on any machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def make_inputs(problem: Problem, seed: int, distribution: Distribution = "normal") -> Inputs:
    """Seeded q, k, v. `normal`: N(0, 1). `outliers`: one value in a thousand is 20 times as large.

    `large_logits`: q is 16 times as large, so that the softmax nearly picks one key. Raises Unjudgeable where the
    tensors do not fit into memory.
    """
    # Drawn in float32 and then rounded; the oracle's copies of a head are small beside that.
    shapes = (problem.q_shape, problem.k_shape, problem.v_shape, problem.out_shape)
    needed = 4 * sum(map(math.prod, shapes))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 2 * needed > memory:
        raise Unjudgeable(f"its inputs take {needed / 1e9:.0f} GB, and this machine has {memory / 1e9:.0f} GB")
    generator = torch.Generator().manual_seed(derive_seed(seed, problem.case_id, distribution))

    def draw(shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=generator)
        if distribution == "outliers":
            values[torch.rand(shape, generator=generator) < OUTLIER_SHARE] *= OUTLIER_SCALE
        return values

    q, k, v = draw(problem.q_shape), draw(problem.k_shape), draw(problem.v_shape)
    if distribution == "large_logits":
        q *= LARGE_LOGIT_SCALE
    dtype = torch_dtype(problem)
    return Inputs(q.to(dtype), k.to(dtype), v.to(dtype), distribution)


def sample_rows(problem: Problem, seed: int) -> Tensor:
    """The query rows to check, sorted: all of them, or of a large problem the first, the last and one of each tile.

    Which row of a tile depends on the seed.
    """
    pairs_a_row = problem.batch * problem.heads_q * problem.seqlen_k
    if pairs_a_row * problem.seqlen_q <= FULL_CHECK_PAIRS:
        return torch.arange(problem.seqlen_q)
    affordable = max(1, FULL_CHECK_PAIRS // pairs_a_row)
    tile = min(CHECK_TILE, -(-problem.seqlen_q // affordable))
    starts = torch.arange(0, problem.seqlen_q, tile)
    generator = torch.Generator().manual_seed(derive_seed(seed, problem.case_id, "rows"))
    picks = starts + torch.randint(tile, starts.shape, generator=generator)
    # The first query that sees a key sees the fewest, and errs the most.
    edges = {0, problem.seqlen_q - max(problem.visible_rows, 1), problem.seqlen_q - 1}
    return torch.tensor(sorted({*picks.clamp(max=problem.seqlen_q - 1).tolist(), *edges}))


def _hidden(problem: Problem, rows: Tensor, keys: Tensor) -> Tensor | None:
    """Which of `keys` each row does not see, (rows, keys); None where every row sees all."""
    if not problem.causal and problem.window is None:
        return None
    low, high = torch.tensor([problem.key_range(row) for row in rows.tolist()]).T
    return torch.logical_or(keys < low[:, None], keys >= high[:, None])


def _blocks(problem: Problem, inputs: Inputs, rows: Tensor) -> Iterator[tuple[int, int, slice, Tensor, Tensor, Tensor]]:
    """(batch, head, slice of rows, q of them, k, v) for every block whose float64 scores fit ORACLE_BLOCK_BYTES."""
    step = max(1, ORACLE_BLOCK_BYTES // (8 * problem.seqlen_k))
    group = problem.heads_q // problem.heads_kv
    for batch in range(problem.batch):
        for head in range(problem.heads_q):
            k, v = inputs.k[batch, head // group], inputs.v[batch, head // group]
            for start in range(0, len(rows), step):
                part = slice(start, start + step)
                yield batch, head, part, inputs.q[batch, head, rows[part]], k, v


def _attend(
    problem: Problem,
    inputs: Inputs,
    rows: Tensor,
    compute: torch.dtype,
    store: torch.dtype,
    keys: Tensor | None = None,
) -> Tensor:
    """Attention of `rows`, computed in `compute` with every intermediate rounded to `store`.

    `keys` are the positions of the inputs' keys, where those are not in order.
    """
    keys = torch.arange(problem.seqlen_k) if keys is None else keys
    out = torch.empty(problem.batch, problem.heads_q, len(rows), problem.head_dim_v, dtype=store)
    for batch, head, part, q, k, v in _blocks(problem, inputs, rows):
        scores = (q.to(compute) @ k.to(compute).T).to(store).mul_(problem.softmax_scale)
        hidden = _hidden(problem, rows[part], keys)
        if hidden is not None:
            scores.masked_fill_(hidden, -torch.inf)
        weights = torch.softmax(scores, dim=-1)
        if hidden is not None:
            weights.masked_fill_(hidden.all(dim=1, keepdim=True), 0.0)
        out[batch, head, part] = (weights.to(compute) @ v.to(compute)).to(store)
    return out


def oracle(problem: Problem, inputs: Inputs, rows: Tensor) -> Tensor:
    """Attention of `rows` in float64, (batch, heads_q, rows, head_dim_v)."""
    return _attend(problem, inputs, rows, torch.float64, torch.float64)


def plain_attention(problem: Problem, inputs: Inputs, rows: Tensor, keys: Tensor | None = None) -> Tensor:
    """Attention of `rows` as three plain PyTorch operations in the problem's dtype: GEMM, softmax, GEMM.

    GEMMs sum in float32 and round their result to the dtype, as PyTorch's do on matrix units; so the budget is the
    same wherever it is computed, and does not wait for a CPU's slow half-precision GEMM.
    """
    return _attend(problem, inputs, rows, torch.float32, torch_dtype(problem), keys)


def plain_error(problem: Problem, inputs: Inputs, rows: Tensor, expected: Tensor, seed: int) -> float:
    """The largest error of `plain_attention`, over as many orders of summation as make PLAIN_VALUES outputs.

    The same inputs with keys and head dimensions in another order are the same problem to the oracle, and another draw
    of rounding errors to plain PyTorch. One draw of a small problem can be lucky by a factor of three, and an honest
    kernel would then fail.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, problem.case_id, "orders"))
    draws = min(MAX_ORDERS, -(-PLAIN_VALUES // expected.numel()))
    worst = 0.0
    for _ in range(draws):
        keys = torch.randperm(problem.seqlen_k, generator=generator)
        dims = torch.randperm(problem.head_dim, generator=generator)
        shuffled = Inputs(
            inputs.q[..., dims], inputs.k[:, :, keys][..., dims], inputs.v[:, :, keys], inputs.distribution
        )
        error = (plain_attention(problem, shuffled, rows, keys).double() - expected).abs().max().item()
        if not math.isfinite(error):
            raise Unjudgeable(f"plain PyTorch overflows in {problem.dtype}, so there is no error to compare with")
        worst = max(worst, error)
    return worst


def form_fault(problem: Problem, output: object) -> str:
    """Why an output, brought to the CPU, cannot be compared at all; empty where it can."""
    if type(output) is not Tensor or output.is_nested:
        kind = "nested tensor" if type(output) is Tensor else type(output).__name__
        return f"the output is a {kind}, not a plain torch.Tensor"
    if tuple(output.shape) != problem.out_shape:
        return f"the output's shape is {tuple(output.shape)}, not {problem.out_shape}"
    if output.dtype != torch_dtype(problem):
        return f"the output's dtype is {output.dtype}, not {torch_dtype(problem)}"
    if output.layout is not torch.strided:
        return f"the output's layout is {output.layout}, not {torch.strided}"
    if output.device.type != "cpu":
        return f"the output came back on {output.device.type}, not on the problem's device"
    return ""


@dataclass(frozen=True)
class Reference:
    """The oracle's rows for one set of inputs and the error budget there; judges outputs against both."""

    problem: Problem
    distribution: Distribution
    rows: Tensor
    expected: Tensor
    """float64, (batch, heads_q, rows, head_dim_v)"""
    err_budget: float

    @classmethod
    def of(cls, problem: Problem, inputs: Inputs, seed: int, rows_seed: int | None = None) -> Reference:
        """Compute both. Budget: 2 × `plain_error` + eps(dtype) × max |oracle|, over the rows checked."""
        rows = sample_rows(problem, seed if rows_seed is None else rows_seed)
        expected = oracle(problem, inputs, rows)
        plain_err = plain_error(problem, inputs, rows, expected, seed)
        largest = expected.abs().max().item()
        budget = 2 * plain_err + torch.finfo(torch_dtype(problem)).eps * largest
        if 0 < largest <= budget:
            raise Unjudgeable(f"plain PyTorch in {problem.dtype} is off by as much as the values, and zeros would pass")
        return cls(problem, inputs.distribution, rows, expected, budget)

    def judge(self, output: object) -> Check:
        """Compare an output, on the CPU, with the oracle."""
        fault = form_fault(self.problem, output)
        if fault or not isinstance(output, Tensor):
            return self._check(None, False, fault)
        infinite = int((~torch.isfinite(output)).sum())
        if infinite:
            return self._check(None, False, f"{infinite} of {output.numel()} output values are not finite")
        actual = output[:, :, self.rows].double()
        errors = (actual - self.expected).abs()
        max_err = errors.max().item()
        classic = torch.allclose(actual, self.expected, rtol=CLASSIC_TOLERANCE, atol=CLASSIC_TOLERANCE)
        if max_err > self.err_budget:
            batch, head, row, column = (int(i) for i in torch.unravel_index(errors.argmax(), errors.shape))
            where = f"batch {batch}, head {head}, row {int(self.rows[row])}, column {column}"
            fault = f"max error {max_err:.3g} over the budget {self.err_budget:.3g}, at {where}"
        return self._check(max_err, classic, fault)

    def fault(self, words: str) -> Check:
        """The check of a case that is wrong whatever its output holds."""
        return self._check(None, False, words)

    def _check(self, max_abs_err: float | None, classic_ok: bool, fault: str) -> Check:
        return Check(
            max_abs_err=max_abs_err,
            err_budget=self.err_budget,
            classic_ok=classic_ok,
            inputs=self.distribution,
            rows_checked=len(self.rows),
            rows_total=self.problem.seqlen_q,
            fault=f"{fault} ({self.distribution} inputs)" if fault else "",
        )
