"""attnbench.problem: what a problem may be, its name, its FLOPs and bytes; suites, built in and from TOML."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbench.errors import AttnbenchError
from attnbench.problem import (
    BUILTIN_SUITES,
    DIRECTIONS,
    DTYPES,
    PTO,
    SMOKE,
    Problem,
    Suite,
    auto_dtype,
    cross,
    load_suite,
)

COUNTS = ("batch", "heads_q", "heads_kv", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v", "window")

lengths = st.integers(1, 24)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Small problems of every kind."""
    heads_kv = draw(st.integers(1, 3))
    return Problem(
        batch=draw(st.integers(1, 3)),
        heads_q=heads_kv * draw(st.integers(1, 3)),
        heads_kv=heads_kv,
        seqlen_q=draw(lengths),
        seqlen_k=draw(lengths),
        head_dim=draw(st.integers(1, 9)),
        head_dim_v=draw(st.integers(1, 9)),
        dtype=draw(st.sampled_from((*DTYPES, "auto"))),
        causal=draw(st.booleans()),
        window=draw(st.none() | lengths),
        softmax_scale=draw(st.none() | st.floats(1e-9, 1e9)),
        direction=draw(st.sampled_from(DIRECTIONS)),
    )


def mask(problem: Problem) -> list[list[bool]]:
    """Which key each query sees, straight from the words: bottom-right alignment, causal, distance below window."""
    shift = problem.seqlen_k - problem.seqlen_q
    return [
        [
            (not problem.causal or key <= query + shift)
            and (problem.window is None or abs(query + shift - key) < problem.window)
            for key in range(problem.seqlen_k)
        ]
        for query in range(problem.seqlen_q)
    ]


# What a problem may be


@pytest.mark.parametrize("field", COUNTS)
@pytest.mark.parametrize("value", [0, -1, True, 1.0, "1", [1]])
def test_a_count_that_is_no_whole_number_of_at_least_one_is_refused_by_name(field, value):
    fields = {"seqlen_q": 4, "seqlen_k": 4} | {field: value}
    with pytest.raises(ValueError, match=rf"^{field} must be .*{'at least 1' if type(value) is int else 'whole'}"):
        Problem(**fields)


@pytest.mark.parametrize("field", ["seqlen_q", "seqlen_k", "batch", "heads_q", "head_dim"])
def test_none_is_no_count(field):
    with pytest.raises(ValueError, match=rf"^{field} must be a whole number, not None"):
        Problem(**({"seqlen_q": 4, "seqlen_k": 4} | {field: None}))


@pytest.mark.parametrize(("heads_q", "heads_kv"), [(8, 3), (2, 4)])
def test_heads_kv_that_do_not_divide_heads_q_are_refused(heads_q, heads_kv):
    with pytest.raises(ValueError, match=f"{heads_kv} does not divide {heads_q}"):
        Problem(seqlen_q=1, seqlen_k=1, heads_q=heads_q, heads_kv=heads_kv)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "fp64"),
        ("dtype", None),
        ("direction", "forward"),
        ("layout", "BSHD"),
        ("causal", 1),
        ("causal", "true"),
        ("causal", None),
        ("softmax_scale", 0),
        ("softmax_scale", -0.5),
        ("softmax_scale", math.nan),
        ("softmax_scale", math.inf),
        ("softmax_scale", True),
        ("softmax_scale", "1"),
    ],
)
def test_a_bad_choice_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be .*{value!r}"):
        Problem(**({"seqlen_q": 4, "seqlen_k": 4} | {field: value}))


def test_what_is_left_out_is_one_batch_one_head_size_128_and_the_usual_scale():
    problem = Problem(seqlen_q=3, seqlen_k=5)
    assert dataclasses.asdict(problem) == {
        "batch": 1,
        "heads_q": 1,
        "heads_kv": 1,
        "seqlen_q": 3,
        "seqlen_k": 5,
        "head_dim": 128,
        "head_dim_v": 128,
        "dtype": "auto",
        "causal": False,
        "window": None,
        "softmax_scale": 1 / math.sqrt(128),
        "direction": "fwd",
        "layout": "BHSD",
    }
    assert Problem(seqlen_q=1, seqlen_k=1, heads_q=6).heads_kv == 6
    assert Problem(seqlen_q=1, seqlen_k=1, head_dim=64).head_dim_v == 64
    assert type(Problem(seqlen_q=1, seqlen_k=1, softmax_scale=2).softmax_scale) is float


def test_shapes_are_bhsd():
    problem = Problem(batch=2, heads_q=6, heads_kv=3, seqlen_q=5, seqlen_k=7, head_dim=8, head_dim_v=4)
    assert problem.q_shape == (2, 6, 5, 8)
    assert problem.k_shape == (2, 3, 7, 8)
    assert problem.v_shape == (2, 3, 7, 4)
    assert problem.out_shape == (2, 6, 5, 4)


def test_a_problem_is_frozen_and_hashes_by_value():
    problem = Problem(seqlen_q=4, seqlen_k=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem.seqlen_q = 5  # type: ignore[misc]
    assert {problem, Problem(seqlen_q=4, seqlen_k=4), Problem(seqlen_q=4, seqlen_k=5)} == {
        problem,
        Problem(seqlen_q=4, seqlen_k=5),
    }


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "fp32"), ("cuda", "fp16"), ("npu", "fp16")])
def test_auto_resolves_to_the_dtype_of_the_device_and_nothing_else_changes(device, dtype):
    problem = Problem(seqlen_q=4, seqlen_k=4, heads_q=4, heads_kv=2, causal=True, window=3, softmax_scale=0.5)
    assert auto_dtype(device) == dtype
    assert problem.resolve(device) == dataclasses.replace(problem, dtype=dtype)
    chosen = dataclasses.replace(problem, dtype="bf16")
    assert chosen.resolve(device) == chosen


# Its name


@pytest.mark.parametrize(
    ("fields", "case_id"),
    [
        ({}, "b1-h1-q128-k1024-d128-fp16"),
        ({"batch": 4, "heads_q": 8}, "b4-h8-q128-k1024-d128-fp16"),
        ({"heads_q": 32, "heads_kv": 8}, "b1-h32x8-q128-k1024-d128-fp16"),
        ({"head_dim": 192, "head_dim_v": 128}, "b1-h1-q128-k1024-d192x128-fp16"),
        ({"dtype": "auto"}, "b1-h1-q128-k1024-d128-auto"),
        ({"causal": True}, "b1-h1-q128-k1024-d128-fp16-causal"),
        ({"window": 1024}, "b1-h1-q128-k1024-d128-fp16-w1024"),
        ({"softmax_scale": 0.5}, "b1-h1-q128-k1024-d128-fp16-s0.5"),
        ({"direction": "bwd"}, "b1-h1-q128-k1024-d128-fp16-bwd"),
        ({"direction": "fwd_bwd"}, "b1-h1-q128-k1024-d128-fp16-fwd_bwd"),
        (
            {"causal": True, "window": 7, "softmax_scale": 2.0, "direction": "bwd"},
            "b1-h1-q128-k1024-d128-fp16-causal-w7-s2-bwd",
        ),
    ],
)
def test_case_id_names_what_is_not_usual(fields, case_id):
    assert Problem(**({"seqlen_q": 128, "seqlen_k": 1024, "dtype": "fp16"} | fields)).case_id == case_id


@given(st.floats(1e-9, 1e9))
def test_neighbouring_scales_have_names_of_their_own(scale):
    ids = {Problem(seqlen_q=1, seqlen_k=1, softmax_scale=s).case_id for s in (scale, math.nextafter(scale, math.inf))}
    assert len(ids) == 2


@given(problems(), problems())
def test_case_ids_are_equal_only_for_equal_problems(one, other):
    assert (one.case_id == other.case_id) == (one == other)


@given(problems(), st.data())
def test_a_change_of_any_one_field_changes_the_case_id(problem, data):
    field = data.draw(st.sampled_from([f.name for f in dataclasses.fields(Problem) if f.name != "layout"]))
    other = data.draw(problems())
    try:
        changed = dataclasses.replace(problem, **{field: getattr(other, field)})
    except ValueError:  # heads that do not divide
        return
    assert (changed.case_id == problem.case_id) == (getattr(changed, field) == getattr(problem, field))


# Its work


@pytest.mark.parametrize(("sq", "sk", "flops"), [(128, 1024, 67_895_040), (2048, 8192, 8_690_593_792)])
def test_flops_of_the_published_table(sq, sk, flops):
    problem = Problem(seqlen_q=sq, seqlen_k=sk, head_dim=128)
    assert problem.flops == flops
    assert problem.flops_gemm == 2 * sq * sk * 256


@given(problems())
def test_flops_unmasked_are_the_closed_formula(problem):
    problem = dataclasses.replace(problem, causal=False, window=None, direction="fwd")
    sq, sk, d, e = problem.seqlen_q, problem.seqlen_k, problem.head_dim, problem.head_dim_v
    gemm, scale = 2 * sq * sk * (d + e), sq * sk
    softmax = sq * ((sk - 1) + sk + sk + (sk - 1) + sk)  # max, subtract, exp, sum, divide
    assert problem.flops == problem.batch * problem.heads_q * (gemm + scale + softmax)


@given(problems())
def test_visible_pairs_rows_and_ranges_are_those_of_the_mask(problem):
    seen = mask(problem)
    assert problem.visible_pairs == sum(map(sum, seen))
    assert problem.visible_rows == sum(map(any, seen))
    for row, keys in enumerate(seen):
        low, high = problem.key_range(row)
        assert keys == [low <= key < high for key in range(problem.seqlen_k)]
        assert any(keys) or (low, high) == (0, 0)


@pytest.mark.parametrize(
    ("sq", "sk", "pairs", "rows"),
    [(3, 3, 6, 3), (2, 4, 3 + 4, 2), (4, 2, 0 + 0 + 1 + 2, 2)],
    ids=["sq=sk", "sq<sk", "sq>sk"],
)
def test_causal_is_aligned_bottom_right(sq, sk, pairs, rows):
    problem = Problem(seqlen_q=sq, seqlen_k=sk, causal=True)
    assert (problem.visible_pairs, problem.visible_rows) == (pairs, rows)
    assert problem.key_range(sq - 1) == (0, sk)


def test_causal_with_window_one_sees_one_key():
    problem = Problem(seqlen_q=3, seqlen_k=5, causal=True, window=1)
    assert [problem.key_range(row) for row in range(3)] == [(2, 3), (3, 4), (4, 5)]


@given(problems())
def test_flops_count_visible_pairs_alone(problem):
    forward = dataclasses.replace(problem, direction="fwd")
    seen = mask(problem)
    pairs = sum(map(sum, seen))
    softmax = sum(2 * (sum(keys) - 1) + 4 * sum(keys) for keys in seen if any(keys))
    heads = problem.batch * problem.heads_q
    assert forward.flops_gemm == heads * 2 * pairs * (problem.head_dim + problem.head_dim_v)
    assert forward.flops == forward.flops_gemm + heads * softmax


@given(problems())
def test_backward_is_two_and_a_half_forward_gemms(problem):
    forward, backward, both = (dataclasses.replace(problem, direction=d) for d in ("fwd", "bwd", "fwd_bwd"))
    assert 2 * backward.flops == 2 * backward.flops_gemm == 5 * forward.flops_gemm
    assert both.flops == forward.flops + backward.flops
    assert both.flops_gemm == forward.flops_gemm + backward.flops_gemm


@pytest.mark.parametrize(("dtype", "size"), [("fp16", 2), ("bf16", 2), ("fp32", 4)])
def test_bytes_moved_unmasked_are_every_tensor_once(dtype, size):
    problem = Problem(batch=2, heads_q=6, heads_kv=3, seqlen_q=5, seqlen_k=7, head_dim=8, head_dim_v=4, dtype=dtype)
    q, k, v, out = (math.prod(s) for s in (problem.q_shape, problem.k_shape, problem.v_shape, problem.out_shape))
    backward = dataclasses.replace(problem, direction="bwd")
    both = dataclasses.replace(problem, direction="fwd_bwd")
    assert problem.bytes_moved == size * (q + k + v + out)
    assert backward.bytes_moved == size * (2 * (q + k + v) + 2 * out)
    assert both.bytes_moved == problem.bytes_moved + backward.bytes_moved


@given(problems())
def test_bytes_moved_forward_are_the_visible_inputs_and_the_whole_output(problem):
    problem = dataclasses.replace(problem, direction="fwd", dtype="fp32")
    seen = mask(problem)
    queries = sum(map(any, seen))
    keys = sum(any(column) for column in zip(*seen))
    d, e = problem.head_dim, problem.head_dim_v
    items = problem.batch * problem.heads_q * (queries * d + problem.seqlen_q * e)
    items += problem.batch * problem.heads_kv * keys * (d + e)
    assert problem.bytes_moved == 4 * items


def test_bytes_moved_of_auto_is_refused():
    with pytest.raises(ValueError, match="resolve"):
        _ = Problem(seqlen_q=1, seqlen_k=1).bytes_moved


# JSON


@given(problems())
def test_json_round_trip(problem):
    assert Problem.from_json(json.loads(json.dumps(problem.to_json()))) == problem


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"seqlen_q": 1, "seqlen_k": 1, "seqlen": 2}, "no field 'seqlen'"),
        ({"seqlen_q": 1}, "needs seqlen_k"),
        ({"seqlen_k": 1}, "needs seqlen_q"),
        ({"seqlen_q": 1, "seqlen_k": 0}, "seqlen_k must be at least 1"),
    ],
)
def test_from_json_says_what_is_wrong(data, words):
    with pytest.raises(ValueError, match=words):
        Problem.from_json(data)


# Suites


def test_pto_is_the_five_by_four_grid_in_order():
    grid = itertools.product((128, 256, 512, 1024, 2048), (1024, 2048, 4096, 8192))
    assert list(PTO) == [Problem(seqlen_q=sq, seqlen_k=sk, head_dim=128) for sq, sk in grid]
    assert len(PTO) == 20
    assert {p.dtype for p in PTO} == {"auto"}


def test_built_in_suites_have_names_of_their_own():
    assert BUILTIN_SUITES == (PTO, SMOKE)
    assert [suite.name for suite in BUILTIN_SUITES] == ["pto", "smoke"]


def test_smoke_holds_one_query_an_odd_length_and_causal_with_grouped_heads():
    assert any(p.seqlen_q == 1 for p in SMOKE)
    assert any(p.seqlen_k % 2 for p in SMOKE)
    assert any(p.causal and p.heads_kv < p.heads_q and p.seqlen_q < p.seqlen_k for p in SMOKE)


def test_cross_varies_the_first_field_slowest():
    found = cross(seqlen_q=(1, 2), seqlen_k=(3, 4))
    assert [(p.seqlen_q, p.seqlen_k) for p in found] == [(1, 3), (1, 4), (2, 3), (2, 4)]


@pytest.mark.parametrize("name", ["", "Pto", "1a", "a b", "a\n"])
def test_a_suite_needs_a_plain_name(name):
    with pytest.raises(ValueError, match="must match"):
        Suite(name, (Problem(seqlen_q=1, seqlen_k=1),))


def test_a_suite_needs_problems_and_each_once():
    with pytest.raises(ValueError, match="has no problems"):
        Suite("empty", ())
    problem = Problem(seqlen_q=1, seqlen_k=2)
    with pytest.raises(ValueError, match=f"holds {problem.case_id} twice"):
        Suite("twice", (problem, problem))


def write(folder, text):
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_toml_lists_make_a_cross_product_within_their_table(tmp_path):
    suite = load_suite(
        write(
            tmp_path,
            """
            name = "long"
            summary = "long contexts"
            [[problems]]
            seqlen_q = [1, 2]
            seqlen_k = [3, 4]
            dtype = "bf16"
            [[problems]]
            seqlen_q = 5
            seqlen_k = 6
            causal = [false, true]
            heads_q = 8
            heads_kv = 2
            """,
        )
    )
    assert (suite.name, suite.summary) == ("long", "long contexts")
    assert suite.problems == (
        *(Problem(seqlen_q=q, seqlen_k=k, dtype="bf16") for q, k in ((1, 3), (1, 4), (2, 3), (2, 4))),
        *(Problem(seqlen_q=5, seqlen_k=6, heads_q=8, heads_kv=2, causal=c) for c in (False, True)),
    )


def test_a_toml_suite_without_a_name_is_called_after_its_file(tmp_path):
    suite = load_suite(write(tmp_path, "problems = [{seqlen_q = 1, seqlen_k = 2}]"))
    assert suite.name == "mine"
    assert suite.problems == (Problem(seqlen_q=1, seqlen_k=2),)


GOOD = "[[problems]]\nseqlen_q = 1\nseqlen_k = 2\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no problems"),
        ("problems = []", "has no problems"),
        ("title = 'x'\n" + GOOD, "unknown key 'title'"),
        ("problems = 3", "must be [[problems]] tables"),
        ("problems = [1]", "must be [[problems]] tables"),
        ("name = 3\n" + GOOD, "name and summary must be text"),
        ("summary = []\n" + GOOD, "name and summary must be text"),
        ("name = 'My Suite'\n" + GOOD, "a suite's name must match"),
        (GOOD + "[[problems]]\nseqlen_q = 1\n", "problem table 2: a problem needs seqlen_k"),
        (GOOD + "[[problems]]\nseqlen_q = 0\nseqlen_k = 1\n", "problem table 2: seqlen_q must be at least 1, not 0"),
        (GOOD + "[[problems]]\nseqlen_q = [4, 1.5]\nseqlen_k = 1\n", "problem table 2: seqlen_q must be a whole"),
        (GOOD + "[[problems]]\nseqlen_q = 4\nseqlen_k = 1\nheads = 2\n", "problem table 2: a problem has no field"),
        (GOOD + "[[problems]]\nseqlen_q = []\nseqlen_k = 1\n", "problem table 2: seqlen_q is an empty list"),
        (GOOD + "[[problems]]\nseqlen_q = 4\nseqlen_k = 1\nwindow = {a = 1}\n", "problem table 2: window must be"),
        (GOOD + GOOD, "problem table 2: b1-h1-q1-k2-d128-auto is there twice"),
        ("[[problems]]\nseqlen_q = [3, 3]\nseqlen_k = 1\n", "problem table 1: b1-h1-q3-k1-d128-auto is there twice"),
        ("name = ", "is not TOML"),
    ],
)
def test_a_bad_toml_suite_is_told_with_its_file_its_table_and_a_hint(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(AttnbenchError) as caught:
        load_suite(path)
    assert words in caught.value.message
    assert str(path) in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 2


def test_a_suite_file_that_cannot_be_read_is_told_with_a_hint(tmp_path):
    for path, words in ((tmp_path / "none.toml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(AttnbenchError, match=words) as caught:
            load_suite(path)
        assert str(path) in caught.value.message
        assert caught.value.hint


def test_a_suite_file_that_is_not_text_is_not_toml(tmp_path):
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AttnbenchError, match="is not TOML"):
        load_suite(path)


@pytest.mark.parametrize("size", [2**40 + 1, 10**700, 10**5000], ids=["2**40+1", "10**700", "10**5000"])
@pytest.mark.parametrize(
    "field", ["batch", "heads_q", "heads_kv", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v", "window"]
)
def test_a_size_beyond_any_memory_is_refused_by_name(field, size):
    with pytest.raises(ValueError, match=rf"^{field} must be at most 2\*\*40$"):
        Problem(**{"seqlen_q": 1, "seqlen_k": 1, field: size})


def test_a_softmax_scale_beyond_floats_is_refused():
    with pytest.raises(ValueError, match=r"^softmax_scale must be positive and finite"):
        Problem(seqlen_q=1, seqlen_k=1, softmax_scale=10**400)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_the_work_of_a_long_problem_is_known_at_once(causal, window):
    problem = Problem(seqlen_q=10**10, seqlen_k=10**10, causal=causal, window=window, dtype="fp16")
    n = 10**10
    pairs = {
        (False, None): n * n,
        (True, None): n * (n + 1) // 2,
        (True, 3): 3 * n - 3,
        (False, 3): 5 * n - 6,
    }
    assert problem.visible_pairs == pairs[causal, window]
    assert problem.visible_rows == n
    assert problem.bytes_moved == 2 * 4 * n * 128


def test_a_suite_of_many_problems_is_made_at_once(tmp_path):
    many = ", ".join(map(str, range(1, 151)))
    suite = load_suite(write(tmp_path, f"[[problems]]\nseqlen_q = [{many}]\nseqlen_k = [{many}]\n"))
    assert len(suite) == 150 * 150


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, GOOD + "window = " + "{a = " * 100_000])
def test_a_suite_that_is_nested_without_end_is_one_clear_error(tmp_path, text):
    with pytest.raises(AttnbenchError, match=r"mine\.toml is nested too deeply$"):
        load_suite(write(tmp_path, text))
