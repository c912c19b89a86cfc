"""Our flash attention in Triton, on a GPU, and on an NPU through triton-ascend: tile sizes and splits by trying.

The kernel is kernels/triton/flash_attention.py, which this launches and of whose insides it knows nothing.
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

if TYPE_CHECKING:
    from torch import Tensor

LEAST_CAPABILITY = (8, 0)
LEAST_TILE = 16
"""Rows, keys and columns that tl.dot takes at least."""
MAX_HEAD_DIM = 1024
MAX_ELEMENTS = 1 << 31
"""Of a head's keys, whose places are counted in 32 bits."""
MAX_PROGRAMS = {"cuda": (1 << 31) - 1, "npu": 65535}
MAX_SPLITS = 64
DISTRIBUTIONS: dict[DeviceKind, tuple[str, str]] = {"cuda": ("triton", "3.6.0"), "npu": ("triton-ascend", "3.2.0")}


class Tile(NamedTuple):
    """Queries and keys of a tile, and what a GPU gives to it (a NPU ignores that)."""

    rows: int
    keys: int
    warps: int = 4
    stages: int = 2


class TritonFlash(Backend):
    """Forward attention on contiguous tensors by one Triton kernel, and another where programs share a tile's keys."""

    homepage = "https://triton-lang.org"

    def __init__(self, device: DeviceKind) -> None:
        distribution, version = DISTRIBUTIONS[device]
        self.name, self.device = "triton_flash", device
        self.summary = "flash attention in 100 lines of Triton"
        if device == "npu":
            self.summary += " (triton-ascend; not yet run on hardware)"
        self.libraries = MappingProxyType({distribution: version})
        self.sources = (str(files("attnbench_kernels") / "triton"),)

    def unavailable(self) -> str | None:
        from attnbench.devices import device

        if reason := no_gpu(LEAST_CAPABILITY) if self.device == "cuda" else device(self.device).unavailable():
            return reason
        distribution = DISTRIBUTIONS[self.device][0]  # both install a package `triton`
        if not installed_version(distribution):
            return f"{distribution} is not installed: pip install 'attnbench[{distribution}]'"
        return None

    def unsupported(self, problem: Problem) -> str | None:
        if problem.direction != "fwd":
            return "forward only"
        if max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
            return f"head sizes up to {MAX_HEAD_DIM}"
        if problem.seqlen_k * max(problem.head_dim, problem.head_dim_v) >= MAX_ELEMENTS:
            return "fewer than 2³¹ elements in a head's keys"
        if _programs(problem, tiles(problem, self.device)[-1]) > MAX_PROGRAMS[self.device]:
            return f"up to {MAX_PROGRAMS[self.device]} tiles of queries"
        return None

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        import torch

        from attnbench.devices import device

        folded = [fold(problem, tensor) for tensor in (q, k, v)]
        out = torch.empty(problem.out_shape, dtype=q.dtype, device=q.device)
        cores = device(self.device).info().cores or 1
        return fastest(
            launch(problem, *folded, out, tile, splits)
            for tile in tiles(problem, self.device)
            if _programs(problem, tile) <= MAX_PROGRAMS[self.device]
            for splits in sorted({1, splits_for(problem, tile, cores)})
        )


def tiles(problem: Problem, device: DeviceKind) -> Sequence[Tile]:
    """Tiles to try, in whose memory and registers the problem's heads fit."""
    bytes_a_key = sum(map(_padded, (problem.head_dim, problem.head_dim_v))) * ITEM_BYTES[problem.dtype]
    few = problem.heads_q // problem.heads_kv * problem.seqlen_q <= LEAST_TILE
    if device == "npu":  # 192 KiB for scores, weights and sums
        if bytes_a_key > 512:
            return [Tile(16, 64), Tile(16, 32), Tile(16, 16)]
        return [Tile(16, 128), Tile(16, 64)] if few else [Tile(64, 128), Tile(32, 128), Tile(64, 64)]
    if problem.dtype == "fp32":  # without tensor cores every product is an instruction: more takes minutes to compile
        return [Tile(16, 16)]
    if bytes_a_key > 1024:
        return [Tile(16, 16)]
    if bytes_a_key > 512:
        return [Tile(16, 32, stages=3)] if few else [Tile(64, 32), Tile(128, 64, warps=8)]
    if few:
        return [Tile(16, 64, stages=3), Tile(16, 128)]
    return [Tile(64, 64, stages=3), Tile(128, 64, 8, 3), Tile(128, 128, 8)]


def splits_for(problem: Problem, tile: Tile, cores: int) -> int:
    """How many programs share a tile's keys so that no core idles, a power of two; 1 where tiles are enough."""
    blocks = -(-problem.seqlen_k // tile.keys)
    room = min(cores // _programs(problem, tile), blocks, MAX_SPLITS)
    return 1 << max(room, 1).bit_length() - 1


def launch(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, out: Tensor, tile: Tile, splits: int
) -> Callable[[], Tensor]:
    """A call that computes `out` of folded q, k and v with such tiles."""
    import torch
    from attnbench_kernels.triton.flash_attention import attend, combine

    heads, rows = problem.batch * problem.heads_kv, q.shape[2]
    everywhere = problem.seqlen_q + problem.seqlen_k
    behind = everywhere if problem.window is None else min(problem.window, everywhere)
    ahead = 1 if problem.causal else behind
    parts, lse = out, None
    if splits > 1:
        wide = {"dtype": torch.float32, "device": q.device}
        parts = torch.empty(splits, heads * rows, problem.head_dim_v, **wide)
        lse = torch.empty(splits, heads * rows, **wide)
    dims = {"HEAD_DIM_V": problem.head_dim_v, "E": _padded(problem.head_dim_v)}
    options = {"SPLITS": splits, "ROWS": tile.rows, "KEYS": tile.keys}
    options |= {"num_warps": tile.warps, "num_stages": tile.stages}

    def call() -> Tensor:
        attend[_programs(problem, tile), splits](
            *(q, k, v, parts, lse, heads, rows, problem.seqlen_q, problem.seqlen_k, behind, ahead),
            problem.softmax_scale * math.log2(math.e),
            **dims | {"HEAD_DIM": problem.head_dim, "D": _padded(problem.head_dim)} | options,
        )
        if splits > 1:
            combine[(heads * rows,)](parts, lse, out, heads * rows, splits, **dims, MOST_SPLITS=splits)
        return out

    return call


def _programs(problem: Problem, tile: Tile) -> int:
    rows = problem.heads_q // problem.heads_kv * problem.seqlen_q
    return problem.batch * problem.heads_kv * -(-rows // tile.rows)


def _padded(head_dim: int) -> int:
    return max(LEAST_TILE, 1 << (head_dim - 1).bit_length())


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [TritonFlash("cuda"), TritonFlash("npu")]
