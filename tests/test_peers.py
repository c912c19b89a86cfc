"""The plugins openvino, onnxruntime and sdpa_upcast: which op and which settings, what they refuse, what they read."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from helpers import python
from torch import Tensor

from attnbench import Problem
from attnbench.backend import Backend
from attnbench.problem import Dtype
from attnbench.reference import Reference, make_inputs, torch_dtype
from attnbench_plugins import onnxruntime, openvino, packages
from attnbench_plugins.folding import fold, folded_visible
from attnbench_plugins.onnxruntime import OnnxRuntime
from attnbench_plugins.openvino import OpenVino
from attnbench_plugins.sdpa import Sdpa
from attnbench_plugins.sdpa_upcast import SdpaUpcast

PEERS = (OpenVino(), OnnxRuntime(), SdpaUpcast())
LIBRARIES = PEERS[:2]


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


def test_a_library_older_than_the_extra_asks_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    has = {"openvino": "2025.4.1", "onnx": "1.17.0", "onnxruntime": "1.24.0.dev1"}
    monkeypatch.setattr(packages, "installed_version", has.get)
    hint = "is installed, and it takes"
    assert OpenVino().unavailable() == f"openvino 2025.4.1 {hint} >=2026.2: pip install 'attnbench[openvino]'"
    assert OnnxRuntime().unavailable() == f"onnx 1.17.0 {hint} >=1.18: pip install 'attnbench[onnxruntime]'"
    monkeypatch.setitem(has, "onnx", "1.18.0")
    assert OnnxRuntime().unavailable() is None, "a later version before its release is later"


@pytest.mark.parametrize(
    ("backend", "absent", "reason"),
    [
        (OpenVino(), "openvino", "openvino is not installed: pip install 'attnbench[openvino]'"),
        (OnnxRuntime(), "onnxruntime", "onnxruntime is not installed: pip install 'attnbench[onnxruntime]'"),
        (OnnxRuntime(), "onnx", "onnx is not installed: pip install 'attnbench[onnxruntime]'"),
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
        from attnbench_plugins import onnxruntime, openvino, sdpa_upcast
        for module in (onnxruntime, openvino, sdpa_upcast):
            for backend in module.attnbench_backends():
                backend.unavailable(), backend.unsupported(Problem(seqlen_q=1, seqlen_k=1, dtype="bf16"))
        print({"openvino", "onnxruntime", "onnx"} & set(sys.modules))
        """
    )
    assert answer.out.strip() == "set()", answer.err


@pytest.mark.parametrize(
    ("backend", "case", "reason"),
    [
        *((backend, problem(8, 8, "bf16", direction="bwd"), "forward only") for backend in PEERS),
        (OpenVino(), problem(9, 8, causal=True), "OpenVINO gives a query that sees no key NaN, not zeros"),
        (OpenVino(), problem(40, 8, window=4), "OpenVINO gives a query that sees no key NaN, not zeros"),
        (
            OnnxRuntime(),
            problem(9, 8, causal=True),
            "ONNX Runtime gives a query that sees no key other values than zeros",
        ),
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
    assert first.isnan().all() if backend.name == "openvino" else (first != 0).all()


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
    can = dtype.upper() in openvino.core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
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
        patch.setattr(openvino, "core", lambda: SimpleNamespace(compile_model=compile_model))
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


def test_an_interrupt_after_openvinos_models_have_gone_is_an_interrupt() -> None:
    """A process with two Cores, the first of which has gone, dies of the next signal: its handler has no stack."""
    answer = python(
        """
        import signal
        import torch
        from attnbench import Problem
        from attnbench_plugins.openvino import OpenVino
        for keys in (8, 16, 24):
            case = Problem(seqlen_q=8, seqlen_k=keys, dtype="fp32")
            shapes = case.q_shape, case.k_shape, case.v_shape
            call = OpenVino().prepare(case, *map(torch.ones, shapes))
            call()
        del call
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            print("interrupted")
        """
    )
    assert answer.out.strip() == "interrupted", answer


# --- ONNX Runtime -----------------------------------------------------------------------------------------------------


def graph(case: Problem) -> onnxruntime.Graph:
    out = torch.empty(case.out_shape, dtype=torch_dtype(case))
    return onnxruntime.attention(case, *tensors(case), out)


def ops(case: Problem) -> list[str]:
    return [node.op_type for node in graph(case).nodes]


@pytest.mark.parametrize(
    ("case", "in_place"),
    [
        (problem(128, 256), True),
        (problem(129, 256), False),
        (problem(64, 256, heads_q=2), True),
        (problem(64, 256, heads_q=4, heads_kv=1), False),
        (problem(129, 256, causal=True), True),
        (problem(256, 256, causal=True, window=8), True),
        (problem(64, 64, head_dim=20, causal=True), True),
        (problem(64, 256, head_dim_v=32), False),
    ],
    ids=lambda x: getattr(x, "case_id", None),
)
def test_onnxruntime_reads_keys_in_place_but_for_flash_attention(case: Problem, in_place: bool) -> None:
    made = graph(case)
    assert [node.op_type for node in made.nodes] == ["MultiHeadAttention"]
    assert [made.inputs[name].dim() for name in "qkv"] == ([3, 4, 4] if in_place else [3, 3, 3])


def test_onnxruntime_takes_group_query_attention_for_square_causal_problems() -> None:
    assert ops(problem(64, 64, causal=True, heads_q=2)) == ["GroupQueryAttention"]
    grouped = ops(problem(64, 64, causal=True, heads_q=4, heads_kv=2))
    assert grouped == ["Transpose", "Reshape", "GroupQueryAttention", "Reshape", "Transpose"]


@pytest.mark.parametrize("causal", [False, True])
def test_onnxruntime_casts_what_is_not_fp32_and_nothing_else(causal: bool) -> None:
    assert Counter(ops(problem(64, 64, "fp32", causal=causal)))["Cast"] == 0
    assert Counter(ops(problem(64, 64, "fp16", causal=causal)))["Cast"] == 4
    assert Counter(ops(problem(64, 64, "bf16", causal=causal, window=8)))["Cast"] == 4, "the mask is fp32 as it is"


def test_onnxruntime_copies_no_input() -> None:
    case = problem(64, 64, heads_q=2)
    q, k, v = tensors(case)
    out = torch.empty(case.out_shape)
    made = onnxruntime.attention(case, q, k, v, out)
    found = [tensor.data_ptr() for tensor in (*made.inputs.values(), *made.outputs.values())]
    assert found == [tensor.data_ptr() for tensor in (q, k, v, out)]


@pytest.mark.parametrize("count", [1, 2])
def test_onnxruntime_has_torchs_threads(threads: Callable[[int], None], count: int) -> None:
    threads(count)
    case = problem(16, 16)
    options = onnxruntime.session(graph(case)).get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (count, 1)
    assert OnnxRuntime().parallel_units(case) == count


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
