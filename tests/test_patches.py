"""attnbench.patches and spot: what changes between calls, and that an output from before the change is found."""

from __future__ import annotations

import pytest
import torch

from attnbench import spot
from attnbench.patches import Patch, Patched
from attnbench.problem import Problem
from attnbench.reference import Reference, make_inputs, oracle, torch_dtype

PROBLEMS = [
    Problem(seqlen_q=16, seqlen_k=40, head_dim=16, dtype="fp32"),
    Problem(seqlen_q=128, seqlen_k=8192, head_dim=128, dtype="fp32"),
    Problem(seqlen_q=64, seqlen_k=2048, head_dim=128, dtype="fp16"),
    Problem(seqlen_q=64, seqlen_k=4096, head_dim=64, dtype="bf16"),
    Problem(batch=2, heads_q=4, heads_kv=2, seqlen_q=9, seqlen_k=33, head_dim=40, dtype="fp32", causal=True),
    Problem(seqlen_q=40, seqlen_k=16, head_dim=32, dtype="fp32", causal=True),
    Problem(seqlen_q=33, seqlen_k=65, head_dim=32, dtype="fp32", window=7),
    Problem(seqlen_q=1, seqlen_k=500, heads_q=8, heads_kv=2, head_dim=64, dtype="bf16"),
    Problem(seqlen_q=8, seqlen_k=64, head_dim=64, head_dim_v=16, dtype="fp16", softmax_scale=1.0),
]


def attention(problem, inputs):
    rows = torch.arange(problem.seqlen_q)
    return oracle(problem, inputs, rows).to(torch_dtype(problem))


def patched(problem, patch):
    inputs = make_inputs(problem, 0)
    Patched(inputs.q, inputs.k, inputs.v).lay(patch)
    return inputs


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.case_id)
def test_a_patch_lies_in_the_problem_and_on_a_key_that_its_query_sees(problem):
    for call in range(200):
        patch = Patch.of(problem, 3, call)
        assert patch is not None
        assert 0 <= patch.batch < problem.batch
        assert 0 <= patch.head < problem.heads_q
        assert patch.head_kv == patch.head * problem.heads_kv // problem.heads_q
        assert 0 <= patch.row_from < problem.seqlen_q
        assert 0 <= patch.key_from < problem.seqlen_k
        low, high = problem.key_range(patch.row)
        assert low <= patch.key < high
        assert Patch.of(problem, 3, call) == patch


def test_patches_differ_by_call_and_by_seed():
    problem = PROBLEMS[1]
    assert len({Patch.of(problem, seed, call) for seed in range(10) for call in range(100)}) > 990


def test_where_no_query_sees_a_key_nothing_is_patched():
    class Blind:
        visible_rows = 0

    assert Patch.of(Blind(), 0, 0) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.case_id)
def test_laying_touches_three_rows_and_no_version_and_restoring_undoes_it(problem):
    inputs, before = make_inputs(problem, 0), make_inputs(problem, 0)
    tensors = (inputs.q, inputs.k, inputs.v)
    versions = [tensor._version for tensor in tensors]
    over = Patched(*tensors)
    for call in range(20):
        patch = Patch.of(problem, 1, call)
        over.lay(patch)
        places = (
            (inputs.q, before.q, (patch.batch, patch.head, patch.row)),
            (inputs.k, before.k, (patch.batch, patch.head_kv, patch.key)),
            (inputs.v, before.v, (patch.batch, patch.head_kv, patch.key)),
        )
        for now, was, place in places:
            differs = (now != was).any(-1)
            differs[place] = False
            assert not differs.any()
        assert inputs.k[places[1][2]].equal(inputs.q[places[0][2]] * patch.key_scale)
    over.restore()
    assert all(now.equal(was) for now, was in zip(tensors, (before.q, before.k, before.v)))
    assert [tensor._version for tensor in tensors] == versions


@pytest.mark.parametrize("stale", ["q", "k", "v"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.case_id)
def test_what_was_computed_from_an_earlier_input_is_found_and_the_right_answer_is_not(problem, stale):
    base = make_inputs(problem, 0)
    budget = Reference.of(problem, base, 0).err_budget
    found = 0
    for call in range(12):
        patch = Patch.of(problem, 5, call)
        now = patched(problem, patch)
        assert spot.fault(problem, make_inputs(problem, 0), attention(problem, now), budget, call, patch) == ""
        old = patched(problem, patch)
        getattr(old, stale).copy_(getattr(base, stale))
        same = all(a.equal(b) for a, b in zip((old.q, old.k, old.v), (now.q, now.k, now.v)))
        found += (
            same or spot.fault(problem, make_inputs(problem, 0), attention(problem, old), budget, call, patch) != ""
        )
    # A patched query may happen to be nearly what it was, as where there is one row to take it from.
    assert found >= (10 if problem.seqlen_q > 1 or stale != "q" else 4)


def test_a_spot_check_finds_values_that_are_not_finite_anywhere():
    problem = PROBLEMS[1]
    inputs = make_inputs(problem, 0)
    output = attention(problem, inputs)
    assert spot.fault(problem, inputs, output, 1e-6, 0) == ""
    output[0, 0, 77, 3] = torch.nan
    assert spot.fault(problem, inputs, output, 1e-6, 0) == (
        "1 of 16384 output values are not finite, or were not there yet"
    )


def test_a_spot_check_looks_at_other_rows_for_another_seed():
    problem = PROBLEMS[1]
    inputs = make_inputs(problem, 0)
    output = attention(problem, inputs)
    output[0, 0, ::4] += 1.0
    found = {spot.fault(problem, inputs, output, 1e-6, seed) for seed in range(20)}
    assert len(found) > 8
    assert all("row " in words for words in found if words)


def test_a_spot_check_leaves_the_inputs_as_they_were():
    problem = PROBLEMS[4]
    inputs, before = make_inputs(problem, 0), make_inputs(problem, 0)
    patch = Patch.of(problem, 0, 0)
    spot.fault(problem, inputs, torch.zeros(problem.out_shape), 1e-6, 0, patch)
    assert all(now.equal(was) for now, was in zip((inputs.q, inputs.k, inputs.v), (before.q, before.k, before.v)))
