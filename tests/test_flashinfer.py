"""The plugins flashinfer_fa2 and flashinfer_fa3: what they refuse, what they ask FlashInfer for, and in which layout.

FlashInfer's kernels run on a GPU alone: here they are stood in for. test_nvidia_peers.py is about the kernels.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import python
from standins import SHAPES, attend, band, fault, follows_inputs, problem, stand_in, tensors
from torch import Tensor

from attnbench import Problem
from attnbench.backend import Backend
from attnbench.devices.cuda import CudaDevice
from attnbench_plugins import fastest, flashinfer_calls, flashinfer_fa2, flashinfer_fa3
from attnbench_plugins.masks import visible

FA2, FA3 = PEERS = [b for module in (flashinfer_fa2, flashinfer_fa3) for b in module.attnbench_backends()]
PROCESSORS = 6

# --- FlashInfer, as it is called --------------------------------------------------------------------------------------


def unpacked(mask: Tensor, rows: int, keys: int) -> Tensor:
    assert mask.dtype == torch.uint8
    assert mask.dim() == 1
    bits = [byte >> bit & 1 for byte in mask.tolist() for bit in range(8)]
    return torch.tensor(bits[: rows * keys], dtype=torch.bool).view(rows, keys)


def template(
    backend: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, left: int, scale: float
) -> Tensor:
    """A kernel template on (rows, heads, dim), refusing what the real ones refuse or get wrong."""
    rows, keys = q.shape[0], k.shape[0]
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert k.shape[:2] == v.shape[:2]
    assert all(tensor.stride(-1) == 1 for tensor in (q, k, v))
    assert q.shape[1] % k.shape[1] == 0
    if backend == "fa3":
        assert mask is None, "cudaErrorNotSupported"
        assert (q.shape[2], v.shape[2]) in flashinfer_fa3.HEAD_DIMS
    else:
        assert backend == "fa2"
        assert q.shape[2] % 64 == 0
        assert v.shape[2] in (64, 128, 256)
        assert not causal or mask is not None or rows <= keys
    seen = band(rows, keys, left if left >= 0 else None, 0 if causal and mask is None else None)
    if mask is not None:
        seen &= unpacked(mask, rows, keys)
    out = attend(*(tensor.transpose(0, 1) for tensor in (q, k, v)), scale, seen)
    return out.transpose(0, 1).contiguous()


def single_prefill_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    packed_custom_mask: Tensor | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    sm_scale: float,
    window_left: int = -1,
    backend: str,
) -> Tensor:
    assert kv_layout == "NHD", "the fa3 template takes the keys' number from the first dimension whatever the layout"
    return template(backend, q, k, v, causal, packed_custom_mask, window_left, sm_scale)


def single_decode_with_kv_cache(
    q: Tensor, k: Tensor, v: Tensor, kv_layout: str = "NHD", *, window_left: int = -1, sm_scale: float
) -> Tensor:
    assert (q.dim(), k.dim(), kv_layout) == (2, 3, "HND")
    assert all(tensor.is_contiguous() for tensor in (q, k, v))
    assert k.shape == v.shape
    assert k.shape[0] <= PROCESSORS, "a division by zero in C++, which ends the process"
    assert q.shape[0] // k.shape[0] in flashinfer_fa2.DECODE_GROUPS
    assert q.shape[1] in flashinfer_fa2.DECODE_HEAD_DIMS
    seen = band(1, k.shape[1], window_left if window_left >= 0 else None, None)
    return attend(q[:, None], k, v, sm_scale, seen)[:, 0].contiguous()


class BatchPrefillWithRaggedKVCacheWrapper:
    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", *, backend: str) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert not float_workspace_buffer.any()
        assert kv_layout == "NHD"
        self.backend = backend
        self.planned: dict[str, Any] | None = None

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int,
        *,
        packed_custom_mask: Tensor | None,
        causal: bool,
        window_left: int,
        sm_scale: float,
        q_data_type: torch.dtype,
        disable_split_kv: bool = False,
    ) -> None:
        assert self.planned is None, "it is planned once"
        assert qo_indptr.dtype == kv_indptr.dtype == torch.int32
        assert len(qo_indptr) == len(kv_indptr) == 2
        hides_right = causal or window_left < 0
        assert hides_right or disable_split_kv or self.backend == "fa3", "it would leave keys out"
        assert not disable_split_kv or self.backend == "fa2"
        self.planned = {"causal": causal, "mask": packed_custom_mask, "left": window_left, "scale": sm_scale}
        self.dtype, self.lengths = q_data_type, (int(qo_indptr[1]), int(kv_indptr[1]))
        self.sizes = (num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo)

    def run(self, q: Tensor, k: Tensor, v: Tensor, *, out: Tensor) -> Tensor:
        assert self.planned is not None
        assert (q.shape[0], k.shape[0]) == self.lengths
        assert (q.shape[1], k.shape[1], q.shape[2], v.shape[2]) == self.sizes
        assert q.dtype == self.dtype
        assert out.shape == (*q.shape[:2], v.shape[2])
        assert out.is_contiguous()
        return out.copy_(template(self.backend, q, k, v, **self.planned))


class BatchDecodeWithPagedKVCacheWrapper:
    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", *, backend: str) -> None:
        assert not float_workspace_buffer.any()
        assert (kv_layout, backend) == ("HND", "fa2")

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        window_left: int,
        sm_scale: float,
        q_data_type: torch.dtype,
    ) -> None:
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        assert indptr.tolist() == list(range(len(last_page_len) + 1))
        assert (last_page_len == page_size).all()
        self.indices, self.left, self.scale, self.dtype = indices, window_left, sm_scale, q_data_type
        self.sizes = (num_qo_heads, num_kv_heads, page_size, head_dim)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor:
        k, v = (cache[self.indices.long()] for cache in paged_kv_cache)
        assert k.stride() == v.stride()
        assert (q.shape[1], *k.shape[1:]) == self.sizes
        assert out.shape == q.shape
        assert q.dtype == self.dtype
        seen = band(1, k.shape[2], self.left if self.left >= 0 else None, None)
        return out.copy_(attend(q[:, :, None], k, v, self.scale, seen)[:, :, 0])


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = (single_prefill_with_kv_cache, single_decode_with_kv_cache)
    wrappers = (BatchPrefillWithRaggedKVCacheWrapper, BatchDecodeWithPagedKVCacheWrapper)
    stand_in(monkeypatch, "flashinfer", **{item.__name__: item for item in (*functions, *wrappers)})
    processors = SimpleNamespace(multi_processor_count=PROCESSORS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: processors)
    monkeypatch.setattr(flashinfer_calls, "WORKSPACE_BYTES", 16)


# --- what is there, and what is refused -------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """A GPU of the compute capability given, with FlashInfer, nvcc and ninja."""

    def make(*capability: int) -> None:
        monkeypatch.setattr(CudaDevice, "unavailable", lambda self: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        found = {"flashinfer": object()}
        monkeypatch.setattr(importlib.util, "find_spec", found.get)
        monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/usr/bin/{name}")

    return make


def test_where_each_is_available(gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, reasons in (
        ((9, 0), [None, None]),
        ((8, 0), [None, "it needs a GPU of compute capability from 9.0 to below 10.0, and this one has 8.0"]),
        ((10, 0), [None, "it needs a GPU of compute capability from 9.0 to below 10.0, and this one has 10.0"]),
        ((7, 5), ["it needs a GPU of compute capability 8.0 or later, and this one has 7.5"]),
    ):
        gpu(*capability)
        assert [backend.unavailable() for backend in PEERS][: len(reasons)] == reasons
    monkeypatch.setattr(CudaDevice, "unavailable", lambda self: "no GPU here")
    assert [backend.unavailable() for backend in PEERS] == ["no GPU here"] * 2


def test_what_is_missing_is_named(gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu(9, 0)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None if name == "ninja" else "/usr/bin/nvcc")
    assert FA2.unavailable() == "FlashInfer compiles with ninja, and there is none: pip install ninja"
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        wanted = "FlashInfer compiles with nvcc, and there is none: install the CUDA toolkit, or set CUDA_HOME"
        assert FA2.unavailable() == wanted
    monkeypatch.setattr(importlib.util, "find_spec", {"flashinfer": 1, "flashinfer_jit_cache": 1}.get)
    assert FA2.unavailable() is None, "compiled kernels are installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert FA3.unavailable() == "flashinfer is not installed: pip install 'attnbench[flashinfer]'"


def test_describing_them_imports_no_library() -> None:
    answer = python(
        """
        import sys
        from attnbench import Problem
        from attnbench_plugins import flashinfer_fa2, flashinfer_fa3
        for module in (flashinfer_fa2, flashinfer_fa3):
            for backend in module.attnbench_backends():
                backend.unavailable(), backend.unsupported(Problem(seqlen_q=1, seqlen_k=1, dtype="bf16"))
        print({"flashinfer", "tvm_ffi", "triton"} & set(sys.modules))
        """
    )
    assert answer.out.strip() == "set()", answer.err


FA2_DIMS = "a head size that is a multiple of 64 up to 256, or 512 throughout"
FA3_DIMS = "head sizes of 64, 128 or 256 throughout, or 192 with values of 128"


@pytest.mark.parametrize(
    ("backend", "case", "reason"),
    [
        *((backend, problem(direction="bwd"), "forward only") for backend in PEERS),
        *((backend, problem(dtype="fp32"), "fp16 and bf16 only") for backend in PEERS),
        *((backend, problem(dtype="bf16", causal=True, heads_q=4, heads_kv=2, batch=2), None) for backend in PEERS),
        *((backend, problem(causal=True, window=9), None) for backend in PEERS),
        *((backend, problem(head_dim=192, head_dim_v=128), None) for backend in PEERS),
        *((backend, problem(window=40), None) for backend in PEERS),
        *((backend, problem(heads_q=70000), "at most 65535 heads, all sequences' together") for backend in PEERS),
        (FA2, problem(window=9), None),
        (FA3, problem(window=9), "no mask but a causal one and a window's left side"),
        (FA2, problem(56, 40, causal=True), "a causal mask needs as many keys as queries"),
        (FA3, problem(56, 40, causal=True), None),
        (FA2, problem(56, 20, window=9), None),
        (FA2, problem(head_dim=96), "a head size that is a multiple of 64 up to 256, or 512 throughout"),
        (
            FA2,
            problem(head_dim=320, head_dim_v=64),
            "a head size that is a multiple of 64 up to 256, or 512 throughout",
        ),
        (FA2, problem(head_dim=192), "head sizes of 64, 128 or 256 for the values"),
        (FA2, problem(head_dim=128, head_dim_v=32), "head sizes of 64, 128 or 256 for the values"),
        (FA2, problem(head_dim=128, head_dim_v=64), None),
        (FA2, problem(head_dim=512), None),
        (FA2, problem(1 << 14, 1 << 15, batch=16, heads_q=128), None),
        (FA2, problem(1 << 14, 1 << 15, batch=16, heads_q=256), "tensors of at most 2**32 values"),
        (FA3, problem(1 << 14, 1 << 15, batch=16, heads_q=256), None),
        (FA3, problem(head_dim=32), FA3_DIMS),
        (FA3, problem(head_dim=128, head_dim_v=64), FA3_DIMS),
        (FA3, problem(head_dim=192), FA3_DIMS),
    ],
)
def test_what_is_refused_has_its_reason(backend: Backend, case: Problem, reason: str | None) -> None:
    assert backend.unsupported(case) == reason


# --- what is computed -------------------------------------------------------------------------------------------------

MANY = problem(1, 70, batch=4, heads_q=4, heads_kv=2, window=9)
"""More key heads than processors."""


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize("backend", PEERS, ids=lambda b: b.name)
@pytest.mark.parametrize("case", [*SHAPES, MANY], ids=lambda p: p.case_id)
def test_every_way_to_do_it_is_right(backend: Backend, case: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := backend.unsupported(case):
        assert reason in (
            *("a causal mask needs as many keys as queries", FA3_DIMS),
            "no mask but a causal one and a window's left side",
        )
        return
    calls: list[Any] = []
    monkeypatch.setattr(fastest, "fastest", lambda found: calls.extend(found) or calls[0])
    backend.prepare(case, *tensors(case))
    assert len(calls) >= 1
    assert [fault(case, call()) for call in calls] == [""] * len(calls)
    assert [fault(case, call()) for call in calls] == [""] * len(calls), "a plan serves more than one call"


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize("backend", PEERS, ids=lambda b: b.name)
def test_every_call_reads_what_q_k_and_v_hold_then(backend: Backend) -> None:
    assert follows_inputs(backend, problem(6, 9, heads_q=2))


@pytest.mark.usefixtures("flashinfer")
def test_no_input_is_copied() -> None:
    case = problem(batch=2, heads_q=3)
    for tensor in tensors(case):
        rows = flashinfer_calls.rows_first(tensor)
        assert rows.data_ptr() == tensor.data_ptr()
        assert rows[7, 4].equal(tensor[1, 1, 7])
    with pytest.raises(RuntimeError):
        flashinfer_calls.rows_first(torch.zeros(2, 8, 3, 4).transpose(1, 2))


def ways(case: Problem) -> list[str]:
    return [call.__qualname__.split(".")[0] for call in flashinfer_fa2.candidates(case, *tensors(case))]


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (problem(), ["single_prefill", "ragged_prefill", "ragged_prefill"]),
        (problem(window=9), ["single_prefill", "ragged_prefill"]),
        (problem(1, 70), ["single_decode", "single_prefill"]),
        (problem(1, 70, heads_q=5, heads_kv=1), ["single_prefill"]),
        (problem(1, 70, head_dim=192, head_dim_v=128), ["single_prefill"]),
        (problem(1, 70, causal=True, window=9), ["single_decode", "single_prefill", *["ragged_prefill"] * 2]),
        (problem(1, 70, batch=PROCESSORS + 1), ["batch_decode", "single_prefill"]),
    ],
    ids=lambda x: getattr(x, "case_id", None),
)
def test_which_functions_are_tried(case: Problem, expected: list[str]) -> None:
    assert ways(case) == expected


def test_a_mask_is_packed_lowest_bit_first_and_only_where_flashinfer_has_none() -> None:
    case = problem(5, 7, window=3)
    packed = flashinfer_calls.packed_mask(case, torch.device("cpu"))
    assert packed is not None
    assert packed.shape == (5,)
    seen = visible(case, torch.device("cpu"))
    assert seen is not None
    assert unpacked(packed, 5, 7).equal(seen)
    for other in (problem(), problem(causal=True, window=3), problem(5, 7, window=5)):
        assert flashinfer_calls.packed_mask(other, torch.device("cpu")) is None


@pytest.mark.usefixtures("flashinfer")
def test_ninja_beside_the_interpreter_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    case = problem()
    FA3.prepare(case, *tensors(case))
    assert os.environ["PATH"] == os.pathsep.join(["/nowhere", str(Path(sys.executable).parent)])
