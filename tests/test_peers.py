"""The plugins openvino and sdpa_upcast: which op and which settings, what they refuse, what they read."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import python
from torch import Tensor

from attnbench import Problem
from attnbench.backend import Backend
from attnbench.problem import Dtype
from attnbench.reference import Reference, make_inputs
from attnbench_plugins import openvino
from attnbench_plugins.folding import fold, folded_visible
from attnbench_plugins.openvino import OpenVino
from attnbench_plugins.sdpa import Sdpa
from attnbench_plugins.sdpa_upcast import SdpaUpcast

PEERS = (OpenVino(), SdpaUpcast())
LIBRARIES = PEERS[:1]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def problem(seqlen_q: int, seqlen_k: int, dtype: Dtype = "fp32", **fields) -> Problem:
    return Problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, dtype=dtype, **{"head_dim": 64, **fields})


def tensors(case: Problem, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    inputs = make_inputs(case, seed)
    return inputs.q, inputs.k, inputs.v


# --- what is there, and what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "absent", "reason"),
    [
        (OpenVino(), "openvino", "openvino is not installed: pip install 'attnbench[peers]'"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_has_it(
    backend: Backend, absent: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else find(name))
    assert backend.unavailable() == reason


@pytest.mark.parametrize("backend", PEERS, ids=lambda b: b.name)
def test_what_the_extra_peers_installs_makes_them_available(backend: Backend) -> None:
    assert backend.unavailable() is None


def test_listing_them_imports_no_library() -> None:
    answer = python(
        """
        import sys
        from attnbench import Problem
        from attnbench_plugins import openvino, sdpa_upcast
        for module in (openvino, sdpa_upcast):
            for backend in module.attnbench_backends():
                backend.unavailable(), backend.unsupported(Problem(seqlen_q=1, seqlen_k=1, dtype="bf16"))
        print({"openvino"} & set(sys.modules))
        """
    )
    assert answer.out.strip() == "set()", answer.err


@pytest.mark.parametrize(
    ("backend", "case", "reason"),
    [
        *((backend, problem(8, 8, "bf16", direction="bwd"), "forward only") for backend in PEERS),
        (OpenVino(), problem(9, 8, causal=True), "OpenVINO gives a query that sees no key NaN, not zeros"),
        (OpenVino(), problem(40, 8, window=4), "OpenVINO gives a query that sees no key NaN, not zeros"),
        (SdpaUpcast(), problem(8, 8), "nothing to upcast"),
        *((backend, problem(9, 8, "fp16"), None) for backend in PEERS),
        *((backend, problem(8, 9, "bf16", causal=True, heads_q=4, heads_kv=2), None) for backend in PEERS),
        (SdpaUpcast(), problem(9, 8, "fp16", causal=True), None),
    ],
)
def test_what_is_refused_has_its_reason(backend: Backend, case: Problem, reason: str | None) -> None:
    assert backend.unsupported(case) == reason


@pytest.mark.parametrize("backend", LIBRARIES, ids=lambda b: b.name)
def test_the_reason_is_true_of_a_query_that_sees_no_key(backend: Backend) -> None:
    case = problem(9, 8, causal=True)
    first = backend.prepare(case, *tensors(case))()[0, 0, 0]
    assert first.isnan().all()


@pytest.mark.parametrize("backend", LIBRARIES, ids=lambda b: b.name)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_tensor_that_is_not_contiguous_is_refused(backend: Backend, which: int) -> None:
    case = problem(8, 8, heads_q=2)
    given = list(tensors(case))
    given[which] = given[which].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="must be contiguous"):
        backend.prepare(case, *given)


# --- what is computed -------------------------------------------------------------------------------------------------

SHAPES = (
    problem(130, 70),
    problem(70, 130, head_dim=32, head_dim_v=64),
    problem(140, 150, head_dim=64, head_dim_v=32, causal=True),
    problem(48, 48, batch=2, heads_q=3, causal=True),
    problem(48, 48, batch=2, heads_q=8, heads_kv=2, causal=True),
    problem(48, 48, heads_q=4, heads_kv=2, head_dim=20, causal=True),
    problem(48, 48, heads_q=4, heads_kv=2, head_dim=32, head_dim_v=16, causal=True),
    problem(48, 64, batch=2, heads_q=8, heads_kv=2, causal=True),
    problem(48, 48, heads_q=4, heads_kv=1, causal=True, window=5),
    problem(40, 48, heads_q=4, heads_kv=2, window=9),
    problem(200, 64, batch=2, heads_q=6, heads_kv=2, softmax_scale=0.3),
    problem(1, 1, causal=True),
    problem(1, 200, heads_q=4, heads_kv=2, causal=True),
)


@pytest.mark.parametrize("backend", PEERS, ids=lambda b: b.name)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda p: p.case_id)
def test_masks_groups_and_head_sizes_together_are_right(backend: Backend, dtype: Dtype, shape: Problem) -> None:
    case = Problem.from_json(shape.to_json() | {"dtype": dtype})
    if reason := backend.unsupported(case):
        assert (backend.name, reason) == ("sdpa_upcast", "nothing to upcast")
        return
    inputs = make_inputs(case, 0)
    check = Reference.of(case, inputs, 0).judge(backend.prepare(case, inputs.q, inputs.k, inputs.v)())
    assert check.fault == ""


@pytest.mark.parametrize("backend", PEERS, ids=lambda b: b.name)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_every_call_reads_what_q_k_and_v_hold_then(backend: Backend, dtype: Dtype) -> None:
    case = problem(6, 9, dtype, heads_q=2)
    if backend.unsupported(case):
        return
    given, others = tensors(case), tensors(case, 1)
    call = backend.prepare(case, *given)
    before = call().clone()
    for tensor, other in zip(given, others):
        tensor.data.copy_(other)
        after = call().clone()
        assert not after.equal(before)
        before = after
    assert after.equal(backend.prepare(case, *others)())


@pytest.mark.parametrize("backend", LIBRARIES, ids=lambda b: b.name)
def test_the_output_is_written_where_it_is_returned(backend: Backend) -> None:
    case = problem(6, 9)
    call = backend.prepare(case, *tensors(case))
    first = call()
    kept = first.clone()
    first.fill_(torch.nan)
    assert call() is first
    assert first.equal(kept)


def test_queries_of_a_key_head_are_folded_in_place() -> None:
    case = problem(3, 5, batch=2, heads_q=6, heads_kv=2, causal=True)
    q, k, _ = tensors(case)
    folded = fold(case, q)
    assert folded.shape == (2, 2, 9, 64)
    assert folded.data_ptr() == q.data_ptr()
    assert folded[1, 1, 4].equal(q[1, 4, 1]), "the second of the three heads that read the second key head"
    assert fold(case, k).equal(k)
    mask = folded_visible(case, q.device)
    assert mask is not None
    assert mask.tolist() == [[True, True, True, row > 0, row > 1] for row in (0, 1, 2)] * 3
    assert folded_visible(problem(3, 5), q.device) is None


# --- OpenVINO ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_openvino_computes_in_the_problems_dtype_where_the_processor_can(dtype: Dtype) -> None:
    import openvino as ov

    case = problem(16, 16, dtype)
    compiled = openvino.compiled(case, *tensors(case))
    native = {"fp32": ov.Type.f32, "fp16": ov.Type.f16, "bf16": ov.Type.bf16}[dtype]
    can = dtype.upper() in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == (native if can else ov.Type.f32)
    assert {i.get_element_type() for i in (*compiled.inputs, *compiled.outputs)} == {native}


def test_openvino_is_given_fp32_as_the_precision_and_does_not_choose_it() -> None:
    """Where bf16 is fast OpenVINO's own choice for fp32 is bf16, which this machine may not show."""
    given = {}

    def compile_model(model: object, device: str, settings: dict[object, object]) -> None:
        given.update({"device": device} | {str(name): value for name, value in settings.items()})

    import openvino as ov

    case = problem(16, 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ov, "compile_model", compile_model)
        openvino.compiled(case, *tensors(case))
    assert given["device"] == "CPU"
    assert given["INFERENCE_PRECISION_HINT"] == ov.Type.f32


@pytest.mark.parametrize("count", [1, 2])
def test_openvino_has_one_stream_of_torchs_threads(threads: Callable[[int], None], count: int) -> None:
    threads(count)
    case = problem(16, 16)
    compiled = openvino.compiled(case, *tensors(case))
    assert compiled.get_property("INFERENCE_NUM_THREADS") == count
    assert compiled.get_property("NUM_STREAMS") == 1
    assert compiled.get_property("PERFORMANCE_HINT") == "LATENCY"
    assert OpenVino().parallel_units(case) == count


# --- sdpa in fp32 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("fields", [{}, {"causal": True, "heads_q": 4, "heads_kv": 2}], ids=["plain", "causal-grouped"])
def test_sdpa_upcast_is_sdpa_in_fp32_rounded_once(dtype: Dtype, fields: dict) -> None:
    case = problem(40, 56, dtype, **fields)
    q, k, v = tensors(case)
    wide = problem(40, 56, **fields)
    expected = Sdpa("cpu").prepare(wide, q.float(), k.float(), v.float())().to(q.dtype)
    assert SdpaUpcast().prepare(case, q, k, v)().equal(expected)
    assert SdpaUpcast().parallel_units(case) == torch.get_num_threads()
