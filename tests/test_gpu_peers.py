"""The plugins sdpa_flash, sdpa_cudnn, sdpa_efficient, sdpa_math and flex_attention: what they refuse and ask torch for.

What they compute on a GPU is in test_cuda.py; on a CPU the last two are compiled and judged here.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import sysconfig
from typing import Any

import pytest
import torch
from helpers import python

from attnbench import Problem
from attnbench.backend import Backend
from attnbench.devices.cuda import CudaDevice
from attnbench.problem import Dtype
from attnbench.reference import Reference, make_inputs
from attnbench_plugins import cudnn_frontend, flex_attention, sdpa_cudnn, sdpa_efficient, sdpa_flash, sdpa_math
from attnbench_plugins.flex_attention import mask_mod
from attnbench_plugins.masks import WHOLE, visible, window_size
from attnbench_plugins.sdpa import Sdpa
from attnbench_plugins.sdpa_kernels import SdpaKernel

MODULES = (sdpa_flash, sdpa_cudnn, sdpa_efficient, sdpa_math)
ALL = [backend for module in (*MODULES, flex_attention) for backend in module.attnbench_backends()]
FLASH, CUDNN, EFFICIENT, MATH, FLEX = [backend for backend in ALL if backend.device == "cuda"]
MATH_CPU, FLEX_CPU = [backend for backend in ALL if backend.device == "cpu"]
KERNELS = (FLASH, CUDNN, EFFICIENT, MATH)
PEERS = (*KERNELS, FLEX)
FULLY_MASKED = "torch's CUDA kernels give a query that sees no key other values than zeros"
NEWEST = "no grouped heads, which it takes in the newest versions of torch alone"


def problem(seqlen_q: int = 128, seqlen_k: int = 256, dtype: Dtype = "fp16", **fields: Any) -> Problem:
    return Problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, dtype=dtype, **{"head_dim": 64, **fields})


# --- what is there, and what is refused -------------------------------------------------------------------------------


def test_each_plugin_brings_a_backend_of_its_own_name_on_a_gpu_and_two_on_a_cpu_as_well() -> None:
    names = ["sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "sdpa_math", "flex_attention"]
    assert [backend.name for backend in (*KERNELS, FLEX)] == names
    assert [backend.name for backend in (MATH_CPU, FLEX_CPU)] == names[3:]
    assert len(ALL) == 7
    assert all(backend.summary and backend.homepage for backend in ALL)
    assert FLASH.summary == "sdpa's flash attention kernel alone (torch)"


def test_describing_them_imports_neither_flex_attention_nor_a_compiler() -> None:
    answer = python(
        """
        import sys
        from attnbench import Problem
        from attnbench_plugins import flex_attention, sdpa_cudnn, sdpa_efficient, sdpa_flash, sdpa_math
        for module in (flex_attention, sdpa_cudnn, sdpa_efficient, sdpa_flash, sdpa_math):
            for backend in module.attnbench_backends():
                backend.unavailable(), backend.unsupported(Problem(seqlen_q=1, seqlen_k=1, dtype="bf16"))
        print({"torch.nn.attention.flex_attention", "torch._inductor", "triton"} & set(sys.modules))
        """
    )
    assert answer.out.strip() == "set()", answer.err


@pytest.mark.parametrize("backend", PEERS, ids=lambda b: b.name)
def test_without_a_gpu_they_are_unavailable_as_sdpa_is(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaDevice, "unavailable", lambda self: "no GPU here")
    assert backend.unavailable() == "no GPU here"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """A GPU of the compute capability given, with all that the peers look for."""

    def make(*capability: int) -> None:
        monkeypatch.setattr(CudaDevice, "unavailable", lambda self: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())

    return make


def test_on_a_gpu_they_are_available_where_it_has_the_instructions(gpu) -> None:
    gpu(9, 0)
    assert [backend.unavailable() for backend in PEERS] == [None] * 5
    gpu(7, 5)
    reason = "it needs a GPU of compute capability 8.0 or later, and this one has 7.5"
    assert [backend.unavailable() for backend in PEERS] == [reason, reason, None, None, None]


def test_a_torch_without_the_kernel_says_so(gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(9, 0)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert FLASH.unavailable() == "this torch is built without flash attention"
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 8907)
    assert CUDNN.unavailable() == "it needs cuDNN 9, and this torch has 8907"
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert CUDNN.unavailable() == "this torch has no cuDNN"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert FLEX.unavailable() == "triton is not installed: pip install 'attnbench[triton]'"


@pytest.mark.parametrize(
    ("backend", "case", "reason"),
    [
        *((backend, problem(direction="bwd"), "forward only") for backend in PEERS),
        *((backend, problem(), None) for backend in PEERS),
        *((backend, problem(causal=True, dtype="bf16"), None) for backend in PEERS),
        *((backend, problem(128, 64, causal=True), FULLY_MASKED) for backend in (FLASH, CUDNN, EFFICIENT)),
        *((backend, problem(128, 64, causal=True), None) for backend in (MATH, FLEX)),
        *((backend, problem(dtype="fp32"), "fp16 and bf16 only") for backend in (FLASH, CUDNN)),
        *((backend, problem(dtype="fp32"), None) for backend in (EFFICIENT, MATH, FLEX)),
        *((backend, problem(window=9), None) for backend in (CUDNN, EFFICIENT, MATH, FLEX)),
        (FLASH, problem(window=9), "no mask but a causal one"),
        *((backend, problem(heads_q=4, heads_kv=2), None) for backend in (FLASH, CUDNN, MATH, FLEX)),
        (EFFICIENT, problem(heads_q=4, heads_kv=2), NEWEST),
        *((backend, problem(head_dim_v=32), None) for backend in (CUDNN, EFFICIENT, MATH, FLEX)),
        (FLASH, problem(head_dim_v=32), "one head size for q, k and v"),
        (FLASH, problem(head_dim=256), None),
        (FLASH, problem(head_dim=20), None),
        (FLASH, problem(head_dim=257), "head sizes up to 256"),
        (CUDNN, problem(head_dim=128), None),
        (CUDNN, problem(head_dim=136), "head sizes up to 128"),
        (CUDNN, problem(head_dim_v=136), "head sizes up to 128"),
        (CUDNN, problem(head_dim=20), "head sizes must be multiples of 8 in fp16"),
        (CUDNN, problem(1, 1), "more than one key"),
        (EFFICIENT, problem(head_dim_v=20), "head sizes must be multiples of 8 in fp16"),
        (EFFICIENT, problem(head_dim=20, dtype="fp32"), None),
        (EFFICIENT, problem(head_dim=18, dtype="fp32"), "head sizes must be multiples of 4 in fp32"),
        (FLEX, problem(head_dim=8), "head sizes of at least 16"),
        (FLEX, problem(head_dim_v=8), "head sizes of at least 16"),
        (MATH, problem(head_dim=3, head_dim_v=5), None),
    ],
)
def test_what_is_refused_has_its_reason(backend: Backend, case: Problem, reason: str | None) -> None:
    assert backend.unsupported(case) == reason


# --- which kernel torch takes, and with which mask --------------------------------------------------------------------


def enabled() -> set[str]:
    backends = torch.backends.cuda
    kernels = {
        "FLASH_ATTENTION": backends.flash_sdp_enabled,
        "CUDNN_ATTENTION": backends.cudnn_sdp_enabled,
        "EFFICIENT_ATTENTION": backends.mem_efficient_sdp_enabled,
        "MATH": backends.math_sdp_enabled,
    }
    return {name for name, is_enabled in kernels.items() if is_enabled()}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What scaled_dot_product_attention is asked for, and which kernels it may take then."""
    found: list[dict[str, Any]] = []

    def attend(q: object, k: object, v: object, **how: Any) -> torch.Tensor:
        found.append({**how, "kernels": enabled()})
        return torch.zeros(1)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    return found


@pytest.mark.parametrize("backend", KERNELS, ids=lambda b: b.name)
def test_only_its_own_kernel_may_be_taken_and_only_in_the_call(asked, backend: SdpaKernel) -> None:
    case, before = problem(heads_q=4, heads_kv=2, softmax_scale=0.3), enabled()
    inputs = make_inputs(case, 0)
    call = backend.prepare(case, inputs.q, inputs.k, inputs.v)
    assert asked == []
    call()
    assert enabled() == before
    assert asked == [
        {"kernels": {backend.kernel}, "attn_mask": None, "is_causal": False, "scale": 0.3, "enable_gqa": True}
    ]


@pytest.mark.parametrize("backend", KERNELS, ids=lambda b: b.name)
def test_a_square_causal_problem_has_no_mask(asked, backend: SdpaKernel) -> None:
    case = problem(64, 64, causal=True)
    inputs = make_inputs(case, 0)
    backend.prepare(case, inputs.q, inputs.k, inputs.v)()
    assert (asked[0]["attn_mask"], asked[0]["is_causal"]) == (None, True)


SEES_ALL = (problem(1, 64, causal=True), problem(40, 64, window=64), problem(1, 64, causal=True, window=64))
"""Masks that hide nothing."""


@pytest.mark.parametrize("case", SEES_ALL, ids=lambda p: p.case_id)
@pytest.mark.parametrize("backend", [*KERNELS, Sdpa("cpu"), Sdpa("cuda")], ids=lambda b: f"{b.name}-{b.device}")
def test_nothing_is_masked_where_nothing_is_hidden(asked, backend: Backend, case: Problem) -> None:
    inputs = make_inputs(case, 0)
    backend.prepare(case, inputs.q, inputs.k, inputs.v)()
    assert (asked[0]["attn_mask"], asked[0]["is_causal"]) == (None, False)
    assert visible(case, inputs.q.device) is None
    assert (mask_mod(case), window_size(case), cudnn_frontend._mask(case)) == (None, (WHOLE, WHOLE), {})


@pytest.mark.parametrize(
    ("backend", "case", "own"),
    [
        (Sdpa("cuda"), problem(causal=True), True),
        (Sdpa("cpu"), problem(causal=True), False),
        (Sdpa("cpu"), problem(window=9, dtype="fp32"), False),
        (FLASH, problem(causal=True), True),
        (EFFICIENT, problem(causal=True), True),
        (CUDNN, problem(causal=True), False),
        (MATH, problem(causal=True, dtype="bf16"), False),
        (EFFICIENT, problem(causal=True, window=9), False),
        (CUDNN, problem(window=9), False),
    ],
)
def test_a_kernels_own_mask_is_taken_and_any_other_is_built_once_to_be_added(
    asked, backend: Backend, case: Problem, own: bool
) -> None:
    from torch.nn.attention.bias import CausalBias

    inputs = make_inputs(case, 0)
    call = backend.prepare(case, inputs.q, inputs.k, inputs.v)
    call()
    call()
    mask = asked[0]["attn_mask"]
    assert asked[1]["attn_mask"] is mask
    assert isinstance(mask, CausalBias) is own
    if not own:
        seen = visible(case, inputs.q.device)
        assert mask.dtype == inputs.q.dtype
        assert (mask == 0).equal(seen)
        assert (mask == -torch.inf).equal(~seen)


def test_on_a_cpu_flex_attention_needs_what_torch_compiles_with(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (MATH_CPU.unavailable(), FLEX_CPU.unavailable()) == (None, None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert FLEX_CPU.unavailable() == "torch writes it for x86 processors with AVX2 alone"
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "/nowhere")
    reason = "torch compiles it with Python's headers, which are not there: apt-get install python3-dev"
    assert FLEX_CPU.unavailable() == reason
    monkeypatch.setattr(shutil, "which", lambda name: None)
    reason = "torch compiles it with {}, which is not there: apt-get install g++, or set CXX"
    assert FLEX_CPU.unavailable() == reason.format("g++")
    monkeypatch.setenv("CXX", "clang++-99")
    assert FLEX_CPU.unavailable() == reason.format("clang++-99")


SHAPES = (
    problem(48, 48, "fp32", causal=True),
    problem(40, 56, "fp32", causal=True, heads_q=4, heads_kv=2),
    problem(40, 56, "bf16", window=7, batch=2),
    problem(40, 56, "fp32", causal=True, window=7, head_dim_v=32),
    problem(56, 40, "fp32", causal=True),
    problem(40, 56, "fp16", heads_q=6, heads_kv=2, softmax_scale=0.3),
)
"""The last but one has queries that see no key."""


def judged(backend: Backend, case: Problem) -> str:
    inputs = make_inputs(case, 0)
    return Reference.of(case, inputs, 0).judge(backend.prepare(case, inputs.q, inputs.k, inputs.v)()).fault


@pytest.mark.parametrize("case", SHAPES, ids=lambda p: p.case_id)
def test_the_math_kernel_is_right_on_a_cpu(case: Problem) -> None:
    assert MATH_CPU.unsupported(case) is None
    assert judged(MATH_CPU, case) == ""
    assert (MATH_CPU.parallel_units(case), MATH.parallel_units(case)) == (torch.get_num_threads(), None)


# --- flex_attention ---------------------------------------------------------------------------------------------------


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """How torch.compile was called; the plugin's function stays as it is, which is slow and right."""
    found: list[dict[str, Any]] = []
    compile_ = torch.compile

    def leave(function: Any, **how: Any) -> Any:
        if function.__module__ != flex_attention.__name__:
            return compile_(function, **how)  # flex_attention's own, by which it is traced
        found.append(how)
        return function

    monkeypatch.setattr(torch, "compile", leave)
    return found


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", SHAPES, ids=lambda p: p.case_id)
@pytest.mark.parametrize("backend", [FLEX, FLEX_CPU], ids=lambda b: b.device)
def test_flex_attention_is_asked_for_the_right_thing(uncompiled, backend: Backend, case: Problem) -> None:
    assert judged(backend, case) == ""
    assert uncompiled == [{"dynamic": False, "fullgraph": True}]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_suite_may_have_more_shapes_than_torch_compiles_for_by_itself(uncompiled) -> None:
    judged(FLEX, SHAPES[0])
    assert torch._dynamo.config.recompile_limit >= 256


@pytest.fixture
def block_masks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The block masks that flex_attention was given, which does nothing else."""
    found: list[Any] = []
    module = importlib.import_module("torch.nn.attention.flex_attention")
    monkeypatch.setattr(module, "flex_attention", lambda q, k, v, block_mask, **how: found.append(block_mask) or q)
    return found


def test_on_a_cpu_there_is_always_a_block_mask_and_its_blocks_keep_all_threads_busy(uncompiled, block_masks) -> None:
    inputs = make_inputs(problem(256, 300, heads_q=2), 0)
    for backend, case in ((FLEX, problem(256, 300)), (FLEX_CPU, problem(256, 300))):
        backend.prepare(case, inputs.q, inputs.k, inputs.v)
    on_a_gpu, on_a_cpu = block_masks
    assert on_a_gpu is None
    assert flex_attention.cpu_blocks(problem(256, 300), torch.get_num_threads()) == on_a_cpu.BLOCK_SIZE
    assert on_a_cpu.to_dense().all()
    sizes = [flex_attention.cpu_blocks(problem(256, heads_q=2), threads) for threads in (1, 8, 9, 16, 33, 999)]
    assert sizes == [(64, 64), (64, 64), (32, 64), (32, 64), (16, 64), (16, 64)]


COMPILED = (
    problem(100, 130, "fp32", causal=True, heads_q=4, heads_kv=2, batch=2),
    problem(70, 30, "bf16", causal=True, window=9, head_dim=32, head_dim_v=64),
    problem(1, 600, "fp16", heads_q=2),
)
"""With queries that see no key, and one query, for which torch has a kernel of its own."""


@pytest.mark.parametrize("case", COMPILED, ids=lambda p: p.case_id)
def test_compiled_for_a_cpu_flex_attention_is_right(case: Problem) -> None:
    assert FLEX_CPU.unsupported(case) is None
    inputs, others = make_inputs(case, 0), make_inputs(case, 1)
    call = FLEX_CPU.prepare(case, inputs.q, inputs.k, inputs.v)
    assert Reference.of(case, inputs, 0).judge(call()).fault == ""
    for name in "qkv":
        getattr(inputs, name).data.copy_(getattr(others, name))
    assert Reference.of(case, others, 0).judge(call()).fault == ""
    assert FLEX_CPU.parallel_units(case) == torch.get_num_threads()


@pytest.mark.parametrize("case", [*SHAPES, problem(9, 9)], ids=lambda p: p.case_id)
def test_a_mask_mod_says_of_every_pair_what_the_mask_says(case: Problem) -> None:
    sees, expected = mask_mod(case), visible(case, torch.device("cpu"))
    if expected is None:
        assert sees is None
        return
    assert sees is not None
    pairs = [[bool(sees(0, 0, torch.tensor(i), torch.tensor(j))) for j in range(case.seqlen_k)] for i in (0, 5, 39)]
    assert pairs == expected[[0, 5, 39]].tolist()
