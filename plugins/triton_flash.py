"""Our flash attention in Triton, on a GPU, and on an NPU through triton-ascend: tiles and splits are found by trying.

The kernel is kernels/triton/flash_attention.py; this launches it, and knows nothing of its insides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import ITEM_BYTES, DeviceKind
from attnbench.registry import installed_version
from attnbench_plugins.fastest import fastest
from attnbench_plugins.folding import fold
from attnbench_plugins.packages import no_gpu
from attnbench_plugins.tiling import reach, rows, split_count, tile_count

if TYPE_CHECKING:
    from torch import Tensor

LEAST_CAPABILITY = (8, 0)
LEAST_TILE = 16
"""Rows, keys and columns that tl.dot takes at least."""
MAX_HEAD_DIM = 1024
MAX_ELEMENTS = 1 << 31
"""Of a matrix of the kernel, which counts places in 32 bits."""
MAX_TILES = {"cuda": (1 << 31) - 1, "npu": 65535}
"""Of a grid; with splits there are far fewer."""
LIBRARIES = {"cuda": ("triton", "3.6.0"), "npu": ("triton-ascend", "3.2.0")}
"""Both install a package `triton`."""


class Tile(NamedTuple):
    """Queries and keys of a tile, and what a GPU gives to it, which an NPU ignores."""

    rows: int
    keys: int
    warps: int = 4
    stages: int = 2


class TritonFlash(Backend):
    """Forward attention on contiguous tensors: one kernel, or two where programs share a tile's keys."""

    name = "triton_flash"
    homepage = "https://triton-lang.org"

    def __init__(self, device: DeviceKind) -> None:
        self.device = device
        self.library, version = LIBRARIES[device]
        self.libraries = MappingProxyType({self.library: version})
        self.summary = "a short flash attention in Triton"
        if device == "npu":
            self.summary += ", through triton-ascend (not yet run on hardware)"
        self.sources = (str(files("attnbench_kernels") / "triton"),)

    def unavailable(self) -> str | None:
        from attnbench.devices import device

        if reason := no_gpu(LEAST_CAPABILITY) if self.device == "cuda" else device(self.device).unavailable():
            return str(reason)
        if not installed_version(self.library):
            return f"{self.library} is not installed: pip install 'attnbench[{self.library}]'"
        return None

    def unsupported(self, problem: Problem) -> str | None:
        if problem.direction != "fwd":
            return "forward only"
        head_dim = max(problem.head_dim, problem.head_dim_v)
        if head_dim > MAX_HEAD_DIM:
            return f"head sizes up to {MAX_HEAD_DIM}"
        if max(problem.seqlen_k, rows(problem)) * head_dim >= MAX_ELEMENTS:
            return "fewer than 2³¹ elements in what belongs to a key head"
        if all(tile_count(problem, tile.rows) > MAX_TILES[self.device] for tile in tiles(problem, self.device)):
            return f"up to {MAX_TILES[self.device]} tiles of queries"
        return None

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        import torch

        from attnbench.devices import device

        q, k, v = (fold(problem, tensor) for tensor in (q, k, v))
        out = torch.empty(problem.out_shape, dtype=q.dtype, device=q.device)
        cores = device(self.device).info().cores or 1
        call: Callable[[], Tensor] = fastest(
            launch(problem, q, k, v, out, tile, splits)
            for tile in tiles(problem, self.device)
            if tile_count(problem, tile.rows) <= MAX_TILES[self.device]
            for splits in sorted({1, split_count(problem, tile.rows, tile.keys, cores)})
        )
        return call


def tiles(problem: Problem, device: DeviceKind) -> Sequence[Tile]:
    """Tiles to try, for which the memory and registers of a core are enough with such heads."""
    key_bytes = (_padded(problem.head_dim) + _padded(problem.head_dim_v)) * ITEM_BYTES[problem.dtype]
    few = rows(problem) <= LEAST_TILE
    if device == "npu":  # 192 KiB hold scores, weights and sums
        if key_bytes > 512:
            return [Tile(16, 64), Tile(16, 32), Tile(16, 16)]
        return [Tile(16, 128), Tile(16, 64)] if few else [Tile(64, 128), Tile(32, 128), Tile(64, 64)]
    if key_bytes > 1024 or problem.dtype == "fp32":  # fp32: each product is an instruction, and more take minutes
        return [Tile(16, 16)]
    if key_bytes > 512:
        return [Tile(16, 32, stages=3)] if few else [Tile(64, 32), Tile(128, 64, warps=8)]
    if few:
        return [Tile(16, 64, stages=3), Tile(16, 128)]
    return [Tile(64, 64, stages=3), Tile(128, 64, warps=8, stages=3), Tile(128, 128, warps=8)]


def launch(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, out: Tensor, tile: Tile, splits: int
) -> Callable[[], Tensor]:
    """The call that computes `out` of folded q, k and v with such tiles."""
    import torch

    from attnbench_kernels.triton.flash_attention import attend, combine

    heads, count = problem.batch * problem.heads_kv, rows(problem)
    grid = (tile_count(problem, tile.rows), splits)
    parts, lse = out, None
    if splits > 1:
        parts = torch.empty(splits, heads * count, problem.head_dim_v, dtype=torch.float32, device=q.device)
        lse = torch.empty(splits, heads * count, dtype=torch.float32, device=q.device)
    sizes = (heads, count, problem.seqlen_q, problem.seqlen_k, *reach(problem))
    dims_v = {"HEAD_DIM_V": problem.head_dim_v, "E": _padded(problem.head_dim_v)}
    options = {"HEAD_DIM": problem.head_dim, "D": _padded(problem.head_dim), **dims_v, "SPLITS": splits}
    options |= {"ROWS": tile.rows, "KEYS": tile.keys, "num_warps": tile.warps, "num_stages": tile.stages}
    scale_log2 = problem.softmax_scale * math.log2(math.e)

    def call() -> Tensor:
        attend[grid](q, k, v, parts, lse, *sizes, scale_log2, **options)
        if splits > 1:
            combine[(heads * count,)](parts, lse, out, heads * count, splits, MOST_SPLITS=splits, **dims_v)
        return out

    return call


def _padded(head_dim: int) -> int:
    return max(LEAST_TILE, 1 << (head_dim - 1).bit_length())


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [TritonFlash("cuda"), TritonFlash("npu")]
