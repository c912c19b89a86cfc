"""triton_flash, tilelang_flash and sageattention: what they refuse, and what they compute.

triton_flash's kernel runs in Triton's interpreter, tilelang_flash's in C where TileLang is installed, and sageattention
is a stand-in of its library. On a GPU the three run as they are.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import python
from test_cuda import SUITE, run
from test_cuda import pytestmark as needs_gpu
from torch import Tensor

from attnbench import Problem
from attnbench.backend import Backend
from attnbench.devices.cuda import CudaDevice
from attnbench.problem import Dtype
from attnbench.reference import Reference, make_inputs
from attnbench.registry import installed_version
from attnbench_plugins import tilelang_flash, tiling, triton_flash
from attnbench_plugins.sageattention import SageAttention
from attnbench_plugins.tilelang_flash import TileLangFlash
from attnbench_plugins.triton_flash import TritonFlash

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None and "CI" not in os.environ, reason="Triton is not installed"
)
needs_tilelang = pytest.mark.skipif(importlib.util.find_spec("tilelang") is None, reason="TileLang is not installed")
TRITON, TILELANG, SAGE = PEERS = (TritonFlash("cuda"), TileLangFlash(), SageAttention())


def problem(seqlen_q: int, seqlen_k: int, dtype: Dtype = "fp32", **fields: Any) -> Problem:
    return Problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, dtype=dtype, **{"head_dim": 64, **fields})


def judged(backend: Backend, case: Problem) -> str:
    inputs = make_inputs(case, 0)
    return Reference.of(case, inputs, 0).judge(backend.prepare(case, inputs.q, inputs.k, inputs.v)()).fault


# --- what is there, and what is refused -------------------------------------------------------------------------------


def test_describing_them_imports_no_library() -> None:
    answer = python(
        """
        import sys
        from attnbench import Problem
        from attnbench_plugins import sageattention, tilelang_flash, triton_flash
        for module in (sageattention, tilelang_flash, triton_flash):
            for backend in module.attnbench_backends():
                backend.unavailable(), backend.unsupported(Problem(seqlen_q=1, seqlen_k=1, dtype="bf16"))
                assert backend.summary and backend.homepage and backend.libraries
        print({"triton", "tilelang", "sageattention", "attnbench_kernels.triton"} & set(sys.modules))
        """
    )
    assert answer.out.strip() == "set()", answer.err


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, and every package."""
    monkeypatch.setattr(CudaDevice, "unavailable", lambda self: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(triton_flash, "installed_version", lambda name: "3.6.0")
    monkeypatch.setattr(tilelang_flash, "_has_nvcc", lambda: True)


def test_what_is_missing_is_named(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [backend.unavailable() for backend in PEERS] == [None] * 3
    monkeypatch.setattr(tilelang_flash, "_has_nvcc", lambda: False)
    assert TILELANG.unavailable() == "TileLang finds no nvcc: pip install 'tilelang[nvcc]', or set CUDA_HOME"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else object())
    assert SAGE.unavailable() == "triton is not installed: pip install 'attnbench[sageattention]'"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(triton_flash, "installed_version", lambda name: "")
    assert [backend.unavailable() for backend in PEERS] == [
        f"{name} is not installed: pip install 'attnbench[{name}]'" for name in ("triton", "tilelang", "sageattention")
    ]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    reason = "it needs a GPU of compute capability 8.0 or later, and this one has 7.5"
    assert [backend.unavailable() for backend in PEERS] == [reason] * 3


def test_nvcc_is_looked_for_where_tilelang_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tilelang_flash, "installed_version", lambda name: "")
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert not tilelang_flash._has_nvcc()
    monkeypatch.setattr(tilelang_flash, "installed_version", lambda name: {"nvidia-cuda-nvcc": "13.0"}.get(name, ""))
    assert tilelang_flash._has_nvcc()
    monkeypatch.setattr(tilelang_flash, "installed_version", lambda name: "")
    monkeypatch.setenv("CUDA_PATH", "/opt/cuda")
    assert tilelang_flash._has_nvcc()


@pytest.mark.parametrize(
    ("backend", "case", "reason"),
    [
        *((backend, problem(64, 64, "bf16", direction="bwd"), "forward only") for backend in PEERS),
        *((backend, problem(64, 64, "bf16", causal=True, heads_q=4, heads_kv=2), None) for backend in PEERS),
        *((backend, problem(128, 64, "fp16", causal=True), None) for backend in PEERS[:2]),
        *((backend, problem(77, 131, "fp16", window=9), None) for backend in PEERS[:2]),
        (TRITON, problem(7, 9, head_dim=5, head_dim_v=1024), None),
        (TRITON, problem(7, 9, head_dim=1025), "head sizes up to 1024"),
        (TRITON, problem(7, 1 << 25), "fewer than 2³¹ elements in what belongs to a key head"),
        (TRITON, problem(1, 8, batch=65536), None),
        (TILELANG, problem(64, 64), "fp16 and bf16 only"),
        (TILELANG, problem(64, 64, "fp16", head_dim=48, head_dim_v=256), None),
        *(
            (TILELANG, problem(64, 64, "fp16", **dims), "head sizes that are multiples of 16 up to 256")
            for dims in ({"head_dim": 272}, {"head_dim": 40}, {"head_dim_v": 24})
        ),
        (TILELANG, problem(1, 8, "fp16", batch=65536), "up to 65535 key heads of all batch elements"),
        *((SAGE, problem(77, 128, dtype, head_dim=96), None) for dtype in ("fp32", "fp16", "bf16")),
        *(
            (SAGE, problem(64, 64, "fp16", **dims), "one head size for q, k and v, of 64, 96 and 128")
            for dims in ({"head_dim": 32}, {"head_dim": 256}, {"head_dim_v": 128})
        ),
        (SAGE, problem(64, 64, "fp16", window=9), "no sliding window"),
        (SAGE, problem(64, 128, "fp16", causal=True), "causal only for as many queries as keys"),
        (SAGE, problem(77, 77, "fp16", causal=True), None),
        (
            SAGE,
            problem(64, 77, "fp16"),
            "without a causal mask, keys in multiples of 64: what fills the last block is not masked",
        ),
    ],
)
def test_what_is_refused_has_its_reason(backend: Backend, case: Problem, reason: str | None) -> None:
    assert backend.unsupported(case) == reason


# --- tiles ------------------------------------------------------------------------------------------------------------


def test_programs_share_keys_where_tiles_are_few() -> None:
    case = problem(100, 1000, batch=2, heads_q=6, heads_kv=2)
    assert tiling.rows(case) == 300
    assert tiling.tile_count(case, 64) == 4 * 5
    assert [tiling.split_count(case, 64, 64, cores) for cores in (1, 20, 39, 40, 132, 1000)] == [1, 1, 1, 2, 4, 16]
    assert tiling.split_count(problem(1, 64), 64, 64, 132) == 1, "one block of keys"
    assert tiling.split_count(problem(1, 1 << 20), 64, 64, 132) == 64


def test_a_query_reaches_as_far_as_its_mask_says() -> None:
    assert tiling.reach(problem(3, 5)) == (8, 8)
    assert tiling.reach(problem(3, 5, causal=True)) == (8, 1)
    assert tiling.reach(problem(3, 5, window=2)) == (2, 2)
    assert tiling.reach(problem(3, 5, window=1 << 39, causal=True)) == (8, 1)


@pytest.mark.parametrize("shared", [99 << 10, 163 << 10, 227 << 10])
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(16, 16), (128, 128), (192, 128), (16, 256), (256, 256)])
@pytest.mark.parametrize("seqlen_q", [1, 64, 4096])
def test_tilelangs_tiles_fit_into_the_shared_memory(head_dim: int, head_dim_v: int, seqlen_q: int, shared: int) -> None:
    case = problem(seqlen_q, 64, "fp16", head_dim=head_dim, head_dim_v=head_dim_v)
    tiles = tilelang_flash.tiles(case, shared)
    assert tiles
    for rows, keys, stages, threads in tiles:
        assert 2 * (rows * head_dim + stages * keys * (head_dim + head_dim_v)) <= shared
        assert threads == 2 * rows, "a warp group of 128 threads for 64 rows"


def test_a_gpus_shared_memory_is_a_processors_but_for_what_each_block_reserves(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(shared_memory_per_multiprocessor=100 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert tilelang_flash.shared_bytes(torch.ones(1)) == 99 << 10


# --- what triton_flash computes ---------------------------------------------------------------------------------------

SHAPES = (
    problem(70, 130, head_dim=32, head_dim_v=64),
    problem(140, 150, head_dim=64, head_dim_v=20, causal=True),
    problem(48, 64, "fp16", batch=2, heads_q=4, heads_kv=2, causal=True),
    problem(100, 40, "fp16", causal=True, window=20, softmax_scale=0.3),
    problem(40, 90, "fp16", heads_q=2, heads_kv=1, window=9),
    problem(3, 300, "fp16", heads_q=4, heads_kv=1, causal=True),
    problem(5, 30, "fp16", head_dim=200, head_dim_v=300),
    problem(1, 1, causal=True),
)
INTERPRETED = """
    import json, sys
    import torch
    from attnbench import Problem
    from attnbench import devices
    from attnbench.reference import Reference, make_inputs
    from attnbench_plugins import triton_flash

    torch.set_num_threads(1)
    devices.device = lambda kind: type("Device", (), {"info": lambda self: type("Info", (), {"cores": 8})})()
    tried, found = [], {}
    triton_flash.fastest = lambda calls: tried.extend(calls) or tried[0]
    for kind in ("cuda", "npu"):
        for case in map(Problem.from_json, json.loads(sys.argv[1])):
            tried.clear()
            first, second = make_inputs(case, 0), make_inputs(case, 1)
            tensors = [tensor.clone() for tensor in (first.q, first.k, first.v)]
            triton_flash.TritonFlash(kind).prepare(case, *tensors)
            written = tried[0]()
            written.fill_(torch.nan)
            for tensor, now in zip(tensors, (second.q, second.k, second.v)):
                tensor.copy_(now)
            faults, reference = [], Reference.of(case, second, 0)
            for call in tried:
                faults.append(reference.judge(call()).fault)
                written.fill_(torch.nan)
            found[f"{kind} {case.case_id}"] = faults
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def interpreted() -> dict[str, list[str]]:
    """The faults of every tile and split of each shape, on inputs that changed in place after a call."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    shapes = json.dumps([shape.to_json() for shape in SHAPES])
    command = [sys.executable, "-c", textwrap.dedent(INTERPRETED), shapes]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_triton
@pytest.mark.parametrize("kind", ["cuda", "npu"])
@pytest.mark.parametrize("case", SHAPES, ids=lambda p: p.case_id)
def test_triton_flashs_kernel_is_right_with_every_tile(interpreted: dict, kind: Any, case: Problem) -> None:
    """In fp32 and fp16: Triton's interpreter takes the bits of bf16 for integers in a product."""
    faults = interpreted[f"{kind} {case.case_id}"]
    assert faults == [""] * len(candidates(case, kind))


def candidates(case: Problem, kind: Any) -> list[int]:
    """In how many splits each tile is tried, with the 8 cores of the test."""
    tiles = triton_flash.tiles(case, kind)
    return [splits for tile in tiles for splits in sorted({1, tiling.split_count(case, tile.rows, tile.keys, 8)})]


@pytest.mark.parametrize("kind", ["cuda", "npu"])
def test_tiles_with_and_without_splits_are_tried(kind: Any) -> None:
    assert {1, 2, 4} <= {splits for case in SHAPES for splits in candidates(case, kind)}


# --- what tilelang_flash computes -------------------------------------------------------------------------------------


class OurKernels(ModuleType):
    """A stand-in for kernels/tilelang/flash_attention.py, which computes by torch what its docstrings say."""

    def __init__(self) -> None:
        super().__init__("attnbench_kernels.tilelang.flash_attention")
        self.asked: list[tuple[Any, ...]] = []
        self.Tile = lambda *sizes: sizes

    def attention(
        self, heads: int, rows: int, seqlen_q: int, seqlen_k: int, head_dim: int, head_dim_v: int,
        behind: int, ahead: int, scale_log2: float, dtype: str, tile: Any, splits: int,
    ) -> Any:  # fmt: skip
        self.asked.append((tile, splits))
        narrow = getattr(torch, dtype)

        def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
            wide = torch.float32 if splits > 1 else narrow
            for tensor, shape, kind in (
                (q, (heads, rows, head_dim), narrow),
                (k, (heads, seqlen_k, head_dim), narrow),
                (v, (heads, seqlen_k, head_dim_v), narrow),
                (out, (splits, heads, rows, head_dim_v), wide),
                (lse, (splits, heads, rows), torch.float32),
            ):
                assert tensor.shape == shape
                assert tensor.dtype == kind
                assert tensor.is_contiguous()
            position = (torch.arange(rows) % seqlen_q + seqlen_k - seqlen_q)[:, None]
            for split, key in enumerate(torch.arange(seqlen_k).tensor_split(splits)):
                hidden = (key <= position - behind) | (key >= position + ahead)
                scores = (q.float() @ k.float()[:, key].transpose(1, 2) * scale_log2).masked_fill(hidden, -torch.inf)
                weights = torch.softmax(scores * torch.tensor(2.0).log(), -1).nan_to_num(0.0)
                out[split] = weights @ v.float()[:, key]
                lse[split] = torch.logsumexp(scores * torch.tensor(2.0).log(), -1) / torch.tensor(2.0).log()

        return attend

    def combination(self, rows: int, splits: int, head_dim_v: int, dtype: str) -> Any:
        def combine(parts: Tensor, lse: Tensor, out: Tensor) -> None:
            assert parts.shape == (splits, rows, head_dim_v)
            assert lse.shape == (splits, rows)
            assert out.dtype == getattr(torch, dtype)
            weights = torch.softmax(lse * torch.tensor(2.0).log(), 0).nan_to_num(0.0)
            out.copy_((parts * weights[..., None]).sum(0))

        return combine


TILELANG_SHAPES = [shape for shape in SHAPES if shape.head_dim % 16 == shape.head_dim_v % 16 == 0][:6]


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> OurKernels:
    kernels = OurKernels()
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    monkeypatch.setattr(tilelang_flash, "compiled", lambda function: function)
    monkeypatch.setattr(tilelang_flash, "cores", lambda tensor: 8)
    monkeypatch.setattr(tilelang_flash, "shared_bytes", lambda tensor: 227 << 10)
    return kernels


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("case", TILELANG_SHAPES, ids=lambda p: p.case_id)
def test_tilelang_flash_asks_its_kernel_for_the_right_thing(
    ours: OurKernels, case: Problem, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tilelang_flash, "fastest", lambda calls: list(calls)[which])
    case = Problem.from_json(case.to_json() | {"dtype": "fp16"})
    assert judged(TILELANG, case) == ""
    tile = tilelang_flash.tiles(case, 227 << 10)[which]
    assert ours.asked == [(tile, tiling.split_count(case, tile[0], tile[1], 8))]


@pytest.mark.parametrize("which", [0, 1])
def test_a_tile_that_does_not_compile_is_left_out(
    ours: OurKernels, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = problem(100, 40, "fp16")
    broken = tilelang_flash.tiles(case, 227 << 10)[which]
    whole = ours.attention

    def attention(*sizes: Any) -> Any:
        if broken in sizes:
            ours.asked.append((broken, 0))
            raise RuntimeError("out of registers")
        return whole(*sizes)

    monkeypatch.setattr(ours, "attention", attention)
    assert judged(TILELANG, case) == ""
    assert [tile for tile, _ in ours.asked] == tilelang_flash.tiles(case, 227 << 10), "each compiled once"


def test_tilelang_flash_reads_what_q_k_and_v_hold_then(ours: OurKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tilelang_flash, "fastest", lambda calls: next(iter(calls)))
    case = problem(3, 300, "bf16", heads_q=4, heads_kv=1)
    first, second = make_inputs(case, 0), make_inputs(case, 1)
    call = TILELANG.prepare(case, first.q, first.k, first.v)
    for tensor, now in ((first.q, second.q), (first.k, second.k), (first.v, second.v)):
        before = call().clone()
        tensor.data.copy_(now)
        assert not call().equal(before)
    assert [splits for _, splits in ours.asked] == [4]
    assert Reference.of(case, second, 0).judge(call()).fault == ""


IN_C = """
    import json, sys
    import tilelang
    import torch
    from attnbench import Problem
    from attnbench.reference import Reference, make_inputs
    from attnbench_kernels.tilelang.flash_attention import T
    from attnbench_plugins import tilelang_flash

    @T.macro
    def greatest(values, result, rows, columns):
        for i, j in T.grid(rows, columns):
            result[i] = T.max(result[i], values[i, j])

    @T.macro
    def added(values, result, rows, columns):
        for i in T.serial(rows):
            result[i] = 0.0
        for i, j in T.grid(rows, columns):
            result[i] = result[i] + values[i, j]

    # In C a block is one thread: every tile is its own, and its loops are plain ones.
    T.alloc_fragment = T.alloc_shared = T.alloc_local
    T.reduce_max = lambda values, result, dim, clear: greatest(values, result, *values.shape)
    T.reduce_sum = lambda values, result, dim: added(values, result, *values.shape)
    T.Parallel, T.Pipelined = T.grid, lambda count, num_stages: T.serial(count)
    tilelang_flash.DTYPES = {"fp32": "float32"}
    tilelang_flash.compiled = lambda function: tilelang.compile(function, target="c", execution_backend="cython")
    found = []
    for fields, splits in json.loads(sys.argv[1]):
        case = Problem.from_json(fields)
        inputs = make_inputs(case, 0)
        q, k, v = (tilelang_flash.fold(case, t).flatten(0, 1) for t in (inputs.q, inputs.k, inputs.v))
        out = torch.full(case.out_shape, torch.nan)
        call = tilelang_flash.launch(case, q, k, v, out, (32, 32, 2, 1), splits)
        found.append(Reference.of(case, inputs, 0).judge(call()).fault)
    print(json.dumps(found))
"""


@needs_tilelang
def test_tilelang_flashs_kernel_is_right_in_c(tmp_path: Path) -> None:
    cases = [
        (problem(70, 130, head_dim=32, head_dim_v=16), 1),
        (problem(40, 50, head_dim=32, heads_q=2, heads_kv=1, causal=True, batch=2), 1),
        (problem(60, 40, head_dim=32, causal=True), 1),
        (problem(20, 50, head_dim=32, window=9), 2),
        (problem(3, 200, head_dim=32, heads_q=4, heads_kv=1, causal=True), 4),
    ]
    told = json.dumps([(case.to_json(), splits) for case, splits in cases])
    script = tmp_path / "in_c.py"  # TileLang reads the source of its macros
    script.write_text(textwrap.dedent(IN_C))
    done = subprocess.run([sys.executable, script, told], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [""] * len(cases)


# --- what sageattention is asked for ----------------------------------------------------------------------------------


def sageattn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    **unused: Any,
) -> Tensor:
    """As sageattention 1.0.6's, but for INT8: what fills a block of keys is not masked, and k is smoothed in place."""
    assert q.dtype == k.dtype == v.dtype
    assert q.size(-1) in (64, 96, 128)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert tensor_layout == "HND"
    assert not unused
    if smooth_k:
        k -= k.mean(dim=2, keepdim=True)
    heads, (rows, keys) = q.shape[1], (q.shape[2], k.shape[2])
    wide_k, wide_v = (t.repeat_interleave(heads // t.shape[1], 1).float() for t in (k, v.half()))
    fill = -keys % (128 if is_causal else 64)
    wide_k, wide_v = (torch.nn.functional.pad(t, (0, 0, 0, fill)) for t in (wide_k, wide_v))
    scores = q.float() @ wide_k.transpose(2, 3) * (q.size(-1) ** -0.5 if sm_scale is None else sm_scale)
    if is_causal:
        assert rows == keys, "qo_len and kv_len must be equal for causal attention"
        scores += torch.full((rows, keys + fill), -1e6).triu(1)
    return (torch.softmax(scores, -1) @ wide_v).to(q.dtype)


@pytest.fixture
def sage(monkeypatch: pytest.MonkeyPatch) -> None:
    core = ModuleType("sageattention.core")
    core.sageattn = sageattn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sageattention", ModuleType("sageattention"))
    monkeypatch.setitem(sys.modules, "sageattention.core", core)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(
    "fields",
    [
        {"seqlen_q": 70, "seqlen_k": 128, "batch": 2, "heads_q": 4, "heads_kv": 2},
        {"seqlen_q": 70, "seqlen_k": 70, "causal": True, "heads_q": 2, "softmax_scale": 0.3},
        {"seqlen_q": 1, "seqlen_k": 64, "head_dim": 96},
        {"seqlen_q": 130, "seqlen_k": 130, "head_dim": 128, "causal": True},
    ],
    ids=lambda fields: Problem(**fields).case_id,
)
def test_sageattention_is_asked_for_the_right_thing(sage: None, dtype: Dtype, fields: dict) -> None:
    case = problem(dtype=dtype, **fields)
    assert SAGE.unsupported(case) is None
    assert judged(SAGE, case) == ""


def test_keys_that_do_not_fill_a_block_make_the_stand_in_wrong_as_they_do_sageattention(sage: None) -> None:
    """So it would find the plugin out if that asked."""
    assert judged(SAGE, problem(70, 100, "bf16")) != ""


def test_k_is_left_as_it_was_and_read_at_each_call(sage: None) -> None:
    case = problem(70, 128, "fp16")
    first, second = make_inputs(case, 0), make_inputs(case, 1)
    given = [first.q.clone(), first.k.clone(), first.v.clone()]
    call = SAGE.prepare(case, *given)
    call()
    assert all(tensor.equal(was) for tensor, was in zip(given, (first.q, first.k, first.v)))
    for tensor, now in zip(given, (second.q, second.k, second.v)):
        tensor.copy_(now)
    assert Reference.of(case, second, 0).judge(call()).fault == ""


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def on_gpu(name: str, folder: Path) -> list[dict]:
    if not installed_version(name):
        pytest.skip(f"{name} is not installed")
    backend = {"triton": "triton_flash", "tilelang": "tilelang_flash"}.get(name, name)
    (folder / "peers.toml").write_text(SUITE)
    words = ("--suite", folder / "peers.toml", "--iters", "40", "--warmup", "5", "--timeout", "400")
    return run(folder, "--backends", backend, *words)


@needs_gpu
@pytest.mark.parametrize(("name", "refused"), [("triton", []), ("tilelang", [128])])
def test_ours_are_right_and_captured_on_a_gpu(tmp_path: Path, name: str, refused: list[int]) -> None:
    found = on_gpu(name, tmp_path)
    ends = {result["problem"]["seqlen_q"]: (result["status"], result["reason"]) for result in found}
    assert {end for end, (status, _) in ends.items() if status != "PASSED"} == set(refused), ends
    assert {r["measurement"]["timing_method"] for r in found if r["measurement"]} == {"cuda_graph"}


@needs_gpu
def test_sageattention_runs_on_a_gpu(tmp_path: Path) -> None:
    """Its error is that of INT8, for which INCORRECT is no fault of the plugin's."""
    found = on_gpu("sageattention", tmp_path)
    statuses = {r["problem"]["seqlen_q"]: r["status"] for r in found}
    ran = {end for end, status in statuses.items() if status in ("PASSED", "INCORRECT")}
    refused = {end for end, status in statuses.items() if status == "UNSUPPORTED"}
    assert (ran, refused) == ({1, 200}, {96, 128, 130, 160}), statuses
