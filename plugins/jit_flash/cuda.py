"""Owns jit_flash on NVIDIA GPUs: which kernel of kernels/cuda/ takes a problem, in which configuration, and its launch.

Knows nothing of the kernels' insides, but for the configurations they compile in.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

from attnbench import jit
from attnbench.backend import Backend
from attnbench.problem import DeviceKind, Problem
from attnbench_plugins.jit_flash.cuda_driver import Kernel, Launch, TensorMap, tensor_map

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEAD_DIM = 256
SHARED_BYTES = 232_448
"""What a block may have on sm_90."""
EXTRA: list = []
WAVE = [1]
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Config:
    """What flash_attention_sm90.cu is compiled for; its head says what the fields mean."""

    rows: int
    keys: int
    stages: int
    cluster: int
    split_v: int = 1

    @property
    def consumers(self) -> int:
        return self.rows // 64

    @property
    def threads(self) -> int:
        return 128 * (self.consumers + 1)

    def columns(self, head_dim_v: int) -> int:
        """Of V, that a block works on."""
        return rounded(-(-rounded(head_dim_v) // self.split_v))

    def shared_bytes(self, head_dim: int, head_dim_v: int) -> int | None:
        """None where a block cannot have that much."""
        head_dim, head_dim_v = rounded(head_dim), self.columns(head_dim_v)
        q, ring = self.rows * max(head_dim, head_dim_v) * 2, self.stages * self.keys * (head_dim + head_dim_v) * 2
        row = (head_dim_v + 4) * 4 if self.cluster > 1 else 0
        received, staged = self.cluster * -(-self.rows // self.cluster) * row, self.rows * row
        apart = q + ring + received + 8 * (4 * self.stages + 2)
        if apart <= SHARED_BYTES and staged <= ring:
            return apart
        over = apart - received
        return over if over <= SHARED_BYTES and received + staged <= q + ring else None


class Divisor(ctypes.Structure):
    """Divisor in the kernel."""

    _fields_ = (("value", ctypes.c_uint32), ("factor", ctypes.c_uint32), ("shift", ctypes.c_uint32))

    @classmethod
    def of(cls, value: int) -> Divisor:
        """For dividends below 2³¹ (Granlund and Montgomery, Division by Invariant Integers using Multiplication)."""
        shift = (value - 1).bit_length()
        return cls(value, (((1 << shift) - value) << 32) // value + 1, shift)


class Params(ctypes.Structure):
    """Params in the kernel, which says what the fields mean."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "lse")),
        *((name, Divisor) for name in ("tiles", "groups", "key_groups", "wave", "last_wave")),
        ("all_groups", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("seqlen_q", "seqlen_k", "head_dim_v", "ahead", "behind")),
        ("scale_log2", ctypes.c_float),
    )


def rounded(head_dim: int) -> int:
    return -(-head_dim // 64) * 64


def candidates(problem: Problem) -> Iterator[Config]:
    """All configurations that may serve a problem."""
    for rows, keys, split_v in itertools.product((128, 64), (128, 64), range(1, rounded(problem.head_dim_v) // 64 + 1)):
        columns = Config(rows, keys, 2, 1, split_v).columns(problem.head_dim_v)
        if columns * (split_v - 1) >= problem.head_dim_v:
            continue  # the last would have none
        for cluster in range(1, min(16, -(-problem.seqlen_k // keys)) + 1):
            configs = [Config(rows, keys, stages, cluster, split_v) for stages in (4, 3, 2)]
            fitting = [c for c in configs if c.shared_bytes(problem.head_dim, problem.head_dim_v) is not None]
            yield from fitting[:1]


class JitFlashCuda(Backend):
    """Forward attention on fp16 and bf16 tensors whose last dimension is contiguous."""

    name = "jit_flash"
    device: DeviceKind = "cuda"
    summary = "JIT-compiled CUDA flash attention (sm_90a)"

    @property
    def sources(self) -> Sequence[str]:  # type: ignore[override]
        return [str(files("attnbench_kernels") / "cuda")]

    def unavailable(self) -> str | None:
        return jit.missing(_toolchain)

    def unsupported(self, problem: Problem) -> str | None:
        if problem.direction != "fwd":
            return f"direction {problem.direction}: the kernel only runs forward"
        if problem.dtype == "fp32":
            return "fp16 and bf16 only"
        for name in ("head_dim", "head_dim_v"):
            if getattr(problem, name) > MAX_HEAD_DIM or getattr(problem, name) % 8:
                return f"{name} {getattr(problem, name)} is no multiple of 8 up to {MAX_HEAD_DIM}"
        return None

    def prepare(
        self,
        problem: Problem,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor | None = None,
        config: Config | None = None,
    ) -> Callable[[], Tensor]:
        import torch

        out = torch.empty(problem.out_shape, dtype=q.dtype, device=q.device)
        if config is None:
            config = choose(problem)
        index = q.device.index
        with torch.cuda.device(index):
            launch = _launch(problem, config, q, k, v, out, lse)
        stream_of = torch._C._cuda_getCurrentRawStream

        def attend(_owners: tuple[Tensor | None, ...] = (q, k, v, lse)) -> Tensor:
            launch(stream_of(index))
            return out

        return attend


def choose(problem: Problem) -> Config:
    return next(candidates(problem))


def _launch(
    problem: Problem, config: Config, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None
) -> Launch:
    bf16 = problem.dtype == "bf16"
    pack = packed_heads(problem, config)
    queries = config.rows // pack
    groups = problem.heads_q // pack
    tiles, all_groups = -(-problem.seqlen_q // queries), problem.batch * groups
    wave = min(WAVE[0], all_groups)
    batch_stride, head_stride, row_stride, _ = q.stride()
    q_shape = (problem.batch, groups, problem.seqlen_q, pack, problem.head_dim)
    q_strides = (batch_stride, head_stride * pack, row_stride, head_stride, 1)
    maps = [tensor_map(q.data_ptr(), q_shape, q_strides, (1, 1, queries, pack, 64), bf16=bf16)]
    for tensor in (k, v):
        maps.append(tensor_map(tensor.data_ptr(), tensor.shape, tensor.stride(), (1, 1, config.keys, 64), bf16=bf16))
    far = problem.seqlen_q + problem.seqlen_k
    window = far if problem.window is None else min(problem.window, far)
    params = Params(
        out=out.data_ptr(),
        lse=None if lse is None else lse.data_ptr(),
        tiles=Divisor.of(tiles),
        groups=Divisor.of(groups),
        key_groups=Divisor.of(groups // problem.heads_kv),
        wave=Divisor.of(wave),
        last_wave=Divisor.of(all_groups % wave or wave),
        all_groups=all_groups,
        seqlen_q=problem.seqlen_q,
        seqlen_k=problem.seqlen_k,
        head_dim_v=problem.head_dim_v,
        ahead=1 if problem.causal else window,
        behind=window - 1,
        scale_log2=problem.softmax_scale * LOG2_E,
    )
    shared_bytes = config.shared_bytes(problem.head_dim, problem.head_dim_v)
    assert shared_bytes is not None
    kernel = load(cubin(problem, config), shared_bytes, config.cluster)
    return Launch(
        kernel,
        blocks=all_groups * tiles * config.split_v * config.cluster,
        threads=config.threads,
        cluster=config.cluster,
        shared_bytes=shared_bytes,
        arguments=(*maps, params),
    )


def packed_heads(problem: Problem, config: Config) -> int:
    """How many query heads that share a key head go into one tile: all, where a tile is too tall for one alone."""
    group = problem.heads_q // problem.heads_kv
    if problem.seqlen_q >= config.rows:
        return 1
    return max(pack for pack in range(1, config.rows + 1) if group % pack == 0)


def cubin(problem: Problem, config: Config) -> Path:
    """The kernel compiled for a problem's head sizes, dtype and masks, and a configuration."""
    macros = {
        "D": rounded(problem.head_dim),
        "DV": config.columns(problem.head_dim_v),
        "SPLIT_V": config.split_v,
        "BF16": int(problem.dtype == "bf16"),
        "MASKED": int(problem.causal or problem.window is not None),
        "ROWS": config.rows,
        "KEYS": config.keys,
        "STAGES": config.stages,
        "CLUSTER": config.cluster,
        "PACK": packed_heads(problem, config),
    }
    with as_file(files("attnbench_kernels") / "cuda") as folder:
        flags = [f"-D{name}={value}" for name, value in macros.items()] + EXTRA
        return jit.compile(folder / "flash_attention_sm90.cu", toolchain=_toolchain(), flags=flags).path


@lru_cache
def load(path: Path, shared_bytes: int, cluster: int) -> Kernel:
    kernel = Kernel(path, "flash_attention")
    kernel.allow(shared_bytes=shared_bytes, cluster=cluster)
    return kernel


def _toolchain() -> jit.Toolchain:
    return jit.cubin_toolchain("sm_90a")
