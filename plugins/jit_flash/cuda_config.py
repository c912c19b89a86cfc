"""Owns the configurations of kernels/cuda/flash_attention_sm90.cu: which there are, which is the fastest by a model.

Knows no driver and no tensor, so that all of it runs where there is no GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from attnbench.problem import Problem

SHARED_BYTES = 232_448
"""What a block may have on sm_90."""
STATE_BYTES = 16
"""Of a part, what is known of a row beside its columns."""
MAX_PARTS = 32
"""Of a tile."""
LARGE_ARRAYS = 192
"""Registers of a thread for scores, weights, output and queries: beyond, the kernel keeps queries in shared memory."""
LONG = 1024
"""Keys, of which a few masked ones more in the last block do not count."""
SHAPES = (
    *((128, keys, 1) for keys in (176, 128, 64)),
    *((64, keys, shared_rows) for shared_rows in (1, 2) for keys in (128, 64)),
)
"""Of a tile and its key blocks: rows, keys, and how many consumers share the rows."""


@dataclass(frozen=True)
class Config:
    """What the kernel is compiled for, beside the problem; its head says what the fields mean."""

    rows: int
    keys: int
    stages: int
    parts: int = 1
    split_v: int = 1
    shared_rows: int = 1
    persistent: bool = False

    @property
    def threads(self) -> int:
        """Of a block: the consumers' warpgroups, and the producer's."""
        return 2 * self.rows * self.shared_rows + 128

    @property
    def has_workspace(self) -> bool:
        """Whether blocks of a launch meet in memory, or count there."""
        return self.parts > 1 or self.persistent

    def cannot_go_on(self, problem: Problem) -> str | None:
        """Why blocks cannot take one tile after the other; None where they can."""
        if self.parts > 1 or self.shared_rows > 1:
            return "blocks that share a tile take no others"
        if (problem.causal or problem.window is not None) and problem.seqlen_q > problem.seqlen_k:
            return "a tile may see no key"
        return None

    def columns(self, head_dim_v: int) -> int:
        """Of V, that a block works on."""
        return rounded(-(-head_dim_v // self.split_v))

    def part_bytes(self, head_dim_v: int) -> int:
        """Of what a block tells the others of its tile."""
        return self.rows * (4 * self.columns(head_dim_v) + STATE_BYTES)

    def shared_bytes(self, head_dim: int, head_dim_v: int) -> int | None:
        """What a block needs, as the kernel lays it out; None where that is more than it may have."""
        d, dv = rounded(head_dim), self.columns(head_dim_v)
        arrays = self.keys * 3 // 4 + dv // 2 + d // 4
        q = self.rows * d * 2 * (2 if self.persistent and arrays > LARGE_ARRAYS else 1)
        ring = self.stages * self.keys * (d + dv) * 2
        barriers = 8 * (5 + 4 * self.stages)
        halves = 128 * (dv // 2 + 8) * 4 if self.shared_rows > 1 else 0
        needed = q + ring + halves + barriers
        return needed if needed <= SHARED_BYTES else None


def rounded(head_dim: int) -> int:
    """Up to whole boxes of 64 columns."""
    return -(-head_dim // 64) * 64


def packed_heads(problem: Problem, rows: int) -> int:
    """How many query heads that share a key head lie in a tile: one where its queries fill the tile, else all there are
    room for."""
    group = problem.heads_q // problem.heads_kv
    if problem.seqlen_q >= rows:
        return 1
    return max(heads for heads in range(1, rows + 1) if group % heads == 0)


def units(problem: Problem, config: Config) -> int:
    """Tiles that a launch has, each of as many blocks as it has parts."""
    heads = packed_heads(problem, config.rows)
    tiles = -(-problem.seqlen_q // (config.rows // heads))
    return problem.batch * (problem.heads_q // heads) * tiles * config.split_v


def workspace_bytes(problem: Problem, config: Config) -> tuple[int, int]:
    """Of counters and of parts; zeros where blocks neither meet nor count."""
    if config.parts == 1:
        return (8 if config.persistent else 0), 0
    blocks = units(problem, config) * config.parts
    return 4 * blocks, blocks * config.part_bytes(problem.head_dim_v)


def configs(problem: Problem, sms: int) -> Iterator[Config]:
    """All that can run a problem and may be the fastest, on a device of so many SMs."""
    boxes = rounded(problem.head_dim_v) // 64
    masked = problem.causal or problem.window is not None
    for (rows, keys, shared_rows), split_v in itertools.product(SHAPES, range(1, boxes + 1)):
        if boxes % split_v or (split_v > 1 and _read_bytes(problem) > L2_BYTES):
            continue
        one = Config(rows, keys, 0, split_v=split_v, shared_rows=shared_rows)
        wide, large = boxes // split_v > 2, rows * shared_rows == 128
        if large and keys > 64 and wide:  # more registers than there are
            continue
        tiles = units(problem, one)
        many = tiles > sms and problem.seqlen_k >= LONG
        long = _long_blocks(problem, split_v, masked=masked)
        for parts in _numbers_of_parts(-(-problem.seqlen_k // keys) // shared_rows, sms // tiles):
            if parts == 1 and many and rows == 128 and not wide and keys != long:
                continue
            if keys > 128 and (parts > 1 or masked or keys != long):
                continue
            # More stages hide more latency, but where tiles are large and many two measured 4% faster than three.
            numbers = (2,) if rows == keys == 128 and parts == 1 else (4, 3, 2)
            # Going on to the next tile can take room for its queries, which there is not for large heads.
            for persistent, stages in itertools.product((True, False), numbers):
                config = dataclasses.replace(one, stages=stages, parts=parts, persistent=persistent)
                if persistent and (tiles <= sms or config.cannot_go_on(problem)):
                    continue
                if stages % shared_rows == 0 and config.shared_bytes(problem.head_dim, problem.head_dim_v) is not None:
                    yield config
                    break


def _long_blocks(problem: Problem, split_v: int, *, masked: bool) -> int:
    """Keys of a block where many tiles have 128 rows: as many as there is room for, with masks no more than 128.

    Where blocks do not go on to the next tile, 128 keys were up to 9% slower than 176, and 64 up to 20%.
    """
    # Going on is worth more: with 128 keys it was up to 15% faster than not going on with 176.
    for persistent, keys in itertools.product((True, False), (128,) if masked else (176, 128)):
        config = Config(128, keys, 2, split_v=split_v, persistent=persistent)
        if config.shared_bytes(problem.head_dim, problem.head_dim_v) is not None:
            return keys
    return 64


def _numbers_of_parts(blocks: int, most: int) -> Sequence[int]:
    """Of a tile with so many key blocks, `most` at most: the least of those whose largest parts are as large."""
    largest = {-(-blocks // parts) for parts in range(1, min(blocks, most, MAX_PARTS) + 1)}
    return sorted({1} | {-(-blocks // size) for size in largest})


def choose(problem: Problem, sms: int) -> Config:
    """The fastest by `predicted_us`."""
    return min(configs(problem, sms), key=lambda config: predicted_us(problem, config, sms))


LAUNCH_US = 1.2
"""An empty kernel in a graph."""
CYCLES_A_US = 1750.0
START_CYCLES = 716.0
"""Until the first key block can be asked for, and after the last for writing."""
LOAD_BYTES_A_CYCLE = 81.5
"""Of one SM."""
BLOCK_LOAD_CYCLES = 111.0
"""What a key block's loads take besides."""
L2_BYTES_A_CYCLE = 5290.0
"""Of all SMs."""
L2_BYTES, MEMORY_LOAD_BYTES_A_CYCLE, MEMORY_BYTES_A_CYCLE = 40e6, 27.0, 1830.0
"""Beyond the first, keys and values come from memory, for one SM at the second, for all at the third."""
MULTIPLY_ADDS_A_CYCLE, GUESSED_MULTIPLY_ADDS_A_CYCLE = 1494.0, 1340.0
"""Of an SM's tensor cores, which do 2048 at best; the second where blocks go on from tile to tile without a window, and
do not look for every key block's greatest score."""
SOFTMAX_CYCLES_A_KEY = 1.59
"""Of 64 rows."""
BLOCK_CYCLES, MERGE_CYCLES = 722.0, 115.0
"""What a key block takes besides, and two consumers of the same rows at the end."""
WIDE_CYCLES = 250.0
"""How much less a key block takes besides for every 64 columns of V after 128, whose products hide it."""
CYCLES_A_PART, PART_BYTES_A_CYCLE = 37.1, 10.6
"""For adding up parts: for each, and for what a block writes and reads of them."""
TILE_CYCLES = 662.0
"""What a tile after the first takes besides its key blocks, where a block of threads goes on to it."""
MOST_TILES = 64
"""Looked at for how many key blocks they see."""


def predicted_us(problem: Problem, config: Config, sms: int) -> float:
    """What a model expects of a configuration; infinite where not all parts of all tiles can run at once."""
    d, dv = rounded(problem.head_dim), config.columns(problem.head_dim_v)
    launched, at_once = units(problem, config), sms // config.parts
    if config.parts > 1 and launched > at_once:
        return float("inf")
    tile_blocks = key_blocks(problem, config.rows, config.keys)
    waves, mean_blocks = max(1.0, launched / at_once), statistics.fmean(tile_blocks)
    if min(tile_blocks) == max(tile_blocks):
        waves = math.ceil(waves)
    # A tile's: of one wave the longest counts, of several their mean.
    blocks = math.ceil((max(tile_blocks) if waves == 1 else mean_blocks) / config.parts / config.shared_rows)
    running = min(launched, at_once) * config.parts
    consumers = config.rows // 64 * config.shared_rows
    guessed = config.persistent and problem.window is None
    multiply_rate = GUESSED_MULTIPLY_ADDS_A_CYCLE if guessed else MULTIPLY_ADDS_A_CYCLE
    products = 64 * config.keys * (d + dv) / multiply_rate
    # A consumer's softmax waits for its products, and not for those of another.
    besides = BLOCK_CYCLES - WIDE_CYCLES * max(0, dv // 64 - 2)
    compute = max(consumers * products, products + SOFTMAX_CYCLES_A_KEY * config.keys + besides)
    rate = min(LOAD_BYTES_A_CYCLE, L2_BYTES_A_CYCLE / running)
    if _read_bytes(problem) > L2_BYTES:  # once, and then by the other tiles of a key head from L2
        readers = launched / (problem.batch * problem.heads_kv)
        rate = min(rate, readers * min(MEMORY_LOAD_BYTES_A_CYCLE, MEMORY_BYTES_A_CYCLE / running))
    load = BLOCK_LOAD_CYCLES + config.keys * config.shared_rows * (d + dv) * 2 / rate
    cycles = START_CYCLES + compute + load + (blocks - 1) * max(compute, load)
    if config.shared_rows > 1:
        cycles += MERGE_CYCLES
    if config.parts > 1:
        cycles += CYCLES_A_PART * config.parts + config.part_bytes(problem.head_dim_v) / PART_BYTES_A_CYCLE
    later = mean_blocks * max(compute, load) + TILE_CYCLES if config.persistent else cycles
    return LAUNCH_US + (cycles + (waves - 1) * later) / CYCLES_A_US


def _read_bytes(problem: Problem) -> int:
    """Of the keys and values that any query sees."""
    (low, _), (_, high) = problem.key_range(0), problem.key_range(problem.seqlen_q - 1)
    return problem.batch * problem.heads_kv * (high - low) * (problem.head_dim + problem.head_dim_v) * 2


@functools.lru_cache(maxsize=64)
def key_blocks(problem: Problem, rows: int, keys: int) -> Sequence[int]:
    """That tiles of so many rows see, at least one each: of all tiles of a head, or of MOST_TILES of them."""
    queries = rows // packed_heads(problem, rows)
    tiles = -(-problem.seqlen_q // queries)
    found = []
    for tile in range(0, tiles, -(-tiles // MOST_TILES)):
        first = tiles - 1 - tile  # of those that are left out, none is the one that sees the most
        last = min((first + 1) * queries, problem.seqlen_q) - 1
        (low, _), (_, high) = problem.key_range(first * queries), problem.key_range(last)
        found.append(max(1, -(-high // keys) - low // keys))
    return found
