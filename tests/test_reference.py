"""attnbench.reference: the oracle against loops, inputs that repeat, rows that touch every tile, and what the budget
passes and catches.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnbench import reference
from attnbench.problem import DTYPES, Problem
from attnbench.reference import (
    DISTRIBUTIONS,
    Distribution,
    Inputs,
    Reference,
    Unjudgeable,
    derive_seed,
    make_inputs,
    oracle,
    plain_attention,
    plain_error,
    sample_rows,
    torch_dtype,
)

SMALL = [
    Problem(seqlen_q=5, seqlen_k=7, head_dim=4, dtype="fp32"),
    Problem(seqlen_q=4, seqlen_k=9, head_dim=3, head_dim_v=5, dtype="fp32"),
    Problem(batch=2, heads_q=6, heads_kv=2, seqlen_q=5, seqlen_k=5, head_dim=4, dtype="fp32", causal=True),
    Problem(seqlen_q=9, seqlen_k=4, head_dim=4, dtype="fp32", causal=True),
    Problem(seqlen_q=3, seqlen_k=8, head_dim=4, dtype="fp32", causal=True),
    Problem(seqlen_q=6, seqlen_k=8, head_dim=4, dtype="fp32", window=2),
    Problem(seqlen_q=9, seqlen_k=3, head_dim=4, dtype="fp32", window=3),
    Problem(seqlen_q=6, seqlen_k=8, head_dim=4, dtype="fp32", causal=True, window=1),
    Problem(heads_q=2, seqlen_q=4, seqlen_k=6, head_dim=4, dtype="fp16", softmax_scale=0.3),
    Problem(heads_q=4, heads_kv=1, seqlen_q=1, seqlen_k=6, head_dim=4, dtype="bf16"),
]


pytestmark = pytest.mark.usefixtures("one_thread")


SAMPLED = Problem(seqlen_q=512, seqlen_k=64, heads_q=2, head_dim=4, dtype="fp32")


@pytest.fixture
def few_rows(monkeypatch):
    """SAMPLED is a large problem: 128 pairs a row, 32 rows affordable, tiles of 16."""
    monkeypatch.setattr(reference, "FULL_CHECK_PAIRS", 1 << 12)


@functools.cache
def judged(problem: Problem, distribution: Distribution = "normal") -> tuple[Inputs, Reference]:
    """Inputs of seed 0 and what judges them, computed once for all tests."""
    inputs = make_inputs(problem, 0, distribution)
    return inputs, Reference.of(problem, inputs, 0)


def every_row(problem: Problem) -> Tensor:
    return torch.arange(problem.seqlen_q)


def by_loops(problem: Problem, inputs: Inputs) -> Tensor:
    """Attention one number at a time in Python floats, which are float64."""
    q, k, v = (tensor.double().tolist() for tensor in (inputs.q, inputs.k, inputs.v))
    out = torch.zeros(problem.out_shape, dtype=torch.float64)
    for b in range(problem.batch):
        for h in range(problem.heads_q):
            kv = h * problem.heads_kv // problem.heads_q
            for i in range(problem.seqlen_q):
                position = i + problem.seqlen_k - problem.seqlen_q
                logits = {
                    j: problem.softmax_scale * sum(x * y for x, y in zip(q[b][h][i], k[b][kv][j]))
                    for j in range(problem.seqlen_k)
                    if (not problem.causal or j <= position)
                    and (problem.window is None or abs(j - position) < problem.window)
                }
                if not logits:
                    continue
                top = max(logits.values())
                weights = {j: math.exp(logit - top) for j, logit in logits.items()}
                total = sum(weights.values())
                for c in range(problem.head_dim_v):
                    out[b, h, i, c] = sum(w / total * v[b][kv][j][c] for j, w in weights.items())
    return out


# The oracle


@pytest.mark.parametrize("problem", SMALL, ids=lambda p: p.case_id)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_oracle_is_attention_in_float64(problem, distribution):
    inputs = make_inputs(problem, 3, distribution)
    expected = oracle(problem, inputs, every_row(problem))
    assert expected.dtype == torch.float64
    torch.testing.assert_close(expected, by_loops(problem, inputs), rtol=1e-11, atol=1e-12)


def test_rows_that_see_no_key_are_zeros_and_only_those():
    problem = Problem(seqlen_q=9, seqlen_k=4, head_dim=4, dtype="fp32", causal=True)
    inputs = make_inputs(problem, 0)
    for attend in (oracle, plain_attention):
        out = attend(problem, inputs, every_row(problem))[0, 0]
        assert (out == 0).all(dim=1).tolist() == [True] * 5 + [False] * 4


def test_the_oracle_gives_the_rows_asked_for():
    problem = SMALL[2]
    inputs, rows = make_inputs(problem, 0), torch.tensor([1, 4])
    whole = oracle(problem, inputs, every_row(problem))
    torch.testing.assert_close(oracle(problem, inputs, rows), whole[:, :, rows], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("problem", SMALL, ids=lambda p: p.case_id)
def test_scores_come_in_blocks_within_the_limit_and_blocks_change_nothing(problem, monkeypatch):
    inputs, rows = make_inputs(problem, 1), every_row(problem)
    whole = oracle(problem, inputs, rows), plain_attention(problem, inputs, rows)
    limit = 2 * 8 * problem.seqlen_k + 7  # two rows and a bit
    monkeypatch.setattr(reference, "ORACLE_BLOCK_BYTES", limit)
    blocks, softmax = [], torch.softmax

    def spy(scores, dim):
        blocks.append(scores.shape)
        return softmax(scores, dim)

    monkeypatch.setattr(torch, "softmax", spy)
    parts = oracle(problem, inputs, rows), plain_attention(problem, inputs, rows)
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-13, atol=1e-15)
    assert parts[1].dtype == torch_dtype(problem)
    torch.testing.assert_close(parts[1], whole[1])
    assert all(8 * shape.numel() <= limit for shape in blocks)
    assert len(blocks) == 2 * problem.batch * problem.heads_q * -(-problem.seqlen_q // 2)


def test_the_real_limit_keeps_three_blocks_of_scores_under_256_mb():
    problem = Problem(seqlen_q=4096, seqlen_k=65536, head_dim=1, dtype="fp16")
    inputs = Inputs(*(torch.empty(s) for s in (problem.q_shape, problem.k_shape, problem.v_shape)), "normal")
    sizes = [8 * len(q) * problem.seqlen_k for *_, q, _, _ in reference._blocks(problem, inputs, every_row(problem))]
    assert max(sizes) == reference.ORACLE_BLOCK_BYTES
    assert 3 * max(sizes) < 256e6
    assert sum(sizes) == 8 * 4096 * 65536


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_attention_rounds_every_step_to_the_dtype(dtype):
    problem = Problem(seqlen_q=6, seqlen_k=40, head_dim=16, dtype=dtype)
    inputs = make_inputs(problem, 2)
    q, k, v = (tensor[0, 0] for tensor in (inputs.q, inputs.k, inputs.v))
    scores = (q.float() @ k.float().T).to(q.dtype) * problem.softmax_scale
    expected = (torch.softmax(scores, -1).float() @ v.float()).to(q.dtype)
    found = plain_attention(problem, inputs, every_row(problem))[0, 0]
    assert found.dtype == q.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# Inputs


def test_seeds_depend_on_every_part_and_on_no_machine():
    assert derive_seed(0, "b1-h1", "normal") == 1845712044002887273
    seeds = {derive_seed(*parts) for parts in ((0, "a"), (1, "a"), (0, "b"), ("0a",), (0, "a", ""), ("a", 0))}
    assert len(seeds) == 6
    assert all(0 <= seed < 1 << 63 for seed in seeds)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_repeat_with_their_seed_and_fit_the_problem(distribution, dtype):
    problem = dataclasses.replace(SMALL[2], dtype=dtype)
    one, same, other = (make_inputs(problem, seed, distribution) for seed in (5, 5, 6))
    torch.rand(3)  # the global generator has no say
    for name, shape in (("q", problem.q_shape), ("k", problem.k_shape), ("v", problem.v_shape)):
        tensor = getattr(one, name)
        assert tuple(tensor.shape) == shape
        assert tensor.dtype == torch_dtype(problem)
        assert tensor.equal(getattr(same, name))
        assert not tensor.equal(getattr(other, name))
    assert one.distribution == distribution


def test_inputs_are_pinned():
    q = make_inputs(Problem(seqlen_q=1, seqlen_k=1, head_dim=3, dtype="fp32"), 0).q
    torch.testing.assert_close(q.flatten(), torch.tensor([-0.2929655, -1.0644193, 1.3954632]), rtol=0, atol=1e-6)


def test_problems_of_one_shape_get_inputs_of_their_own():
    problem = Problem(seqlen_q=4, seqlen_k=4, dtype="fp32")
    assert not make_inputs(problem, 0).q.equal(make_inputs(dataclasses.replace(problem, causal=True), 0).q)


def test_normal_inputs_are_standard_normal():
    inputs = make_inputs(Problem(seqlen_q=512, seqlen_k=512, dtype="fp32"), 0)
    for tensor in (inputs.q, inputs.k, inputs.v):
        assert tensor.mean().item() == pytest.approx(0, abs=0.02)
        assert tensor.std().item() == pytest.approx(1, abs=0.02)
        assert tensor.abs().max() < 6


def test_outliers_are_one_value_in_a_thousand_20_times_as_large():
    problem = Problem(seqlen_q=2048, seqlen_k=2048, dtype="fp32")
    inputs = make_inputs(problem, 0, "outliers")
    for tensor in (inputs.q, inputs.k, inputs.v):
        # A value of 20·N(0, 1) is beyond 6 in 764 cases of a thousand, one of N(0, 1) in none of this many.
        assert (tensor.abs() > 6).float().mean().item() == pytest.approx(0.764e-3, rel=0.2)
        assert 40 < tensor.abs().max() < 120


def test_large_logits_really_are_large():
    problem = Problem(seqlen_q=128, seqlen_k=1024, dtype="fp16")
    sizes = {}
    for distribution in ("normal", "large_logits"):
        inputs = make_inputs(problem, 0, distribution)
        logits = problem.softmax_scale * inputs.q.double() @ inputs.k.double().transpose(-1, -2)
        sizes[distribution] = logits
    assert sizes["large_logits"].std().item() == pytest.approx(16, rel=0.05)
    assert 60 < sizes["large_logits"].max() < 90
    assert torch.softmax(sizes["large_logits"], -1).amax(-1).median() > 0.8
    assert sizes["normal"].max() < 10


@pytest.mark.parametrize("function", [torch_dtype, lambda p: make_inputs(p, 0)])
def test_auto_has_no_torch_dtype(function):
    with pytest.raises(ValueError, match="resolve"):
        function(Problem(seqlen_q=1, seqlen_k=1))


# Rows


def test_every_row_of_a_small_problem_is_checked():
    problem = Problem(seqlen_q=2048, seqlen_k=8192, heads_q=2, dtype="fp16")
    assert sample_rows(problem, 0).equal(torch.arange(2048))


@pytest.mark.parametrize(
    "problem",
    [
        Problem(seqlen_q=4096, seqlen_k=65536, dtype="fp16"),
        Problem(seqlen_q=4096, seqlen_k=65536, heads_q=64, dtype="fp16"),
        Problem(seqlen_q=5000, seqlen_k=16384, heads_q=8, dtype="fp16"),
        Problem(seqlen_q=2049, seqlen_k=8192, heads_q=2, dtype="fp16"),
        Problem(batch=64, seqlen_q=100, seqlen_k=65536, dtype="fp16"),
    ],
    ids=lambda p: p.case_id,
)
def test_of_a_large_problem_both_edges_and_every_tile_are_checked_and_other_rows_for_another_seed(problem):
    rows, same, other = (sample_rows(problem, seed).tolist() for seed in (0, 0, 1))
    assert rows == same != other
    assert rows == sorted(set(rows))
    assert (rows[0], rows[-1]) == (0, problem.seqlen_q - 1)
    tiles = -(-problem.seqlen_q // 128)
    assert {row // 128 for row in rows} == set(range(tiles))
    pairs = len(rows) * problem.batch * problem.heads_q * problem.seqlen_k
    assert len(rows) < problem.seqlen_q
    assert pairs <= 2 * reference.FULL_CHECK_PAIRS or len(rows) <= tiles + 2


@pytest.mark.usefixtures("few_rows")
def test_every_row_is_sampled_by_some_seed():
    seen = [set(sample_rows(SAMPLED, seed).tolist()) for seed in range(200)]
    assert all(32 <= len(rows) <= 34 for rows in seen)
    assert set.union(*seen) == set(range(512))


# The budget: what passes


def sdpa(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = torch.arange(problem.seqlen_q)[:, None] + problem.seqlen_k - problem.seqlen_q
    mask = torch.arange(problem.seqlen_k) <= rows if problem.causal else None
    grouped = problem.heads_q != problem.heads_kv
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=problem.softmax_scale, enable_gqa=grouped)


MIDDLE = Problem(seqlen_q=130, seqlen_k=520, head_dim=32, dtype="fp32")
GROUPED = Problem(batch=2, heads_q=4, heads_kv=2, seqlen_q=33, seqlen_k=65, head_dim=64, dtype="fp32", causal=True)


@pytest.mark.parametrize("problem", [MIDDLE, GROUPED], ids=["plain", "causal-grouped"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_budget_passes_sdpa_and_plain_attention(problem, dtype, distribution):
    problem = dataclasses.replace(problem, dtype=dtype)
    inputs, judge = judged(problem, distribution)
    check = judge.judge(sdpa(problem, inputs.q, inputs.k, inputs.v))
    assert check.fault == ""
    assert check.max_abs_err is not None
    assert check.inputs == distribution
    assert check.rows_checked == check.rows_total == problem.seqlen_q
    assert judge.judge(plain_attention(problem, inputs, every_row(problem))).passed
    assert judge.judge(judge.expected.to(torch_dtype(problem))).passed


@pytest.mark.parametrize("problem", [MIDDLE, GROUPED], ids=["plain", "causal-grouped"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_budget_is_twice_the_plain_error_and_one_rounding(problem, dtype):
    problem = dataclasses.replace(problem, dtype=dtype)
    (inputs, judge), rows = judged(problem), every_row(problem)
    expected = oracle(problem, inputs, rows)
    eps = {"fp16": 2**-10, "bf16": 2**-7, "fp32": 2**-23}[dtype]
    plain = plain_error(problem, inputs, rows, expected, 0)
    assert judge.err_budget == pytest.approx(2 * plain + eps * expected.abs().max().item(), rel=1e-12)
    torch.testing.assert_close(judge.expected, expected, rtol=1e-13, atol=1e-15)
    # One draw of plain rounding errors lies within a small factor of the largest of many.
    one_draw = (plain_attention(problem, inputs, rows).double() - expected).abs().max().item()
    assert one_draw / 2 < plain < 4 * one_draw


@pytest.mark.parametrize("problem", SMALL, ids=lambda p: p.case_id)
def test_keys_and_dimensions_in_another_order_are_the_same_problem(problem):
    inputs, rows = make_inputs(problem, 0), every_row(problem)
    expected = oracle(problem, inputs, rows)
    assert plain_error(problem, inputs, rows, expected, 0) < {"fp16": 2e-2, "bf16": 2e-1, "fp32": 2e-6}[problem.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_honest_kernel_passes_on_tiny_problems_whatever_the_seed(dtype):
    problem = Problem(seqlen_q=1, seqlen_k=17, head_dim=8, dtype=dtype)
    for seed in range(40):
        inputs = make_inputs(problem, seed)
        assert Reference.of(problem, inputs, seed).judge(sdpa(problem, inputs.q, inputs.k, inputs.v)).fault == ""


@pytest.mark.parametrize(("factor", "passes"), [(0.9, True), (1.1, False)])
def test_the_verdict_turns_at_the_budget_and_says_where(factor, passes):
    _, judge = judged(GROUPED)
    output = judge.expected.clone()
    output[1, 3, 7, 11] += factor * judge.err_budget
    check = judge.judge(output.float())
    assert check.passed is passes
    assert check.max_abs_err == pytest.approx(factor * judge.err_budget, rel=0.05)
    if not passes:
        assert check.fault.startswith(f"max error {check.max_abs_err:.3g} over the budget {judge.err_budget:.3g}")
        assert check.fault.endswith("at batch 1, head 3, row 7, column 11 (normal inputs)")


@pytest.mark.usefixtures("few_rows")
def test_a_fault_names_the_row_of_the_problem_not_of_the_sample():
    inputs = make_inputs(SAMPLED, 0)
    judge = Reference.of(SAMPLED, inputs, 0)
    row = int(judge.rows[5])
    output = torch.zeros(SAMPLED.out_shape)
    output[:, :, judge.rows] = judge.expected.float()
    assert judge.judge(output).passed
    output[0, 1, row, 2] += 1
    check = judge.judge(output)
    assert f"head 1, row {row}, column 2" in check.fault
    assert (check.rows_checked, check.rows_total) == (len(judge.rows), 512)
    assert len(judge.rows) < 40


# The budget: what is caught


def weights(problem: Problem, q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(problem.softmax_scale * q.float() @ k.float().transpose(-1, -2), -1)


def zeros(problem, q, k, v):
    return torch.zeros(problem.out_shape)


def mean_of_v(problem, q, k, v):
    return v.float().mean(2, keepdim=True).expand(problem.out_shape)


def first_key_tile(problem, q, k, v):
    return sdpa(dataclasses.replace(problem, seqlen_k=128), q, k[:, :, :128], v[:, :, :128])


def first_query_tile(problem, q, k, v):
    out = sdpa(problem, q, k, v).clone()
    out[:, :, 128:] = 0
    return out


def dropped_tail(problem, q, k, v):
    """The last keys that fill no tile of 128 of their own are left out: 8 of 520."""
    whole = problem.seqlen_k // 128 * 128
    return sdpa(dataclasses.replace(problem, seqlen_k=whole), q, k[:, :, :whole], v[:, :, :whole])


def padded_with_zero_keys(problem, q, k, v):
    """Keys padded to whole tiles, and the padding not masked: each of 120 zero keys takes exp(0)."""
    pad = torch.zeros(1, 1, -problem.seqlen_k % 128, problem.head_dim, dtype=k.dtype)
    return weights(problem, q, torch.cat([k, pad], 2)) @ torch.cat([v, pad], 2).float()


def unnormalised(problem, q, k, v):
    logits = problem.softmax_scale * q.float() @ k.float().transpose(-1, -2)
    return torch.exp(logits - logits.amax(-1, keepdim=True)) @ v.float()


def unscaled(problem, q, k, v):
    return sdpa(dataclasses.replace(problem, softmax_scale=1.0), q, k, v)


def neighbours_swapped(problem, q, k, v):
    return sdpa(problem, q, k, v)[:, :, torch.arange(problem.seqlen_q) ^ 1]


GROSS = [zeros, mean_of_v, first_key_tile, first_query_tile, unnormalised, unscaled, neighbours_swapped]
FINE = [dropped_tail, padded_with_zero_keys]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("wrong", "distribution"),
    [*((f, d) for f in GROSS for d in DISTRIBUTIONS), *((f, "normal") for f in FINE)],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_the_budget_catches(wrong, distribution, dtype):
    problem = dataclasses.replace(MIDDLE, dtype=dtype)
    inputs, judge = judged(problem, distribution)
    check = judge.judge(wrong(problem, inputs.q, inputs.k, inputs.v).to(torch_dtype(problem)).contiguous())
    assert check.fault.startswith("max error ")
    assert check.max_abs_err is not None
    assert check.max_abs_err > check.err_budget


def test_one_dropped_key_is_caught_in_every_dtype():
    for dtype in DTYPES:
        problem = Problem(seqlen_q=64, seqlen_k=257, head_dim=64, dtype=dtype)
        inputs = make_inputs(problem, 0)
        output = sdpa(dataclasses.replace(problem, seqlen_k=256), inputs.q, inputs.k[:, :, :256], inputs.v[:, :, :256])
        assert not Reference.of(problem, inputs, 0).judge(output).passed


@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_aligned_top_left_is_caught(dtype):
    problem = dataclasses.replace(GROUPED, dtype=dtype)
    inputs, judge = judged(problem)
    check = judge.judge(scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, is_causal=True, enable_gqa=True))
    assert check.fault.startswith("max error ")


def test_a_mask_that_is_left_out_is_caught():
    for problem in (GROUPED, dataclasses.replace(MIDDLE, window=64), dataclasses.replace(MIDDLE, window=519)):
        inputs, judge = judged(problem)
        free = dataclasses.replace(problem, causal=False, window=None)
        assert not judge.judge(sdpa(free, inputs.q, inputs.k, inputs.v)).passed


def test_nan_rows_where_no_key_is_seen_are_caught():
    problem = Problem(seqlen_q=9, seqlen_k=4, head_dim=8, dtype="fp32", causal=True)
    inputs = make_inputs(problem, 0)
    output = oracle(problem, inputs, every_row(problem)).float()
    assert Reference.of(problem, inputs, 0).judge(output).passed
    output[:, :, :5] = torch.nan
    assert "40 of 72 output values are not finite" in Reference.of(problem, inputs, 0).judge(output).fault


@pytest.mark.parametrize("low", ["fp16", "bf16"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_low_precision_under_an_fp32_label_is_caught(low, distribution):
    inputs, judge = judged(MIDDLE, distribution)
    dtype = torch_dtype(dataclasses.replace(MIDDLE, dtype=low))
    q, k, v = (tensor.to(dtype) for tensor in (inputs.q, inputs.k, inputs.v))
    check = judge.judge(sdpa(MIDDLE, q, k, v).float())
    assert check.fault.startswith("max error ")


def test_the_classic_verdict_passes_all_zeros_on_a_long_context_and_the_budget_does_not(monkeypatch):
    monkeypatch.setattr(reference, "MAX_ORDERS", 1)  # for time's sake: the budget only grows with more
    problem = Problem(seqlen_q=1, seqlen_k=1 << 20, head_dim=1, head_dim_v=4, dtype="fp32", softmax_scale=0.01)
    inputs = make_inputs(problem, seed=5)
    judge = Reference.of(problem, inputs, seed=5)
    check = judge.judge(torch.zeros(problem.out_shape))
    assert check.classic_ok
    assert not check.passed
    assert judge.judge(judge.expected.float()).passed


def test_the_classic_verdict_is_allclose_at_a_thousandth():
    _, judge = judged(GROUPED)
    output = judge.expected.float()
    for error, classic in ((0.9e-3, True), (10e-3, False)):
        check = judge.judge(output + error)
        assert check.classic_ok is classic
        assert not check.passed


@pytest.mark.usefixtures("few_rows")
def test_one_value_that_is_not_finite_is_caught_even_in_a_row_that_is_not_sampled():
    inputs = make_inputs(SAMPLED, 0)
    judge = Reference.of(SAMPLED, inputs, 0)
    output = torch.zeros(SAMPLED.out_shape)
    output[:, :, judge.rows] = judge.expected.float()
    skipped = next(row for row in range(512) if row not in judge.rows.tolist())
    for value, row in ((math.nan, 511), (math.inf, skipped), (-math.inf, 0)):
        spoilt = output.clone()
        spoilt[-1, -1, row, -1] = value
        check = judge.judge(spoilt)
        assert check.fault == f"1 of {output.numel()} output values are not finite (normal inputs)"
        assert check.max_abs_err is None


class Subclass(Tensor):
    pass


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda out: out[:, :, :-1], "shape is (2, 4, 32, 64), not (2, 4, 33, 64)"),
        (lambda out: out.transpose(1, 2), "shape is (2, 33, 4, 64)"),
        (lambda out: out[0], "shape is (4, 33, 64)"),
        (lambda out: out.half(), "dtype is torch.float16, not torch.float32"),
        (lambda out: out.double(), "dtype is torch.float64"),
        (lambda out: out.as_subclass(Subclass), "is a Subclass, not a plain torch.Tensor"),
        (lambda out: torch.nn.Parameter(out), "is a Parameter, not a plain torch.Tensor"),
        (lambda out: out.numpy(), "is a ndarray"),
        (lambda out: (out, None), "is a tuple"),
        (lambda out: None, "is a NoneType"),
        (lambda out: out.to("meta"), "came back on meta, not on the problem's device"),
        (lambda out: out.to_sparse(), "layout is torch.sparse_coo, not torch.strided"),
    ],
)
def test_an_output_of_another_form_is_caught_without_a_comparison(spoil, words):
    _, judge = judged(GROUPED)
    right = judge.expected.float()
    assert judge.judge(right).passed
    check = judge.judge(spoil(right))
    assert words in check.fault
    assert check.max_abs_err is None
    assert not check.classic_ok
    assert check.severity == math.inf


def test_fault_makes_a_check_that_fails_with_the_words_given():
    check = judged(GROUPED, "outliers")[1].fault("it overwrote its input k")
    assert check.fault == "it overwrote its input k (outliers inputs)"
    assert not check.passed


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (Problem(seqlen_q=64, seqlen_k=64, head_dim=128, dtype="fp16", softmax_scale=1e4), "plain PyTorch overflows"),
        (Problem(seqlen_q=64, seqlen_k=64, head_dim=16, dtype="bf16", softmax_scale=1500.0), "zeros would pass"),
    ],
)
def test_what_has_no_budget_that_zeros_exceed_is_not_judged(problem, words):
    with pytest.raises(Unjudgeable, match=words):
        Reference.of(problem, make_inputs(problem, 0), 0)


def test_inputs_beyond_the_machines_memory_are_not_made():
    with pytest.raises(Unjudgeable, match="its inputs take"):
        make_inputs(Problem(seqlen_q=10**10, seqlen_k=8, dtype="fp32"), 0)
