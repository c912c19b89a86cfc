"""The plugins cudnn_frontend and transformer_engine: what they refuse, and what they ask their library for.

cuDNN runs on a GPU alone: here both libraries are stood in for. test_nvidia_peers.py is about what they compute.
"""

from __future__ import annotations

import enum
import importlib.util
import os
from collections.abc import Iterator
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
from attnbench_plugins import cudnn_frontend, fastest, transformer_engine

CUDNN, ENGINE = PEERS = [b for module in (cudnn_frontend, transformer_engine) for b in module.attnbench_backends()]

# --- cudnn-frontend, as it is called ----------------------------------------------------------------------------------

DataType = enum.Enum("DataType", "HALF BFLOAT16 FLOAT")
HeurMode = enum.Enum("HeurMode", "A B FALLBACK OPENSOURCE")
Alignment = enum.Enum("Alignment", "TOP_LEFT BOTTOM_RIGHT")
IO_TYPES = {torch.float16: DataType.HALF, torch.bfloat16: DataType.BFLOAT16}


class NotSupported(Exception):
    pass


class Described:
    """A tensor of a graph."""

    def __init__(self, name: str = "", dim: list[int] | None = None, stride: list[int] | None = None) -> None:
        self.name, self.dim, self.stride, self.is_output = name, dim, stride, False

    def set_output(self, flag: bool) -> Described:
        self.is_output = flag
        return self

    def set_dim(self, dim: list[int]) -> Described:
        self.dim = dim
        return self

    def set_stride(self, stride: list[int]) -> Described:
        self.stride = stride
        return self


class Graph:
    """A graph of one sdpa node with three plans, of which the first cannot be built."""

    PLANS = 3
    executed: list[int]
    """Which plans were executed."""
    stream: int | None
    """The handle's."""

    def __init__(
        self, *, handle: str, io_data_type: DataType, intermediate_data_type: DataType, compute_data_type: DataType
    ) -> None:
        assert handle == "handle"
        assert intermediate_data_type == compute_data_type == DataType.FLOAT
        self.io_type, self.steps, self.built = io_data_type, [], set()

    def tensor(self, *, name: str, dim: list[int], stride: list[int]) -> Described:
        assert len(dim) == len(stride) == 4
        return Described(name, dim, stride)

    def sdpa(
        self,
        *,
        name: str,
        q: Described,
        k: Described,
        v: Described,
        attn_scale: float,
        generate_stats: bool,
        diagonal_alignment: Alignment = Alignment.TOP_LEFT,
        diagonal_band_left_bound: int | None = None,
        diagonal_band_right_bound: int | None = None,
    ) -> tuple[Described, None]:
        assert not generate_stats
        rows, keys = q.dim[2], k.dim[2]
        bounded = diagonal_band_left_bound is not None or diagonal_band_right_bound is not None
        if bounded and rows > keys:
            raise NotSupported("Bottom right causal mask does not support max_s_q > max_s_kv.")
        if max(q.dim[3], v.dim[3]) > 256 or q.dim[3] % 8 or v.dim[3] % 8:
            raise NotSupported("hidden_dim should be multiple of 8")
        assert diagonal_alignment is Alignment.BOTTOM_RIGHT or not bounded
        left = None if diagonal_band_left_bound is None else diagonal_band_left_bound - 1
        self.seen = band(rows, keys, left, diagonal_band_right_bound)
        self.inputs, self.out, self.scale = (q, k, v), Described(), attn_scale
        return self.out, None

    def validate(self) -> None:
        self._step("validate")
        assert self.out.is_output
        assert self.out.dim == [*self.inputs[0].dim[:3], self.inputs[2].dim[3]]

    def build_operation_graph(self) -> None:
        self._step("build_operation_graph")

    def create_execution_plans(self, modes: list[HeurMode]) -> None:
        self._step("create_execution_plans")
        assert modes == [HeurMode.A, HeurMode.B, HeurMode.FALLBACK]

    def check_support(self) -> None:
        self._step("check_support")

    def _step(self, name: str) -> None:
        order = ["validate", "build_operation_graph", "create_execution_plans", "check_support"]
        self.steps.append(name)
        assert self.steps == order[: len(self.steps)]

    def get_execution_plan_count(self) -> int:
        assert len(self.steps) == 4
        return self.PLANS

    def build_plan_at_index(self, index: int) -> Graph:
        assert index not in self.built, "building is slow, and once is enough"
        if index == 0:
            raise NotSupported("plan 0 declined")
        self.built.add(index)
        return self

    def get_workspace_size_plan_at_index(self, index: int) -> int:
        assert index in self.built
        return 0 if index == 1 else 64

    def execute_plan_at_index(self, pack: dict[Described, Tensor], workspace: Tensor, index: int, handle: str) -> None:
        assert handle == "handle"
        assert Graph.stream == 77, "torch's current stream"
        assert index in self.built
        assert workspace.dtype == torch.uint8
        assert workspace.numel() >= max(1, self.get_workspace_size_plan_at_index(index))
        assert list(pack) == [*self.inputs, self.out]
        for described, tensor in pack.items():
            assert (described.dim, described.stride) == (list(tensor.shape), list(tensor.stride()))
            assert IO_TYPES[tensor.dtype] is self.io_type
        q, k, v, out = pack.values()
        out.copy_(attend(q, k, v, self.scale, self.seen))
        Graph.executed.append(index)


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Graph]]:
    def set_stream(handle: str, stream: int) -> None:
        assert handle == "handle"
        Graph.stream = stream

    Graph.executed, Graph.stream = [], None
    stand_in(
        monkeypatch,
        "cudnn",
        pygraph=Graph,
        data_type=DataType,
        heur_mode=HeurMode,
        diagonal_alignment=Alignment,
        create_handle=lambda: "handle",
        set_stream=set_stream,
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    cudnn_frontend._handle.cache_clear()
    yield Graph
    cudnn_frontend._handle.cache_clear()


# --- Transformer Engine, as it is called ------------------------------------------------------------------------------


class DotProductAttention:
    """Of transformer_engine.pytorch. `copied` is of which sizes the tensors were that it had to make contiguous."""

    copied: list[int]

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: tuple[int, int],
        num_gqa_groups: int,
        *,
        qkv_format: str,
        attn_mask_type: str,
        window_size: tuple[int, int],
        attention_type: str,
        softmax_scale: float,
    ) -> None:
        assert qkv_format == "bshd"
        assert num_attention_heads % num_gqa_groups == 0
        self.causal = {"no_mask": False, "causal_bottom_right": True}[attn_mask_type]
        left, right = window_size
        assert right == 0 if self.causal else (right >= 0) == (left >= 0)
        self.heads, self.groups, self.channels = num_attention_heads, num_gqa_groups, kv_channels
        self.bounds = [None if side < 0 else side for side in window_size]
        self.kind, self.scale, self.training = attention_type, softmax_scale, True

    def eval(self) -> DotProductAttention:
        self.training = False
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        switches = ("NVTE_FUSED_ATTN", "NVTE_FLASH_ATTN", "NVTE_UNFUSED_ATTN")
        assert [os.environ[name] for name in switches] == ["1", "0", "0"]
        assert not self.training
        assert not torch.is_grad_enabled()
        assert k.shape[:-1] == v.shape[:-1]
        assert (q.shape[2], k.shape[2], q.shape[3], v.shape[3]) == (self.heads, self.groups, *self.channels)
        rows, keys = q.shape[1], k.shape[1]
        assert self.kind == ("self" if rows == keys else "cross")
        masked = self.causal or self.bounds != [None, None]
        if masked and rows > keys:
            raise ValueError("No dot product attention backend is available for the provided inputs.")
        DotProductAttention.copied += [t.numel() for t in (q, k, v) if not t.is_contiguous()]
        out = attend(*(t.transpose(1, 2) for t in (q, k, v)), self.scale, band(rows, keys, *self.bounds))
        return out.transpose(1, 2).contiguous().view(*q.shape[:2], -1)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[DotProductAttention]:
    for name in transformer_engine.FUSED_ALONE:
        monkeypatch.delenv(name, raising=False)
    DotProductAttention.copied = []
    package = stand_in(monkeypatch, "transformer_engine")
    package.pytorch = stand_in(monkeypatch, "transformer_engine.pytorch", DotProductAttention=DotProductAttention)
    return DotProductAttention


# --- what is there, and what is refused -------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """A GPU of the compute capability given, with a torch that has cuDNN, and the packages named."""

    def make(*capability: int, packages: tuple[str, ...]) -> None:
        monkeypatch.setattr(CudaDevice, "unavailable", lambda self: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
        monkeypatch.setattr(importlib.util, "find_spec", dict.fromkeys(packages, object()).get)

    return make


def test_where_each_is_available(gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(9, 0, packages=("cudnn", "transformer_engine", "transformer_engine_torch"))
    assert [backend.unavailable() for backend in PEERS] == [None, None]
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 8907)
    assert CUDNN.unavailable() == "it needs cuDNN 9, and this torch has 8907"
    gpu(7, 5, packages=("cudnn", "transformer_engine", "transformer_engine_torch"))
    reason = "it needs a GPU of compute capability 8.0 or later, and this one has 7.5"
    assert [backend.unavailable() for backend in PEERS] == [reason] * 2
    gpu(9, 0, packages=("transformer_engine",))
    assert [backend.unavailable() for backend in PEERS] == [
        "cudnn is not installed: pip install 'attnbench[cudnn-frontend]'",
        "transformer_engine_torch is not installed: pip install 'attnbench[transformer-engine]'",
    ]
    gpu(9, 0, packages=())
    assert ENGINE.unavailable() == "transformer_engine is not installed: pip install 'attnbench[transformer-engine]'"


def test_describing_them_imports_no_library() -> None:
    answer = python(
        """
        import sys
        from attnbench import Problem
        from attnbench_plugins import cudnn_frontend, transformer_engine
        for module in (cudnn_frontend, transformer_engine):
            for backend in module.attnbench_backends():
                backend.unavailable(), backend.unsupported(Problem(seqlen_q=1, seqlen_k=1, dtype="bf16"))
        print({"cudnn", "transformer_engine", "transformer_engine.pytorch"} & set(sys.modules))
        """
    )
    assert answer.out.strip() == "set()", answer.err


@pytest.mark.parametrize("backend", PEERS, ids=lambda b: b.name)
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (problem(direction="bwd"), "forward only"),
        (problem(dtype="fp32"), "fp16 and bf16 only"),
        (problem(head_dim=264), "head sizes up to 256"),
        (problem(head_dim_v=264), "head sizes up to 256"),
        (problem(head_dim=20), "head sizes must be multiples of 8 in fp16"),
        (problem(56, 40, causal=True), "a mask needs as many keys as queries"),
        (problem(56, 40, window=30), "a mask needs as many keys as queries"),
        (problem(56, 40), None),
        (problem(causal=True, window=9, dtype="bf16", heads_q=4, heads_kv=2), None),
        (problem(window=9, head_dim=256, head_dim_v=128), None),
        (problem(1, 1), None),
    ],
    ids=lambda x: getattr(x, "case_id", None),
)
def test_what_is_refused_has_its_reason(backend: Backend, case: Problem, reason: str | None) -> None:
    assert backend.unsupported(case) == reason


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cudnn", "engine")
@pytest.mark.parametrize("backend", PEERS, ids=lambda b: b.name)
@pytest.mark.parametrize("case", SHAPES, ids=lambda p: p.case_id)
def test_masks_groups_and_head_sizes_together_are_right(backend: Backend, case: Problem) -> None:
    if reason := backend.unsupported(case):
        assert reason == "a mask needs as many keys as queries"
        return
    assert fault(case, backend.prepare(case, *tensors(case))()) == ""


@pytest.mark.usefixtures("cudnn", "engine")
@pytest.mark.parametrize("backend", PEERS, ids=lambda b: b.name)
def test_every_call_reads_what_q_k_and_v_hold_then(backend: Backend) -> None:
    assert follows_inputs(backend, problem(6, 9, heads_q=2))


def test_all_plans_but_those_that_cannot_be_built_are_tried_and_one_is_kept(cudnn: type[Graph]) -> None:
    case = problem()
    call = CUDNN.prepare(case, *tensors(case))
    assert set(cudnn.executed) == {1, 2}
    cudnn.executed.clear()
    assert call() is call(), "the output is written where it is returned"
    assert len(set(cudnn.executed)) == 1


@pytest.mark.usefixtures("cudnn")
def test_where_no_plan_can_be_built_cudnns_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graph, "PLANS", 1)
    case = problem()
    with pytest.raises(NotSupported, match="plan 0 declined"):
        CUDNN.prepare(case, *tensors(case))


@pytest.mark.usefixtures("cudnn")
def test_cudnns_own_first_choice_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(fastest, "fastest", lambda calls: kept.extend(calls) or kept[0])
    case = problem()
    CUDNN.prepare(case, *tensors(case))
    assert len(kept) == 3
    with pytest.raises(NotSupported):
        kept[0]()
    for call in (kept[2], kept[1]):
        call()
    assert Graph.executed == [2, 1]


@pytest.mark.parametrize(
    ("case", "copied"),
    [
        (problem(batch=2, heads_q=3), []),
        (problem(heads_q=4, heads_kv=1), [40 * 4 * 64]),
        (problem(heads_q=4, heads_kv=2), [40 * 4 * 64, 56 * 2 * 64, 56 * 2 * 64]),
        (problem(1, 70, batch=2, heads_q=8, heads_kv=2), []),
    ],
    ids=lambda x: getattr(x, "case_id", None),
)
def test_transformer_engine_copies_grouped_heads_alone(
    engine: type[DotProductAttention], case: Problem, copied: list[int]
) -> None:
    call = ENGINE.prepare(case, *tensors(case))
    engine.copied.clear()
    call()
    assert engine.copied == copied
