"""Our flash attention in TileLang on a GPU: tiles are found by trying, and few of them share their keys.

The kernel is kernels/tilelang/flash_attention.py; this compiles it for a shape, and knows nothing of its insides.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind
from attnbench.registry import installed_version
from attnbench_plugins.fastest import fastest
from attnbench_plugins.folding import fold
from attnbench_plugins.packages import cores, missing, no_gpu
from attnbench_plugins.tiling import reach, rows, split_count

if TYPE_CHECKING:
    from torch import Tensor

Sizes = tuple[int, int, int, int]

LEAST_CAPABILITY = (8, 0)
HEAD_DIM_MULTIPLE = 16
"""Of a step of the tensor cores."""
MAX_HEAD_DIM = 256
SMALL_TILE = (64, 32, 2, 128)
"""For what no other fits: up to head sizes of 256 it needs 96 KiB, where the least GPUs have 99."""
RESERVED_BYTES = 1 << 10
"""Of a processor's shared memory, for each block."""
MAX_HEADS = 65535
"""Of the second dimension of a grid."""
DTYPES = {"fp16": "float16", "bf16": "bfloat16"}


class TileLangFlash(Backend):
    """Forward attention on contiguous fp16 and bf16 tensors, compiled in `prepare` for the shape."""

    name = "tilelang_flash"
    device: DeviceKind = "cuda"
    summary = "a short flash attention in TileLang"
    homepage = "https://tilelang.com"
    libraries = MappingProxyType({"tilelang": "0.1.15"})
    sources = (str(files("attnbench_kernels") / "tilelang"),)

    def unavailable(self) -> str | None:
        reason: str | None = no_gpu(LEAST_CAPABILITY) or missing("tilelang", "tilelang")
        if reason is None and not _has_nvcc():
            return "TileLang finds no nvcc: pip install 'tilelang[nvcc]', or set CUDA_HOME"
        return reason

    def unsupported(self, problem: Problem) -> str | None:
        if problem.direction != "fwd":
            return "forward only"
        if problem.dtype not in DTYPES:
            return "fp16 and bf16 only"
        if any(dim % HEAD_DIM_MULTIPLE or dim > MAX_HEAD_DIM for dim in (problem.head_dim, problem.head_dim_v)):
            return f"head sizes that are multiples of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}"
        if problem.batch * problem.heads_kv > MAX_HEADS:
            return f"up to {MAX_HEADS} key heads of all batch elements"
        return None

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        import torch

        q, k, v = (fold(problem, tensor).flatten(0, 1) for tensor in (q, k, v))
        out = torch.empty(problem.out_shape, dtype=q.dtype, device=q.device)
        processors = cores(q)
        call: Callable[[], Tensor] = fastest(
            launch(problem, q, k, v, out, tile, split_count(problem, tile[0], tile[1], processors))
            for tile in tiles(problem, shared_bytes(q))
        )
        return call


def tiles(problem: Problem, shared: int) -> Sequence[Sizes]:
    """Tiles to try, as a kernel's Tile: a warp group has 64 rows, and `shared` bytes hold q, and k and v twice."""
    dims = problem.head_dim + problem.head_dim_v
    if dims > 256:
        found = [(64, 64, 2, 128)] if rows(problem) <= 64 else [(64, 64, 2, 128), (128, 64, 2, 256)]
    elif rows(problem) <= 64:
        found = [(64, 64, 2, 128), (64, 128, 2, 128)]
    else:
        found = [(128, 64, 2, 256), (128, 128, 2, 256)]
    fitting = [(m, n, s, t) for m, n, s, t in found if 2 * (m * problem.head_dim + s * n * dims) <= shared]
    return fitting or [SMALL_TILE]


def shared_bytes(tensor: Tensor) -> int:
    """How much shared memory a block may have on the tensor's GPU."""
    import torch

    most: int = torch.cuda.get_device_properties(tensor.device).shared_memory_per_multiprocessor
    return most - RESERVED_BYTES


def launch(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, out: Tensor, tile: Sizes, splits: int
) -> Callable[[], Tensor]:
    """The call that computes `out` of folded q, k and v with such tiles; its first compiles."""
    import torch

    from attnbench_kernels.tilelang.flash_attention import Tile, attention, combination

    heads, count = problem.batch * problem.heads_kv, rows(problem)
    dims, dtype = (problem.head_dim, problem.head_dim_v), DTYPES[problem.dtype]
    scale_log2 = problem.softmax_scale * math.log2(math.e)
    lengths = (problem.seqlen_q, problem.seqlen_k)
    lse = torch.empty(splits, heads, count, dtype=torch.float32, device=q.device)
    shape = (splits, heads, count, problem.head_dim_v)
    parts = out.view(shape) if splits == 1 else lse.new_empty(shape)
    flat = (parts.flatten(1, 2), lse.flatten(1, 2), out.view(heads * count, problem.head_dim_v))

    @cache
    def attend() -> Callable[..., object]:
        masks = reach(problem)
        return compiled(attention(heads, count, *lengths, *dims, *masks, scale_log2, dtype, Tile(*tile), splits))

    @cache
    def combine() -> Callable[..., object]:
        return compiled(combination(heads * count, splits, problem.head_dim_v, dtype))

    def call() -> Tensor:
        attend()(q, k, v, parts, lse)
        if splits > 1:
            combine()(*flat)
        return out

    return call


def compiled(function: Any) -> Callable[..., object]:
    """What TileLang makes of a function, for the GPU that is there; called with all its tensors."""
    import tilelang

    tilelang.set_log_level("ERROR")  # a hit of its cache is a warning to it
    kernel: Callable[..., object] = tilelang.compile(
        function, pass_configs={tilelang.PassConfigKey.TL_ENABLE_FAST_MATH: True}
    )
    return kernel


def _has_nvcc() -> bool:
    """Whether nvcc is where TileLang looks for it."""
    named = any(os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH"))
    pip = installed_version("nvidia-cuda-nvcc")
    return bool(named or shutil.which("nvcc") or pip or Path("/usr/local/cuda").exists())


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [TileLangFlash()]
