"""Owns the configurations of kernels/cuda/flash_attention_sm80.cu: which there are, and which one a problem gets.

Knows no driver and no tensor, so that all of it runs where there is no GPU.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from attnbench.problem import Problem
from attnbench_plugins.jit_flash.cuda_config import key_blocks, packed_heads

COPIES = (16, 8, 4, 2)
"""Bytes that one copy may have."""
WARPS = 8
"""Of an SM, that hide each other's latencies, with up to 255 registers a thread."""
RESERVED_BYTES = 1024
"""Of shared memory, that each block takes besides its own."""
MAX_PARTS = 32
"""Of a tile."""
LEAST_KEY_BLOCKS = 2
"""Of a part: with one, nothing is copied while something is multiplied."""
STATE_BYTES = 8
"""Of a part, what is known of a row beside its columns."""


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
    parts: int = 1

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.row_warps * self.key_warps

    @property
    def has_workspace(self) -> bool:
        """Whether blocks of a launch meet in memory."""
        return self.parts > 1

    def part_bytes(self, head_dim_v: int) -> int:
        """Of what a block leaves for the last of its tile."""
        return self.rows * (4 * rounded(head_dim_v) + STATE_BYTES)

    def shared_bytes(self, head_dim: int, head_dim_v: int) -> int:
        """What a block needs, as the kernel lays it out."""
        d, dv = rounded(head_dim), rounded(head_dim_v)
        read = self.rows * d * 2 + self.stages * self.keys * (d + dv) * 2
        sums = self.key_warps * self.rows * (dv + 8) * 4
        return max(read, sums if self.key_warps > 1 else self.rows * dv * 2)


def rounded(head_dim: int) -> int:
    """Up to whole steps of mma.sync."""
    return -(-head_dim // 16) * 16


def units(problem: Problem, config: Config) -> int:
    """Tiles that a launch has, each of as many blocks as it has parts."""
    heads = packed_heads(problem, config.rows)
    tiles = -(-problem.seqlen_q // (config.rows // heads))
    return int(problem.batch * (problem.heads_q // heads) * tiles)


def workspace_bytes(problem: Problem, config: Config) -> tuple[int, int]:
    """Of counters and of parts; zeros where blocks do not meet."""
    if config.parts == 1:
        return 0, 0
    tiles = units(problem, config)
    return 4 * tiles, tiles * config.parts * config.part_bytes(problem.head_dim_v)


def configs(problem: Problem, gpu: Gpu) -> Iterator[Config]:
    """For each size of a tile, the largest first, what it does best in, its keys not split between blocks.

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
    return _blocks_an_sm(config, dims, gpu) * config.threads // 32 >= WARPS


def _blocks_an_sm(config: Config, dims: tuple[int, int], gpu: Gpu) -> int:
    """That its shared memory has room for."""
    return gpu.sm_bytes // (config.shared_bytes(*dims) + RESERVED_BYTES)


def candidates(problem: Problem, gpu: Gpu) -> Iterator[Config]:
    """Those of `configs`, and each with all numbers of parts that have keys enough and whose blocks run at once.

    Two on an SM at most, of all tiles.
    """
    for config in configs(problem, gpu):
        yield config
        room = gpu.sms * min(
            2, _blocks_an_sm(config, (problem.head_dim, problem.head_dim_v), gpu), WARPS * 32 // config.threads
        )
        most = min(
            MAX_PARTS,
            room // units(problem, config),
            max(key_blocks(problem, config.rows, config.keys)) // LEAST_KEY_BLOCKS,
        )
        for parts in range(2, most + 1):
            yield dataclasses.replace(config, parts=parts)


def choose(problem: Problem, gpu: Gpu) -> Config:
    """The fastest by `predicted_us`."""
    return min(candidates(problem, gpu), key=lambda config: predicted_us(problem, config, gpu))


START_US, CYCLES_A_US = 2.6, 1755.0
"""A launch, and what comes before the first key block and after the last."""
MULTIPLY_ADDS_A_CYCLE = 1010.0
"""Of an SM."""
WARP_CYCLES, BLOCK_CYCLES = 0.178, 800.0
"""What a key block takes a warp for each of its keys and columns, and its SM besides the products."""
MEET_CYCLES, PART_BYTES_A_CYCLE = 1240.0, 27.0
"""For adding up parts: to write, to count and to wait for the first; what one SM reads of them."""


def predicted_us(problem: Problem, config: Config, gpu: Gpu) -> float:
    """What a model expects of a configuration: what its key blocks take the SM that has the most of them, and adding up
    a tile's parts.

    A warp waits for what it reads of each key, however many rows it has; the tensor cores are shared by the blocks of
    an SM. What comes from memory is left out: all configurations wait for it alike.
    """
    dims = rounded(problem.head_dim) + rounded(problem.head_dim_v)
    tile_blocks = key_blocks(problem, config.rows, config.keys)
    on_an_sm = -(-units(problem, config) * config.parts // gpu.sms)
    # Of a part: where an SM has several, the longest of them do not come together.
    blocks = math.ceil((max(tile_blocks) if on_an_sm == 1 else statistics.fmean(tile_blocks)) / config.parts)
    products = config.rows * config.keys * dims / MULTIPLY_ADDS_A_CYCLE
    alone = config.keys // config.key_warps * dims * WARP_CYCLES
    cycles = blocks * max(alone, on_an_sm * (BLOCK_CYCLES + products))
    if config.parts > 1:
        heads = packed_heads(problem, config.rows)
        rows = min(config.rows // heads, problem.seqlen_q) * heads  # that hold a query
        row_bytes = config.part_bytes(problem.head_dim_v) / config.rows
        cycles += MEET_CYCLES + config.parts * rows * row_bytes / PART_BYTES_A_CYCLE
    return START_US + cycles / CYCLES_A_US


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
        "PARTS": config.parts,
        "PACK": packed_heads(problem, config.rows),
        "COPY": copy,
    }
