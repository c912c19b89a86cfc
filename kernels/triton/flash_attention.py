"""Flash attention in Triton, forward: a program takes a tile of queries and goes over the blocks of keys that they see.

Tensors are contiguous. The query heads of a key head are one matrix of (rows, head_dim), one head after the other, so
that grouped heads need no code and a tile of decoding has the queries of several heads.

Softmax is online and in base 2: `most` is the greatest score so far, `total` the sum of 2^(score - most), and `acc` the
sum of those times v. Tiles have sizes that are powers of two: what lies beyond a tensor is read as zero, never written.
"""

import triton
import triton.language as tl


@triton.jit
def load(matrix, row, rows, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Those rows of a matrix of (rows, WIDTH), in COLUMNS columns."""
    column = tl.arange(0, COLUMNS)[None, :]
    there = row[:, None] < rows
    if WIDTH < COLUMNS:
        there = there & (column < WIDTH)
    return tl.load(matrix + row[:, None] * WIDTH + column, mask=there, other=0.0)


@triton.jit
def see(
    q, k, v, acc, most, total, seqlen_k, below, above, first, end, scale_log2,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """acc, most and total after keys `first` to `end` too. Both are multiples of KEYS, but for `end` where MASKED."""
    for block in range(first, end, KEYS):
        key = block + tl.arange(0, KEYS)
        keys = load(k, key, seqlen_k, HEAD_DIM, D)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale_log2
        if MASKED:
            seen = (key[None, :] > below[:, None]) & (key[None, :] < above[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        greater = tl.maximum(most, tl.max(scores, 1))
        shift = greater
        if MASKED:  # -inf less -inf, where a row has seen no key yet, would be NaN
            shift = tl.where(greater == float("-inf"), 0.0, greater)
        weights = tl.exp2(scores - shift[:, None])
        shrunk = tl.exp2(most - shift)
        values = load(v, key, seqlen_k, HEAD_DIM_V, E)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrunk[:, None], input_precision="ieee")
        total = total * shrunk + tl.sum(weights, 1)
        most = greater
    return acc, most, total


@triton.jit
def attend(
    q, k, v, out, lse, heads, rows, seqlen_q, seqlen_k, behind, ahead, scale_log2,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """softmax₂(scale_log2 · Q Kᵀ) V of q (heads, rows, HEAD_DIM), k (heads, seqlen_k, HEAD_DIM) and v (…, HEAD_DIM_V).

    A query at key position p sees the keys between p - behind and p + ahead, and gives zeros where there are none.
    SPLITS programs share the keys of a tile: out is (SPLITS, heads, rows, HEAD_DIM_V), and where there is more than one
    lse (SPLITS, heads, rows) gets the logarithm to base 2 of the sum of 2^score. D and E hold HEAD_DIM and HEAD_DIM_V.
    """
    tiles = tl.cdiv(rows, ROWS)
    split, head = tl.program_id(1), tl.program_id(0) // tiles
    tile = tiles - 1 - tl.program_id(0) % tiles  # under a causal mask the last have most to do, and so start first
    row = tile * ROWS + tl.arange(0, ROWS)
    position = tl.minimum(row, rows - 1) % seqlen_q + (seqlen_k - seqlen_q)
    below, above = position - behind, tl.minimum(position + ahead, seqlen_k)

    # Some row sees a key from `first` to `end`, and every row sees all from `whole` to `rest`.
    first = tl.maximum(tl.min(below, 0) + 1, 0) // KEYS * KEYS
    end = tl.max(above, 0)
    share = tl.cdiv(tl.cdiv(tl.maximum(end - first, 0), KEYS), SPLITS) * KEYS
    first += split * share
    end = tl.minimum(end, first + share)
    whole = tl.cdiv(tl.maximum(tl.max(below, 0) + 1, 0), KEYS) * KEYS
    whole = tl.minimum(tl.maximum(whole, first), end)
    rest = tl.maximum(tl.minimum(tl.min(above, 0) // KEYS * KEYS, end), whole)

    where, part = head.to(tl.int64), (split * heads + head).to(tl.int64)
    query = load(q + where * rows * HEAD_DIM, row, rows, HEAD_DIM, D)
    k += where * seqlen_k * HEAD_DIM
    v += where * seqlen_k * HEAD_DIM_V
    acc = tl.zeros((ROWS, E), tl.float32)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for phase in tl.static_range(3):
        start = first if phase == 0 else whole if phase == 1 else rest
        stop = whole if phase == 0 else rest if phase == 1 else end
        acc, most, total = see(
            query, k, v, acc, most, total, seqlen_k, below, above, start, stop, scale_log2,
            HEAD_DIM, HEAD_DIM_V, D, E, KEYS, phase != 1,
        )  # fmt: skip

    total = tl.where(total == 0.0, 1.0, total)
    place = out + part * rows * HEAD_DIM_V + row[:, None] * HEAD_DIM_V + tl.arange(0, E)[None, :]
    there = (row[:, None] < rows) & (tl.arange(0, E)[None, :] < HEAD_DIM_V)
    tl.store(place, (acc / total[:, None]).to(out.dtype.element_ty), mask=there)
    if SPLITS > 1:
        tl.store(lse + part * rows + row, most + tl.log2(total), mask=row < rows)


@triton.jit
def combine(parts, lse, out, rows, splits, HEAD_DIM_V: tl.constexpr, E: tl.constexpr, MOST_SPLITS: tl.constexpr):
    """out (rows, HEAD_DIM_V): the mean of parts (splits, rows, HEAD_DIM_V), weighted by 2^lse (splits, rows)."""
    row, split = tl.program_id(0), tl.arange(0, MOST_SPLITS)
    scores = tl.load(lse + split * rows + row, mask=split < splits, other=float("-inf"))
    most = tl.max(scores, 0)
    weights = tl.exp2(scores - tl.where(most == float("-inf"), 0.0, most))
    total = tl.sum(weights, 0)
    values = load(parts, split * rows + row, splits * rows, HEAD_DIM_V, E)
    mean = tl.sum(values * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    column = tl.arange(0, E)
    tl.store(out + row * HEAD_DIM_V + column, mean.to(out.dtype.element_ty), mask=column < HEAD_DIM_V)
