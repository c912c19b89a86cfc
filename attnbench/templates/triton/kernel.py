"""softmax(scale · Q Kᵀ) V by tiles of queries and keys, the softmax rescaled from tile to tile (online softmax).

q and out are (batch, heads_q, seqlen_q, …), k and v (batch, heads_kv, seqlen_k, …), all contiguous.
"""

import triton
import triton.language as tl


def launch_options(problem):
    """Tile sizes and what else the kernel is specialised for: tiles shrink as head_dim grows."""
    dims = [max(16, triton.next_power_of_2(dim)) for dim in (problem.head_dim, problem.head_dim_v)]
    small = max(dims) > 128
    return {
        "CAUSAL": problem.causal,
        "ROWS": 32 if small else 64,
        "COLUMNS": 32 if small else 64,
        "DIM": dims[0],
        "DIM_V": dims[1],
        "num_warps": 4,
    }


@triton.jit
def attention(
    q, k, v, out, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v, scale,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    head_kv = head // heads_q * heads_kv + head % heads_q // (heads_q // heads_kv)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dims, dims_v = tl.arange(0, DIM), tl.arange(0, DIM_V)

    query_places = (head * seqlen_q + rows[:, None]) * head_dim + dims[None, :]
    query = tl.load(q + query_places, mask=(rows[:, None] < seqlen_q) & (dims[None, :] < head_dim), other=0.0)
    largest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, DIM_V], tl.float32)

    last = seqlen_k
    if CAUSAL:  # aligned bottom-right: the last query sees every key
        last = tl.minimum(seqlen_k, tl.maximum(0, seqlen_k - seqlen_q + (tl.program_id(0) + 1) * ROWS))
    for start in range(0, last, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        there = columns < seqlen_k
        key_places = (head_kv * seqlen_k + columns[None, :]) * head_dim + dims[:, None]
        key = tl.load(k + key_places, mask=there[None, :] & (dims[:, None] < head_dim), other=0.0)
        score = tl.dot(query, key) * scale
        seen = there[None, :] & (rows[:, None] < seqlen_q)
        if CAUSAL:
            seen = seen & (columns[None, :] <= rows[:, None] + seqlen_k - seqlen_q)
        score = tl.where(seen, score, -float("inf"))
        before = largest
        largest = tl.maximum(before, tl.max(score, 1))
        # Where nothing was seen yet, both are -inf, whose difference is no number.
        reached = tl.where(largest == -float("inf"), 0.0, largest)
        shrink = tl.exp(before - reached)
        weight = tl.exp(score - reached[:, None])
        total = total * shrink + tl.sum(weight, 1)
        value_places = (head_kv * seqlen_k + columns[:, None]) * head_dim_v + dims_v[None, :]
        value = tl.load(v + value_places, mask=there[:, None] & (dims_v[None, :] < head_dim_v), other=0.0)
        weighted = weighted * shrink[:, None] + tl.dot(weight.to(value.dtype), value)

    # A query that sees no key gives zeros.
    result = tl.where(total[:, None] > 0, weighted / tl.where(total > 0, total, 1.0)[:, None], 0.0)
    out_places = (head * seqlen_q + rows[:, None]) * head_dim_v + dims_v[None, :]
    mask = (rows[:, None] < seqlen_q) & (dims_v[None, :] < head_dim_v)
    tl.store(out + out_places, result.to(out.dtype.element_ty), mask=mask)
