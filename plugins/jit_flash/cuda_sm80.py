"""Owns the configurations of kernels/cuda/flash_attention_sm80.cu: which there are, and which one a problem gets.

Knows no driver and no tensor, so that all of it runs where there is no GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from attnbench.problem import Problem
from attnbench_plugins.jit_flash.cuda_config import packed_heads

COPIES = (16, 8, 4, 2)
"""Bytes that one copy may have."""
WARPS = 8
"""Of an SM, that hide each other's latencies, with up to 255 registers a thread."""
RESERVED_BYTES = 1024
"""Of shared memory, that each block takes besides its own."""


@dataclass(frozen=True)
class Gpu:
    """What a GPU has of what the choice depends on."""

    sms: int
    block_bytes: int
    """Of shared memory, that a block may have."""
    sm_bytes: int
    """Of shared memory, that the blocks of an SM have together."""


@dataclass(frozen=True)
class Config:
    """What the kernel is compiled for, beside the problem; its head says what the fields mean."""

    rows: int
    keys: int
    row_warps: int
    key_warps: int = 1
    stages: int = 1
    q_registers: bool = False

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.row_warps * self.key_warps

    def shared_bytes(self, head_dim: int, head_dim_v: int) -> int:
        """What a block needs, as the kernel lays it out."""
        d, dv = rounded(head_dim), rounded(head_dim_v)
        read = self.rows * d * 2 + self.stages * self.keys * (d + dv) * 2
        parts = self.key_warps * self.rows * (dv + 8) * 4
        return max(read, parts if self.key_warps > 1 else self.rows * dv * 2)


def rounded(head_dim: int) -> int:
    """Up to whole steps of mma.sync."""
    return -(-head_dim // 16) * 16


def units(problem: Problem, config: Config) -> int:
    """Blocks that a launch has."""
    heads = packed_heads(problem, config.rows)
    tiles = -(-problem.seqlen_q // (config.rows // heads))
    return int(problem.batch * (problem.heads_q // heads) * tiles)


def configs(problem: Problem, gpu: Gpu) -> Iterator[Config]:
    """For each size of a tile, the largest first, what it does best in.

    A warp of 32 rows reads each key from shared memory half as often as two of 16 rows, but has registers for 128
    columns of V alone. Tiles of fewer rows than 64 split a block's keys between warps.
    """
    dims = problem.head_dim, problem.head_dim_v
    small, wide = max(dims) <= 64, dims[1] > 128
    few = max(dims) <= 128  # so that queries fit into registers, where a warp has 16 rows
    # On an H100 two stages were 3 to 14% faster than one (4 × 16 heads of 4096, 64 and 128 columns).
    large = [
        Config(128, keys, 8 if wide else 4, stages=stages)
        for keys in ((96, 64) if small else (64, 32))
        for stages in (2, 1)
    ]
    halves = [Config(64, keys, 4, stages=stages, q_registers=few) for keys, stages in ((64, 2), (64, 1), (32, 1))]
    quarters = [Config(32, 64, 2, 2, stages, few) for stages in (2, 1)]
    least = [Config(16, keys, 1, 4, stages, few) for keys, stages in ((128, 2), (64, 2), (64, 1))]
    for of_a_size in (large, halves, quarters, least):
        fitting = [config for config in of_a_size if config.shared_bytes(*dims) <= gpu.block_bytes]
        if fitting:
            yield next((config for config in fitting if _fills(config, dims, gpu)), fitting[0])


def _fills(config: Config, dims: tuple[int, int], gpu: Gpu) -> bool:
    """Whether an SM has room for as many of its warps as hide each other's latencies."""
    blocks = gpu.sm_bytes // (config.shared_bytes(*dims) + RESERVED_BYTES)
    return blocks * config.threads // 32 >= WARPS


def choose(problem: Problem, gpu: Gpu) -> Config:
    """The largest tiles of which there is one for each SM, else the smallest.

    Of two sizes of which there are as many tiles, as one tile has all there is, the smaller.
    """
    found = list(configs(problem, gpu))
    counts = [units(problem, config) for config in found]
    for config, count, after in zip(found, counts, [*counts[1:], None]):
        if count >= gpu.sms and count != after:
            return config
    return found[-1]


def copy_bytes(places: Iterable[int]) -> int:
    """How many bytes may be copied at once, where rows begin at multiples of these many bytes."""
    common = math.gcd(*places)
    return next(size for size in COPIES if common % size == 0)


def macros(problem: Problem, config: Config, copy: int) -> dict[str, int]:
    """What the source is compiled with; its head says what they mean."""
    return {
        "HEAD_DIM": problem.head_dim,
        "HEAD_DIM_V": problem.head_dim_v,
        "BF16": int(problem.dtype == "bf16"),
        "MASKED": int(problem.causal or problem.window is not None),
        "ROWS": config.rows,
        "KEYS": config.keys,
        "ROW_WARPS": config.row_warps,
        "KEY_WARPS": config.key_warps,
        "STAGES": config.stages,
        "Q_REGISTERS": int(config.q_registers),
        "PACK": packed_heads(problem, config.rows),
        "COPY": copy,
    }
