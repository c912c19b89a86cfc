"""The plugin ggml, with the real library: which kernel it asks for, what it casts and pads, what it refuses."""

from __future__ import annotations

import gc
import importlib.util
import platform
from collections import Counter
from typing import Any

import pytest
import torch
from helpers import python

from attnbench import Problem
from attnbench.problem import Dtype
from attnbench.reference import Reference, make_inputs
from attnbench_plugins import ggml
from attnbench_plugins.ggml import Ggml, most_visible

BACKEND = Ggml()


def problem(seqlen_q: int, seqlen_k: int, dtype: Dtype = "fp32", **fields: Any) -> Problem:
    return Problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, dtype=dtype, **{"head_dim": 64, **fields})


def prepared(case: Problem, seed: int = 0) -> Any:
    inputs = make_inputs(case, seed)
    return BACKEND.prepare(case, inputs.q, inputs.k, inputs.v)


class Recorder:
    """ggml, with a note of each call."""

    def __init__(self) -> None:
        self._ggml = ggml.ggml()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any) -> Any:
            self.calls.append((name, given))
            return getattr(self._ggml, name)(*given)

        return call

    def count(self, name: str) -> int:
        return Counter(called for called, _ in self.calls)[name]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(ggml, "ggml", lambda: recorder)
    return recorder


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BACKEND.unavailable() is None, "the extra peers installs it"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert BACKEND.unavailable() == "xllamacpp is not installed: pip install 'attnbench[ggml]'"


@pytest.mark.parametrize(("machine", "reason"), [("x86_64", True), ("aarch64", False)])
def test_it_is_not_called_where_it_would_end_the_process(
    monkeypatch: pytest.MonkeyPatch, machine: str, reason: bool
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert BACKEND.unavailable() == ("xllamacpp is compiled for processors with AVX2" if reason else None)


def test_describing_it_loads_no_library() -> None:
    answer = python(
        """
        import pathlib
        from attnbench import Problem
        from attnbench_plugins.ggml import attnbench_backends
        for backend in attnbench_backends():
            backend.unavailable(), backend.unsupported(Problem(seqlen_q=1, seqlen_k=1, dtype="bf16"))
        print("xllamacpp" in pathlib.Path("/proc/self/maps").read_text())
        """
    )
    assert answer.out.strip() == "False", answer.err


INEXACT = "up to 1024 keys a query in fp32: ggml adds them up one by one, too inexact for more"


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (problem(8, 8, direction="bwd"), "forward only"),
        (problem(8, 1024), None),
        (problem(8, 1025), INEXACT),
        (problem(1, 8192), None),
        (problem(8, 8192, "fp16"), None),
        (problem(4096, 4096, causal=True), INEXACT),
        (problem(4096, 4096, causal=True, window=1024), None),
        (problem(4096, 4096, window=1024), INEXACT),
        (problem(9, 8, "bf16", causal=True, heads_q=4, heads_kv=2, head_dim=17, head_dim_v=5), None),
    ],
    ids=lambda x: getattr(x, "case_id", None),
)
def test_what_is_refused_has_its_reason(case: Problem, reason: str | None) -> None:
    assert BACKEND.unsupported(case) == reason


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 20])
def test_the_most_keys_that_a_query_sees_are_the_most_of_all_queries(causal: bool, window: int | None) -> None:
    for seqlen_q in (1, 2, 5, 9):
        for seqlen_k in (1, 4, 7, 12):
            case = problem(seqlen_q, seqlen_k, causal=causal, window=window)
            assert most_visible(case) == max(high - low for low, high in map(case.key_range, range(seqlen_q)))


SHAPES = (
    problem(130, 70),
    problem(70, 130, head_dim=32, head_dim_v=64),
    problem(48, 48, batch=2, heads_q=3, causal=True),
    problem(48, 48, batch=2, heads_q=8, heads_kv=2, causal=True),
    problem(20, 600, batch=2, heads_q=2, heads_kv=1, head_dim_v=32),
    problem(3, 200, batch=2, heads_q=4, heads_kv=2, causal=True),
    problem(40, 48, heads_q=4, heads_kv=2, window=9),
    problem(33, 17, head_dim=17, head_dim_v=5, softmax_scale=0.3),
    problem(1, 1, causal=True),
    problem(1, 700, batch=2, heads_q=4, heads_kv=2, causal=True, window=600),
    problem(200, 64, causal=True),
    problem(40, 8, window=4),
)
"""The last two have queries that see no key."""


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda p: p.case_id)
def test_masks_groups_and_head_sizes_together_are_right(dtype: Dtype, shape: Problem) -> None:
    case = Problem.from_json(shape.to_json() | {"dtype": dtype})
    assert BACKEND.unsupported(case) is None
    inputs = make_inputs(case, 0)
    call = BACKEND.prepare(case, inputs.q, inputs.k, inputs.v)
    call().fill_(torch.nan)
    assert Reference.of(case, inputs, 0).judge(call()).fault == ""


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("seqlen_q", [1, 20, 70])
def test_every_call_reads_what_q_k_and_v_hold_then(dtype: Dtype, seqlen_q: int) -> None:
    case = problem(seqlen_q, 90, dtype, heads_q=2)
    given, others = make_inputs(case, 0), make_inputs(case, 1)
    call = BACKEND.prepare(case, given.q, given.k, given.v)
    before = call().clone()
    for name in "qkv":
        getattr(given, name).data.copy_(getattr(others, name))
        after = call().clone()
        assert not after.equal(before)
        before = after
    assert after.equal(prepared(case, 1)())


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_tensor_that_is_not_contiguous_is_refused(which: int) -> None:
    case = problem(8, 8, heads_q=2)
    inputs = make_inputs(case, 0)
    given = [inputs.q, inputs.k, inputs.v]
    given[which] = given[which].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="must be contiguous"):
        BACKEND.prepare(case, *given)


@pytest.mark.parametrize(
    ("case", "casts", "pads", "copies"),
    [
        (problem(70, 90), 0, 0, 0),
        (problem(20, 90), 0, 1, 1),
        (problem(15, 90), 0, 0, 0),
        (problem(35, 90, heads_q=4, heads_kv=2), 0, 0, 0),
        (problem(70, 90, "fp16"), 1, 0, 1),
        (problem(20, 90, "fp16"), 1, 1, 1),
        (problem(1, 90, "fp16"), 2, 0, 1),
        (problem(70, 90, "bf16"), 3, 0, 1),
        (problem(1, 90, "bf16"), 1, 0, 1),
    ],
    ids=lambda x: getattr(x, "case_id", None),
)
def test_no_more_is_cast_padded_or_copied_than_its_kernels_need(
    recorded: Recorder, case: Problem, casts: int, pads: int, copies: int
) -> None:
    prepared(case)
    assert [recorded.count(f"ggml_{what}") for what in ("cast", "pad", "cpy")] == [casts, pads, copies]


def test_inputs_and_output_are_where_torch_has_them(recorded: Recorder) -> None:
    case = problem(70, 90)
    inputs = make_inputs(case, 0)
    out = BACKEND.prepare(case, inputs.q, inputs.k, inputs.v)()
    places = [given[2] for name, given in recorded.calls if name == "ggml_backend_tensor_alloc"]
    assert places == [tensor.data_ptr() for tensor in (inputs.q, inputs.k, inputs.v, out)]


@pytest.mark.parametrize("count", [1, 2])
def test_it_has_torchs_threads(recorded: Recorder, count: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        prepared(problem(8, 8))
        assert BACKEND.parallel_units(problem(8, 8)) == count
    finally:
        torch.set_num_threads(before)
    assert [given[1] for name, given in recorded.calls if name == "ggml_backend_cpu_set_n_threads"] == [count]


def test_all_that_is_ggmls_goes_with_the_call(recorded: Recorder) -> None:
    call = prepared(problem(20, 90, "bf16", causal=True))
    made = [recorded.count(f"ggml_backend_{how}") for how in ("cpu_buffer_from_ptr", "alloc_ctx_tensors")]
    assert made == [5, 1], "q, k, v, the mask and the output, and the rest at once"
    del call
    gc.collect()
    freed = [recorded.count(name) for name in ("ggml_backend_buffer_free", "ggml_backend_free", "ggml_free")]
    assert freed == [6, 1, 1]


def test_a_graph_that_cannot_be_computed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Recorder):
        def ggml_backend_graph_compute(self, *given: Any) -> int:
            return -1

    failing = Failing()
    monkeypatch.setattr(ggml, "ggml", lambda: failing)
    with pytest.raises(RuntimeError, match="ggml could not compute its graph: status -1"):
        prepared(problem(8, 8))
