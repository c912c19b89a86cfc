"""Flash attention in TileLang, forward: a block takes a tile of queries and goes over the blocks of keys that they see.

The query heads of a key head are one matrix of (rows, head_dim), one head after the other. TileLang lays tiles out,
pipelines the copies, and on Hopper gives them to a warp group of their own and the products to wgmma.
"""
# Not `from __future__ import annotations`: TileLang reads the kernel's annotations.

from typing import Any, NamedTuple

import tilelang.language as T


class Tile(NamedTuple):
    """Queries and keys of a tile, buffers of keys, and threads of a block."""

    rows: int
    keys: int
    stages: int
    threads: int


def attention(
    heads: int, rows: int, seqlen_q: int, seqlen_k: int, head_dim: int, head_dim_v: int,
    behind: int, ahead: int, scale_log2: float, dtype: str, tile: Tile, splits: int,
) -> Any:  # fmt: skip
    """The function that computes out (splits, heads, rows, head_dim_v) of q, k and v (heads, …).

    A query at key position p sees the keys between p - behind and p + ahead, and gives zeros where there are none. With
    several splits out is fp32, and lse (splits, heads, rows) gets the logarithm to base 2 of the sum of 2^score.
    """
    ROWS, KEYS, stages, threads = tile
    shift = seqlen_k - seqlen_q
    masked = behind < seqlen_k or ahead < seqlen_q or seqlen_k % KEYS > 0
    wide = "float32"

    @T.prim_func
    def attend(
        q: T.Tensor((heads, rows, head_dim), dtype),
        k: T.Tensor((heads, seqlen_k, head_dim), dtype),
        v: T.Tensor((heads, seqlen_k, head_dim_v), dtype),
        out: T.Tensor((splits, heads, rows, head_dim_v), dtype if splits == 1 else wide),
        lse: T.Tensor((splits, heads, rows), wide),
    ):
        with T.Kernel(T.ceildiv(rows, ROWS), heads, splits, threads=threads) as (tile, head, split):
            query = T.alloc_shared((ROWS, head_dim), dtype)
            keys = T.alloc_shared((KEYS, head_dim), dtype)
            values = T.alloc_shared((KEYS, head_dim_v), dtype)
            scores = T.alloc_fragment((ROWS, KEYS), wide)
            weights = T.alloc_fragment((ROWS, KEYS), dtype)
            acc = T.alloc_fragment((ROWS, head_dim_v), wide)
            most = T.alloc_fragment((ROWS,), wide)
            before = T.alloc_fragment((ROWS,), wide)
            shrunk = T.alloc_fragment((ROWS,), wide)
            added = T.alloc_fragment((ROWS,), wide)
            total = T.alloc_fragment((ROWS,), wide)

            low = tile * ROWS
            high = T.min(low + ROWS, rows) - 1
            whole = low // seqlen_q == high // seqlen_q  # else it has the end of one head and the start of the next
            earliest = T.if_then_else(whole, low % seqlen_q, 0) + shift
            latest = T.if_then_else(whole, high % seqlen_q, seqlen_q - 1) + shift
            first = T.max(earliest - behind + 1, 0) // KEYS
            end = T.ceildiv(T.max(T.min(latest + ahead, seqlen_k), 0), KEYS)
            share = T.ceildiv(T.max(end - first, 0), splits)
            start = first + split * share
            count = T.max(T.min(share, end - start), 0)

            T.copy(q[head, low : low + ROWS, :], query)
            T.clear(acc)
            T.clear(total)
            T.fill(most, -T.infinity(wide))
            for index in T.Pipelined(count, num_stages=stages):
                block = (start + index) * KEYS
                T.copy(k[head, block : block + KEYS, :], keys)
                T.clear(scores)
                T.gemm(query, keys, scores, transpose_B=True, policy=T.GemmWarpPolicy.FullRow)
                if masked:
                    for i, j in T.Parallel(ROWS, KEYS):
                        position = (low + i) % seqlen_q + shift
                        key = block + j
                        seen = (key > position - behind) & (key < position + ahead) & (key < seqlen_k)
                        scores[i, j] = T.if_then_else(seen, scores[i, j], -T.infinity(wide))
                T.copy(most, before)
                T.reduce_max(scores, most, dim=1, clear=False)
                for i in T.Parallel(ROWS):
                    # A row that has seen no key yet: -inf less -inf would be NaN.
                    added[i] = T.if_then_else(most[i] == -T.infinity(wide), 0.0, most[i] * scale_log2)
                    shrunk[i] = T.exp2(before[i] * scale_log2 - added[i])
                for i, j in T.Parallel(ROWS, KEYS):
                    scores[i, j] = T.exp2(scores[i, j] * scale_log2 - added[i])
                T.reduce_sum(scores, added, dim=1)
                for i in T.Parallel(ROWS):
                    total[i] = total[i] * shrunk[i] + added[i]
                T.copy(scores, weights)
                for i, j in T.Parallel(ROWS, head_dim_v):
                    acc[i, j] *= shrunk[i]
                T.copy(v[head, block : block + KEYS, :], values)
                T.gemm(weights, values, acc, policy=T.GemmWarpPolicy.FullRow)
            for i, j in T.Parallel(ROWS, head_dim_v):
                acc[i, j] /= T.if_then_else(total[i] == 0.0, 1.0, total[i])
            T.copy(acc, out[split, head, low : low + ROWS, :])
            if splits > 1:
                for i in T.Parallel(ROWS):
                    if low + i < rows:
                        lse[split, head, low + i] = most[i] * scale_log2 + T.log2(total[i])

    return attend


def combination(rows: int, splits: int, head_dim_v: int, dtype: str) -> Any:
    """The function that computes out (rows, head_dim_v), the mean of parts (splits, rows, …) weighted by 2^lse."""
    wide = "float32"

    @T.prim_func
    def combine(
        parts: T.Tensor((splits, rows, head_dim_v), wide),
        lse: T.Tensor((splits, rows), wide),
        out: T.Tensor((rows, head_dim_v), dtype),
    ):
        with T.Kernel(rows, threads=128) as row:
            most = T.alloc_local((1,), wide)
            total = T.alloc_local((1,), wide)
            acc = T.alloc_fragment((head_dim_v,), wide)
            most[0] = -T.infinity(wide)
            total[0] = 0.0
            T.clear(acc)
            for split in T.serial(splits):
                most[0] = T.max(most[0], lse[split, row])
            if most[0] == -T.infinity(wide):
                most[0] = 0.0
            for split in T.serial(splits):
                total[0] += T.exp2(lse[split, row] - most[0])
                for j in T.Parallel(head_dim_v):
                    acc[j] += T.exp2(lse[split, row] - most[0]) * parts[split, row, j]
            for j in T.Parallel(head_dim_v):
                out[row, j] = acc[j] / T.if_then_else(total[0] == 0.0, 1.0, total[0])

    return combine
