"""Our flash attention in TileLang on a GPU: tiles are found by trying, and few of them share their keys.

The kernel is kernels/tilelang/flash_attention.py; this compiles it for a shape, and knows nothing of its insides.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind
from attnbench.registry import installed_version
from attnbench_plugins.fastest import fastest
from attnbench_plugins.folding import fold
from attnbench_plugins.packages import missing, no_gpu
from attnbench_plugins.tiling import reach, rows, split_count

if TYPE_CHECKING:
    from torch import Tensor

LEAST_CAPABILITY = (8, 0)
HEAD_DIM_MULTIPLE = 16
"""Of a step of the tensor cores."""
MAX_HEAD_DIM = 256
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

    @property
    def sources(self) -> Sequence[str]:  # type: ignore[override]
        return [str(files("attnbench_kernels") / "tilelang")]

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

        from attnbench.devices import device

        q, k, v = (fold(problem, tensor).flatten(0, 1) for tensor in (q, k, v))
        out = torch.empty(problem.out_shape, dtype=q.dtype, device=q.device)
        cores = device("cuda").info().cores or 1
        call: Callable[[], Tensor] = fastest(
            launch(problem, q, k, v, out, tile, split_count(problem, tile[0], tile[1], cores))
            for tile in tiles(problem)
        )
        return call


def tiles(problem: Problem) -> Sequence[tuple[int, int, int, int]]:
    """Tiles to try, as the kernel's Tile: a warp group has 64 rows, and 227 KiB hold q and the buffers of k and v."""
    if problem.head_dim + problem.head_dim_v > 256:
        return [(64, 64, 2, 128)] if rows(problem) <= 64 else [(64, 64, 2, 128), (128, 64, 2, 256)]
    return [(64, 64, 2, 128), (64, 128, 2, 128)] if rows(problem) <= 64 else [(128, 64, 2, 256), (128, 128, 2, 256)]


def launch(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, out: Tensor, tile: tuple[int, int, int, int], splits: int
) -> Callable[[], Tensor]:
    """The call that computes `out` of folded q, k and v with such tiles."""
    import torch

    from attnbench_kernels.tilelang.flash_attention import Tile, attention, combination

    heads, count = problem.batch * problem.heads_kv, rows(problem)
    dims, dtype = (problem.head_dim, problem.head_dim_v), DTYPES[problem.dtype]
    scale_log2 = problem.softmax_scale * math.log2(math.e)
    lengths = (problem.seqlen_q, problem.seqlen_k)
    attend = compiled(attention(heads, count, *lengths, *dims, *reach(problem), scale_log2, dtype, Tile(*tile), splits))
    lse = torch.empty(splits, heads, count, dtype=torch.float32, device=q.device)
    shape = (splits, heads, count, problem.head_dim_v)
    parts = out.view(shape) if splits == 1 else lse.new_empty(shape)
    combine: Callable[[], object] = bool  # nothing to do
    if splits > 1:
        combined = compiled(combination(heads * count, splits, problem.head_dim_v, dtype))
        flat = (parts.flatten(1, 2), lse.flatten(1, 2), out.view(heads * count, problem.head_dim_v))
        combine = partial(combined, *flat)

    def call() -> Tensor:
        attend(q, k, v, parts, lse)
        combine()
        return out

    return call


def compiled(function: Any) -> Any:
    """What TileLang makes of a function, for the GPU that is there; called with all its tensors."""
    import tilelang

    tilelang.set_log_level("ERROR")  # a hit of its cache is a warning to it
    return tilelang.compile(function, pass_configs={tilelang.PassConfigKey.TL_ENABLE_FAST_MATH: True})


def _has_nvcc() -> bool:
    """Whether nvcc is where TileLang looks for it."""
    named = any(os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH"))
    pip = installed_version("nvidia-cuda-nvcc")
    return bool(named or shutil.which("nvcc") or pip or Path("/usr/local/cuda").exists())


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [TileLangFlash()]
