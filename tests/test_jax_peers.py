"""The plugins jax_xla, jax_cudnn and jax_pallas: what they refuse, what they ask of JAX, what is shared with torch.

jax_xla runs as it is. Of the two for GPUs everything runs here but the kernels: cuDNN has a stand-in with its rules,
Pallas's Triton kernels are interpreted, and FlashAttention-3 has a stand-in, too.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import python

from attnbench import Problem
from attnbench.backend import Backend
from attnbench.devices.cuda import CudaDevice
from attnbench.problem import Dtype
from attnbench.reference import Reference, make_inputs
from attnbench_plugins import jax_arrays, jax_cudnn, jax_pallas
from attnbench_plugins.jax_cudnn import JaxCudnn
from attnbench_plugins.jax_pallas import JaxPallas
from attnbench_plugins.jax_xla import JaxXla

XLA, CUDNN, PALLAS = JaxXla(), JaxCudnn(), JaxPallas()
NO_KEY = "JAX gives a query that sees no key other values than zeros"
ONE_SIZE = "one head size for q, k and v"
OF_16 = "lengths must be multiples of 16"
GROUPED = "causal grouped heads: fp16 on Hopper, lengths of multiples of 128, head sizes of multiples of 64"
SINGLE = "one query: head sizes of a power of 2, and keys of multiples of 16"
INTERPRETED = pytest.mark.skipif(
    tuple(map(int, importlib.metadata.version("jax").split(".")[:2])) < (0, 9), reason="as JAX 0.9 and later have them"
)


def problem(seqlen_q: int = 128, seqlen_k: int = 256, dtype: Dtype = "fp16", **fields: Any) -> Problem:
    return Problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, dtype=dtype, **{"head_dim": 64, **fields})


def judged(backend: Backend, case: Problem) -> str:
    inputs = make_inputs(case, 0)
    call = backend.prepare(case, inputs.q, inputs.k, inputs.v)
    call()
    return Reference.of(case, inputs, 0).judge(call()).fault


# --- what is there, and what is refused -------------------------------------------------------------------------------


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert XLA.unavailable() is None, "the extra peers installs it"
    monkeypatch.setattr(CudaDevice, "unavailable", lambda self: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    there = {"jax", "jax_cuda12_plugin"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in there else None)
    assert (XLA.unavailable(), CUDNN.unavailable()) == ("jaxlib is not installed: pip install 'attnbench[jax]'", None)
    assert PALLAS.unavailable() == "absl is not installed: pip install 'attnbench[jax-cuda]'"
    there.remove("jax_cuda12_plugin")
    reason = "jax_cuda13_plugin is not installed: pip install 'attnbench[jax-cuda]'"
    assert (CUDNN.unavailable(), PALLAS.unavailable()) == (reason, reason)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert CUDNN.unavailable() == "it needs a GPU of compute capability 8.0 or later, and this one has 7.5"


def test_describing_them_imports_no_jax() -> None:
    answer = python(
        """
        import sys
        from attnbench import Problem
        from attnbench_plugins import jax_cudnn, jax_pallas, jax_xla
        for module in (jax_cudnn, jax_pallas, jax_xla):
            for backend in module.attnbench_backends():
                backend.unavailable(), backend.unsupported(Problem(seqlen_q=1, seqlen_k=1, dtype="bf16"))
                print(backend.name, backend.device)
        print({"jax", "jaxlib"} & set(sys.modules))
        """
    )
    assert answer.out.split("\n")[:4] == ["jax_cudnn cuda", "jax_pallas cuda", "jax_xla cpu", "set()"], answer.err


@pytest.mark.parametrize(
    ("backend", "case", "reason"),
    [
        *((backend, problem(direction="bwd"), "forward only") for backend in (XLA, CUDNN, PALLAS)),
        *((backend, problem(head_dim_v=32), ONE_SIZE) for backend in (CUDNN, PALLAS)),
        (CUDNN, problem(128, 64, causal=True), NO_KEY),
        *((backend, problem(dtype=dtype), None) for backend in (XLA, CUDNN, PALLAS) for dtype in ("fp16", "bf16")),
        *((backend, problem(9, 20, causal=True, window=4, heads_q=4, heads_kv=2), None) for backend in (XLA, CUDNN)),
        (XLA, problem(128, 64, "fp32", causal=True, head_dim=17, head_dim_v=5), None),
        (CUDNN, problem(dtype="fp32"), "fp16 and bf16 only"),
        (CUDNN, problem(head_dim=256), None),
        (CUDNN, problem(head_dim=264), "head sizes must be multiples of 8 up to 256"),
        (CUDNN, problem(head_dim=20), "head sizes must be multiples of 8 up to 256"),
        (PALLAS, problem(dtype="fp32"), "fp16 and bf16 only: through Triton fp32 is multiplied as TF32"),
        (PALLAS, problem(head_dim=8), "head sizes of at least 16"),
        (PALLAS, problem(window=9), "no mask but a causal one"),
        (PALLAS, problem(causal=True), "its causal mask is aligned top-left"),
        (PALLAS, problem(256, 256, causal=True), None),
        (PALLAS, problem(256, 256, causal=True, heads_q=4, heads_kv=2), None),
        (PALLAS, problem(256, 256, "bf16", causal=True, heads_q=4, heads_kv=2), GROUPED),
        (PALLAS, problem(192, 192, causal=True, heads_q=4, heads_kv=2), GROUPED),
        (PALLAS, problem(256, 256, causal=True, heads_q=4, heads_kv=2, head_dim=32), GROUPED),
        (PALLAS, problem(128, 256, "bf16", heads_q=4, heads_kv=2, head_dim=40), None),
        (PALLAS, problem(120, 256), OF_16),
        (PALLAS, problem(128, 250), OF_16),
        (PALLAS, problem(4, 256, heads_q=4, heads_kv=1), None),
        (PALLAS, problem(1, 512, causal=True), None),
        (PALLAS, problem(1, 500), SINGLE),
        (PALLAS, problem(1, 512, head_dim=96), SINGLE),
    ],
    ids=lambda x: getattr(x, "case_id", None) or getattr(x, "name", None),
)
def test_what_is_refused_has_its_reason(backend: Backend, case: Problem, reason: str | None) -> None:
    assert backend.unsupported(case) == reason


def test_before_hopper_cudnn_and_pallas_take_less(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (jax_cudnn, jax_pallas):
        monkeypatch.setattr(module, "capability", lambda: (8, 0))
    assert CUDNN.unsupported(problem(head_dim=136)) == "head sizes must be multiples of 8 up to 128"
    assert PALLAS.unsupported(problem(256, 256, causal=True, heads_q=4, heads_kv=2)) == GROUPED
    assert PALLAS.unsupported(problem(256, 256, causal=True)) is None


def test_the_reason_is_true_of_a_query_that_sees_no_key() -> None:
    jax = jax_arrays.jax_on("cpu")
    q, k = jax.numpy.ones((1, 2, 1, 16)), jax.numpy.ones((1, 1, 1, 16))
    mask = jax.numpy.asarray([[[[False], [True]]]])
    assert (jax.nn.dot_product_attention(q, k, k, mask=mask)[0, 0] != 0).all()


# --- XLA on a CPU -----------------------------------------------------------------------------------------------------

SHAPES = (
    problem(130, 70),
    problem(70, 130, head_dim=32, head_dim_v=64),
    problem(64, 40, heads_q=2, causal=True),
    problem(40, 8, window=4),
    problem(48, 48, batch=2, heads_q=3, causal=True),
    problem(48, 64, batch=2, heads_q=8, heads_kv=2, causal=True),
    problem(48, 48, heads_q=4, heads_kv=1, causal=True, window=5),
    problem(40, 48, heads_q=4, heads_kv=2, window=9),
    problem(200, 64, batch=2, heads_q=6, heads_kv=2, softmax_scale=0.3),
    problem(1, 1, causal=True, head_dim=17),
    problem(1, 200, heads_q=4, heads_kv=2, causal=True),
)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda p: p.case_id)
def test_masks_groups_and_head_sizes_together_are_right(dtype: Dtype, shape: Problem) -> None:
    case = Problem.from_json(shape.to_json() | {"dtype": dtype})
    assert XLA.unsupported(case) is None
    assert judged(XLA, case) == ""


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_every_call_reads_what_q_k_and_v_hold_then(dtype: Dtype) -> None:
    case = problem(6, 9, dtype, heads_q=2)
    given, others = make_inputs(case, 0), make_inputs(case, 1)
    call = XLA.prepare(case, given.q, given.k, given.v)
    before = call().clone()
    for name in "qkv":
        getattr(given, name).data.copy_(getattr(others, name))
        after = call().clone()
        assert not after.equal(before)
        before = after
    assert after.equal(XLA.prepare(case, others.q, others.k, others.v)())


def test_jax_reads_the_memory_that_torch_has() -> None:
    jax_arrays.jax_on("cpu")
    tensor = torch.zeros(2, 3, 5)
    assert jax_arrays.view(tensor).unsafe_buffer_pointer() == tensor.data_ptr()
    with pytest.raises(ValueError, match="copy=False"):
        jax_arrays.view(torch.zeros(99)[1:])


@pytest.mark.parametrize("count", [1, 2])
def test_xla_has_torchs_threads(count: int) -> None:
    """Its client starts once in a process."""
    answer = python(
        f"""
        import pathlib
        import torch
        from attnbench import Problem
        from attnbench_plugins.jax_xla import JaxXla
        torch.set_num_threads({count})
        case = Problem(seqlen_q=8, seqlen_k=8, dtype="fp32")
        JaxXla().prepare(case, *(torch.ones(case.q_shape) for _ in "qkv"))()
        names = [(task / "comm").read_text().strip() for task in pathlib.Path("/proc/self/task").iterdir()]
        print(sum("XLAEigen" in name for name in names), JaxXla().parallel_units(case))
        """
    )
    assert answer.out.split() == [str(count)] * 2, answer.err


# --- between torch's stream and XLA's ---------------------------------------------------------------------------------


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The plugins for GPUs with JAX on a CPU, and whether a CUDA graph is being captured."""
    state = SimpleNamespace(capturing=False)
    for module in (jax_cudnn, jax_pallas):
        monkeypatch.setattr(module, "jax_on", lambda device: jax_arrays.jax_on("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    for how_often in ("CALLS", "ROUNDS"):
        monkeypatch.setattr(jax_arrays, how_often, 1)
    return state


def test_a_call_in_a_capture_is_refused_before_xla_is_asked(on_a_cpu: SimpleNamespace) -> None:
    jax_arrays.jax_on("cpu")
    asked = []
    call = jax_arrays.on_torchs_stream(lambda q: asked.append(q) or q, torch.ones(3))
    assert call().tolist() == [1, 1, 1]
    on_a_cpu.capturing = True
    with pytest.raises(RuntimeError, match="XLA runs on streams of its own, which a CUDA graph cannot hold"):
        call()
    assert len(asked) == 1


def test_each_call_imports_q_anew_and_exports_the_output(
    on_a_cpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is what orders XLA's stream after torch's, and torch's after XLA's."""
    jax_arrays.jax_on("cpu")
    imported = []
    own = jax_arrays.view
    monkeypatch.setattr(jax_arrays, "view", lambda tensor: imported.append(tensor) or own(tensor))
    q, k = torch.ones(4), own(torch.full((4,), 2.0))
    call = jax_arrays.on_torchs_stream(lambda q, k: q + k, q, k)
    assert [call()[0].item(), call()[0].item()] == [3, 3]
    assert [tensor is q for tensor in imported] == [True, True]


def test_jax_is_told_not_to_take_all_of_a_gpus_memory() -> None:
    answer = python(
        """
        import os
        os.environ.pop("XLA_PYTHON_CLIENT_PREALLOCATE", None), os.environ.pop("JAX_PLATFORMS", None)
        from attnbench_plugins.jax_arrays import jax_on
        jax_on("cuda")
        print(os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"], os.environ["JAX_PLATFORMS"])
        """
    )
    assert answer.out.split() == ["false", "cuda"], answer.err


def test_the_fastest_candidate_that_compiles_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    jax_arrays.jax_on("cpu")
    q = jax_arrays.view(torch.ones(8))
    monkeypatch.setattr(jax_arrays, "ROUNDS", 2)
    seconds = iter([1.5, 3.0, 1.0, 9.0, 2.0, 2.0])
    monkeypatch.setattr(jax_arrays, "_seconds", lambda call: next(seconds))

    def fails(q: Any) -> Any:
        raise ValueError("no such tile")

    kept = jax_arrays.fastest_looped([lambda q: q + 1, fails, lambda q: q + 2, lambda q: q + 3], q)
    assert kept(q).tolist() == [3.0] * 8

    def fails_too(q: Any) -> Any:
        raise TypeError("nor this")

    with pytest.raises(ValueError, match="no such tile"):
        jax_arrays.fastest_looped([fails, fails_too], q)
    with pytest.raises(ValueError, match="no candidate"):
        jax_arrays.fastest_looped([], q)


def test_as_many_candidates_are_timed_as_are_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    jax_arrays.jax_on("cpu")
    q = jax_arrays.view(torch.ones(8))
    monkeypatch.setattr(jax_arrays, "ROUNDS", 1)
    seconds = iter([2.0, 1.0])
    monkeypatch.setattr(jax_arrays, "_seconds", lambda call: next(seconds))

    def fails(q: Any) -> Any:
        raise ValueError("no such tile")

    kept = jax_arrays.fastest_looped([fails, fails, *(lambda q, n=n: q + n for n in (1, 2, 3))], q, most=2)
    assert kept(q).tolist() == [3.0] * 8


# --- cuDNN ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cudnn(on_a_cpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """jax.nn.dot_product_attention with cuDNN's rules: what it was asked for, computed by XLA in fp32."""
    jax = jax_arrays.jax_on("cpu")
    real, asked = jax.nn.dot_product_attention, []

    def attend(query, key, value, bias=None, mask=None, *, scale, is_causal, local_window_size, implementation):
        assert implementation == "cudnn"
        assert query.dtype == key.dtype == value.dtype
        assert query.dtype in ("float16", "bfloat16")
        batch, length, heads, dim = query.shape
        assert key.shape == value.shape == (batch, key.shape[1], key.shape[2], dim)
        assert heads % key.shape[2] == 0
        assert dim % 8 == 0
        assert mask is None
        assert bias is None or (bias.shape == (1, 1, length, key.shape[1]) and bias.dtype == query.dtype)
        # Aligned top-left; a window to the left alone, and under a causal mask alone.
        assert local_window_size is None or (is_causal and local_window_size[1] == 0)
        asked.append({"causal": is_causal, "window": local_window_size, "bias": bias is not None, "heads": heads})
        wide = [array.astype("float32") for array in (query, key, value)]
        out = real(
            *wide,
            None if bias is None else bias.astype("float32"),
            scale=scale,
            is_causal=is_causal,
            local_window_size=local_window_size,
            implementation="xla",
        )
        return out.astype(query.dtype)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    return asked


@pytest.mark.parametrize(
    ("case", "asked"),
    [
        (problem(40, 56), (False, None, False, 1)),
        (problem(40, 56, "bf16", batch=2, heads_q=6, heads_kv=2, softmax_scale=0.3), (False, None, False, 1)),
        (problem(48, 48, batch=2, heads_q=3, causal=True), (True, None, False, 1)),
        (problem(48, 48, "bf16", batch=2, heads_q=6, heads_kv=2, causal=True), (True, None, False, 3)),
        (problem(48, 48, heads_q=4, heads_kv=2, causal=True, window=7), (True, (6, 0), False, 2)),
        (problem(40, 56, heads_q=4, heads_kv=2, causal=True), (False, None, True, 1)),
        (problem(40, 56, "bf16", causal=True, window=7, batch=2), (False, None, True, 1)),
        (problem(48, 48, window=7), (False, None, True, 1)),
        (problem(1, 56, heads_q=4, heads_kv=1, causal=True), (False, None, False, 1)),
    ],
    ids=lambda x: getattr(x, "case_id", None),
)
def test_cudnn_is_asked_for_the_right_thing(cudnn: list[dict[str, Any]], case: Problem, asked: tuple[Any, ...]) -> None:
    assert CUDNN.unsupported(case) is None
    assert judged(CUDNN, case) == ""
    assert cudnn == [dict(zip(("causal", "window", "bias", "heads"), asked))], "traced once"


@pytest.mark.usefixtures("cudnn")
def test_every_call_of_cudnn_reads_what_q_k_and_v_hold_then() -> None:
    case = problem(16, 24, heads_q=2, causal=True)
    given, others = make_inputs(case, 0), make_inputs(case, 1)
    call = CUDNN.prepare(case, given.q, given.k, given.v)
    for name in "qkv":
        getattr(given, name).data.copy_(getattr(others, name))
    assert call().equal(CUDNN.prepare(case, others.q, others.k, others.v)())


# --- Pallas -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def interpreted(on_a_cpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """JAX's Triton kernels, interpreted, and which of them was asked for."""
    jax_arrays.jax_on("cpu")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import attention, decode_attention

    asked: list[str] = []

    def interpret(kernel: Any, name: str) -> Any:
        return lambda *given, **how: asked.append(name) or kernel(*given, **how, interpret=True)

    for module, name in ((attention, "mha"), (decode_attention, "mqa")):
        monkeypatch.setattr(module, name, interpret(getattr(module, name), name))
    return asked


@INTERPRETED
@pytest.mark.parametrize(
    "case",
    [
        problem(48, 64, "bf16", batch=2, heads_q=2, softmax_scale=0.3),
        problem(48, 48, "bf16", heads_q=2, causal=True, head_dim=40),
        problem(24, 64, "bf16", heads_q=4, heads_kv=2, head_dim=32),
        problem(96, 96, heads_q=2, causal=True, head_dim=32),
    ],
    ids=lambda p: p.case_id,
)
def test_pallas_through_triton_is_right(interpreted: list[str], case: Problem) -> None:
    assert PALLAS.unsupported(case) is None
    assert judged(PALLAS, case) == ""
    assert set(interpreted) == {"mha"}


@INTERPRETED
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("case", [problem(1, 512, heads_q=6, heads_kv=2, batch=2, causal=True), problem(1, 48)])
def test_pallas_for_one_query_splits_the_keys(interpreted: list[str], dtype: Dtype, case: Problem) -> None:
    own = Problem.from_json(case.to_json() | {"dtype": dtype})
    assert PALLAS.unsupported(own) is None
    assert judged(PALLAS, own) == ""
    assert set(interpreted) == {"mqa"}


def test_the_keys_of_one_query_are_split_into_whole_tiles() -> None:
    assert jax_pallas.splits(problem(1, 4096), 132) == [(128, 32), (64, 64), (32, 128), (1, 128)]
    assert jax_pallas.splits(problem(1, 48), 132) == [(1, 16)]
    assert jax_pallas.splits(problem(1, 40), 132) == []


def test_the_more_heads_there_are_the_fewer_parts_are_tried() -> None:
    found = {
        heads: [parts for parts, _ in jax_pallas.splits(problem(1, 4096, batch=2, heads_q=heads), 132)]
        for heads in (1, 4, 16, 66, 1000)
    }
    assert found == {1: [128, 64, 32, 1], 4: [32, 16, 8, 1], 16: [8, 4, 2, 1], 66: [2, 1], 1000: [1]}


def test_tiles_fit_the_lengths_and_hoppers_shared_memory() -> None:
    assert jax_pallas.hopper_tiles(problem(256, 512)) == list(jax_pallas.HOPPER_TILES)
    assert (64, 128, 4) not in jax_pallas.hopper_tiles(problem(256, 512, head_dim=128))
    assert jax_pallas.hopper_tiles(problem(128, 128)) == [(64, 64, 2)]
    assert jax_pallas.hopper_tiles(problem(256, 512, head_dim=256)) == [(64, 64, 2)]
    assert jax_pallas.hopper_tiles(problem(256, 512, "bf16")) == []
    assert jax_pallas.triton_tiles(problem(192, 256)) == [(64, 64, 4), (64, 32, 4), (32, 32, 4), (16, 16, 4)]


@dataclass(frozen=True)
class TuningConfig:
    block_q: int
    block_kv: int
    max_concurrent_steps: int
    causal: bool = False


@pytest.fixture
def hopper(on_a_cpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> list[TuningConfig]:
    """A stand-in for jax.experimental.pallas.ops.gpu.attention_mgpu with its rules, and what it was asked for."""
    jax = jax_arrays.jax_on("cpu")
    asked: list[TuningConfig] = []

    def attention(q: Any, k: Any, v: Any, config: TuningConfig) -> Any:
        batch, seqlen_q, heads, dim = q.shape
        assert k.shape == v.shape == (batch, k.shape[1], k.shape[2], dim)
        assert heads % k.shape[2] == 0
        assert dim % 64 == 0
        assert q.dtype == k.dtype == v.dtype == "float16"
        assert seqlen_q % (2 * config.block_q) == 0
        assert k.shape[1] % config.block_kv == 0
        asked.append(config)
        wide = [array.astype("float32") for array in (q, k, v)]
        # No scale, and a causal mask aligned top-left.
        out = jax.nn.dot_product_attention(*wide, scale=1.0, is_causal=config.causal, implementation="xla")
        return out.astype(q.dtype)

    stand_in = SimpleNamespace(attention=attention, TuningConfig=TuningConfig)
    import jax.experimental.pallas.ops.gpu as ops

    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.ops.gpu.attention_mgpu", stand_in)
    monkeypatch.setattr(ops, "attention_mgpu", stand_in, raising=False)
    return asked


@pytest.mark.parametrize(
    "case",
    [
        problem(128, 256, batch=2, heads_q=2, softmax_scale=0.3),
        problem(64, 256, heads_q=4, heads_kv=1),
        problem(256, 256, causal=True, heads_q=2, head_dim=128),
        problem(256, 256, causal=True, batch=2, heads_q=4, heads_kv=2),
    ],
    ids=lambda p: p.case_id,
)
def test_pallas_on_hopper_is_asked_for_the_right_thing(hopper: list[TuningConfig], case: Problem) -> None:
    assert PALLAS.unsupported(case) is None
    assert judged(PALLAS, case) == ""
    tiles = {(config.block_q, config.block_kv, config.max_concurrent_steps) for config in hopper}
    assert tiles == set(jax_pallas.hopper_tiles(case))
    assert {config.causal for config in hopper} == {case.causal}


@INTERPRETED
def test_what_pallas_refuses_on_hopper_goes_through_triton_where_that_takes_it(
    hopper: list[TuningConfig], interpreted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*given: Any) -> Any:
        raise ValueError("Causal masking not supported with cuda versions between 12.8.0 and 12.9.1")

    mgpu = sys.modules["jax.experimental.pallas.ops.gpu.attention_mgpu"]
    monkeypatch.setattr(mgpu, "attention", refuses)
    case = problem(256, 256, causal=True)
    assert jax_pallas.hopper_tiles(case)
    assert judged(PALLAS, case) == ""
    assert set(interpreted) == {"mha"}
    with pytest.raises(ValueError, match="Causal masking"):  # heads that are grouped it does not take
        judged(PALLAS, problem(256, 256, causal=True, heads_q=4, heads_kv=2))
