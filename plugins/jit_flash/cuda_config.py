"""Owns the configurations of kernels/cuda/flash_attention_sm90.cu: which there are, which is the fastest by a model.

Knows no driver and no tensor, so that all of it runs where there is no GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from attnbench.problem import Problem

SHARED_BYTES = 232_448
"""What a block may have on sm_90."""
CHUNK_BYTES, STATE_BYTES = 384, 128
"""Of a part: 8 columns of 16 rows, and what is known of 16 rows."""
CLUSTERS = (1, 2, 3, 4, 6, 8, 10, 12, 14, 15, 16)
"""Blocks of a cluster: the sizes that were timed. More than 8 the kernel has to ask for."""
MAX_PARTS = 32
"""Of a tile, that meet in memory."""
SHAPES = ((128, 176, 1), (128, 128, 1), (128, 64, 1), (64, 128, 1), (64, 64, 1), (64, 128, 2), (64, 64, 2))
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
    clustered: bool = True
    persistent: bool = False

    @property
    def threads(self) -> int:
        """Of a block: the consumers' warpgroups, and the producer's."""
        return 2 * self.rows * self.shared_rows + 128

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return self.parts if self.clustered else 1

    @property
    def meets_in_memory(self) -> bool:
        """Whether the parts of a tile do."""
        return self.parts > 1 and not self.clustered

    def columns(self, head_dim_v: int) -> int:
        """Of V, that a block works on."""
        return rounded(-(-head_dim_v // self.split_v))

    def part_bytes(self, head_dim_v: int) -> int:
        """Of what a block tells the others of its tile."""
        return self.rows // 16 * (self.columns(head_dim_v) // 8 * CHUNK_BYTES + STATE_BYTES)

    def shared_bytes(self, head_dim: int, head_dim_v: int) -> int | None:
        """What a block needs, as the kernel lays it out; None where that is more than it may have."""
        d, dv = rounded(head_dim), self.columns(head_dim_v)
        q, ring = self.rows * d * 2, self.stages * self.keys * (d + dv) * 2
        barriers = 8 * (4 + 4 * self.stages)
        merged = 128 * (dv // 2 + 4) * 4 if self.shared_rows > 1 else 0
        needed = q + ring + merged + barriers
        if self.cluster == 1:
            return needed if needed <= SHARED_BYTES else None
        chunks, parts = dv // 8, self.parts  # chunks of a warp's rows
        firsts = [self.rows // 16 * chunks * block // parts for block in range(parts + 1)]
        slice_chunks = -(-(self.rows // 16 * chunks) // parts)
        slice_warps = max(-(-end // chunks) - first // chunks for first, end in itertools.pairwise(firsts))
        slices = parts * (slice_chunks * CHUNK_BYTES + slice_warps * STATE_BYTES)
        if needed + slices <= SHARED_BYTES:
            return needed + slices if slices <= ring else None
        return needed if needed <= SHARED_BYTES and 2 * slices <= q + ring else None


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
    """Clusters that a launch has."""
    heads = packed_heads(problem, config.rows)
    tiles = -(-problem.seqlen_q // (config.rows // heads))
    return problem.batch * (problem.heads_q // heads) * tiles * config.split_v


def configs(problem: Problem, clusters: Mapping[int, int]) -> Iterator[Config]:
    """All that can run a problem and may be the fastest, where a device runs `clusters` at once, by their size."""
    boxes = rounded(problem.head_dim_v) // 64
    masked = problem.causal or problem.window is not None
    for (rows, keys, shared_rows), split_v in itertools.product(SHAPES, range(1, boxes + 1)):
        if boxes % split_v:
            continue
        if rows * shared_rows == 128 and keys > 64 and boxes // split_v > 2:  # more registers than there are
            continue
        one = Config(rows, keys, 0, split_v=split_v, shared_rows=shared_rows)
        blocks, tiles = -(-problem.seqlen_k // keys) // shared_rows, units(problem, one)
        for parts, clustered in itertools.chain(_clustered(blocks), _in_memory(blocks, tiles, clusters[1])):
            if keys > 128 and (parts > 1 or masked):  # slower than 128 there
                continue
            # Where masks make tiles unequal, blocks of one tile each were up to 11% faster than those that take more.
            persistent = parts == 1 and shared_rows == 1 and not masked and tiles > clusters[1]
            # More stages hide more latency, but where tiles are large and many two measured 4% faster than three.
            for stages in (2,) if rows == keys == 128 and parts == 1 else (4, 3, 2):
                config = dataclasses.replace(
                    one, stages=stages, parts=parts, clustered=clustered, persistent=persistent
                )
                if stages % shared_rows == 0 and config.shared_bytes(problem.head_dim, problem.head_dim_v) is not None:
                    yield config
                    break


def _clustered(blocks: int) -> Iterator[tuple[int, bool]]:
    """Numbers of parts that are a cluster, and one."""
    yield from ((parts, True) for parts in CLUSTERS if parts == 1 or parts <= blocks)


def _in_memory(blocks: int, tiles: int, processors: int) -> Iterator[tuple[int, bool]]:
    """Numbers of parts that meet in memory: as many as can run at once, or a power of two, as key blocks often are."""
    most = min(processors // tiles, blocks, MAX_PARTS)
    yield from ((parts, False) for parts in sorted({most, 1 << max(most, 1).bit_length() - 1}) if parts > 1)


def choose(problem: Problem, clusters: Mapping[int, int]) -> Config:
    """The fastest by `predicted_us`."""
    return min(configs(problem, clusters), key=lambda config: predicted_us(problem, config, clusters))


LAUNCH_US = 1.2
"""An empty kernel in a graph."""
CYCLES_A_US = 1750.0
START_CYCLES = 1450.0
"""Until the first key block can be asked for, and after the last for writing."""
LOAD_BYTES_A_CYCLE = 110.0
"""Of one SM."""
L2_BYTES_A_CYCLE = 5000.0
"""Of all SMs."""
MULTIPLY_ADDS_A_CYCLE = 2048 / 1.24
"""Of an SM's tensor cores; 1.24 is what they take beyond their rate."""
SOFTMAX_CYCLES_A_KEY = 3.0
"""Of 64 rows."""
BLOCK_CYCLES = 310.0
"""What a key block takes besides."""
CLUSTER_CYCLES, CLUSTER_CYCLES_A_PART, CLUSTER_BYTES_A_CYCLE = 160.0, 64.0, 8.6
"""For adding up in a cluster: once, for each part, and for what a block sends."""
MEMORY_CYCLES, MEMORY_CYCLES_A_PART, MEMORY_BYTES_A_CYCLE = 2000.0, 20.0, 10.0
"""The same in memory."""
LATER_WAVE = 0.88
"""Of the time of the first: it starts while the one before it ends."""


def predicted_us(problem: Problem, config: Config, clusters: Mapping[int, int]) -> float:
    """What a model expects of a configuration; infinite where not all that meet in memory can run at once."""
    d, dv = rounded(problem.head_dim), config.columns(problem.head_dim_v)
    launched, at_once = units(problem, config), max(clusters.get(config.cluster, 0), 0)
    if config.meets_in_memory:
        at_once //= config.parts
    if not at_once or (config.meets_in_memory and launched > at_once):
        return float("inf")
    waves = -(-launched // at_once)
    # A tile's keys: of one wave the longest tile counts, of several their mean.
    mean_keys = problem.visible_pairs / max(problem.visible_rows, 1)
    keys = mean_keys if waves > 1 else _most_keys(problem, config)
    blocks = max(1, math.ceil(math.ceil(keys / config.keys) / config.parts / config.shared_rows))
    running = min(launched, at_once) * config.parts
    products = config.rows * config.keys * (d + dv) / MULTIPLY_ADDS_A_CYCLE
    softmax = SOFTMAX_CYCLES_A_KEY * config.keys
    consumers = config.rows // 64 * config.shared_rows
    # One consumer's softmax waits for its products; two do theirs in turn.
    compute = products + softmax if consumers == 1 else max(products * config.shared_rows, 2 * softmax)
    compute += BLOCK_CYCLES
    load = config.keys * config.shared_rows * (d + dv) * 2 / min(LOAD_BYTES_A_CYCLE, L2_BYTES_A_CYCLE / running)
    cycles = START_CYCLES + compute + load + (blocks - 1) * max(compute, load)
    if config.parts > 1:
        once, a_part, rate = (
            (MEMORY_CYCLES, MEMORY_CYCLES_A_PART, MEMORY_BYTES_A_CYCLE)
            if config.meets_in_memory
            else (CLUSTER_CYCLES, CLUSTER_CYCLES_A_PART, CLUSTER_BYTES_A_CYCLE)
        )
        cycles += once + a_part * config.parts + config.part_bytes(problem.head_dim_v) / rate
    return LAUNCH_US + (1 + LATER_WAVE * (waves - 1)) * cycles / CYCLES_A_US


def _most_keys(problem: Problem, config: Config) -> float:
    """That any tile sees."""
    queries = config.rows // packed_heads(problem, config.rows)
    spans = []
    for first in range(0, problem.seqlen_q, queries):
        last = min(first + queries, problem.seqlen_q) - 1
        (low, _), (_, high) = problem.key_range(first), problem.key_range(last)
        spans.append(high - low)
    return max(1, *spans)
