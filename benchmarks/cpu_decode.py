"""How fast jit_flash reads K and V for a single query. Run: python benchmarks/cpu_decode.py

Claim: where K and V exceed 4 × the L3, at least 90% of the bandwidth of a loop that only reads, with as many threads,
over the same memory. For sq = 1, sk up to 128k, as many key heads as query heads or a quarter (GQA); the batch is
raised until K and V are large enough. The last row of a dtype, whose K and V take half of the L3, has no limit: there
the arithmetic counts.

Printed: the bandwidth of the loop; of one that reads 4 KiB of K and of V in turn, as the kernel does, and of jit_flash
what they reach of it, round by round: bytes of K and V over time. Medians and quartiles.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import cpu_bounds
from cpu_bounds import Kernel, Spread, Table, in_turn

from attnbench.problem import ITEM_BYTES, Dtype, Problem

if TYPE_CHECKING:
    from torch import Tensor

HEADS = ((1, 1), (8, 8), (32, 8))
"""Of queries, of keys."""
SEQLENS_K = (8 << 10, 128 << 10)
LIMIT = 0.9
MOST_BYTES = 1536 << 20
"""What K and V may take; where 4 × the L3 is more, the row is without a limit."""
READ_BYTES = 128 << 20
"""The loop reads as much at least, in as many passes: several milliseconds at 20 GB/s."""
BLOCK_BYTES = 4 << 10
"""Of K or V: 8 keys of 128 in fp32."""


def kv_bytes(problem: Problem) -> int:
    elements = math.prod(problem.k_shape) + math.prod(problem.v_shape)
    return elements * ITEM_BYTES[problem.dtype]


def problems(dtype: Dtype, l3_bytes: int) -> Iterator[Problem]:
    """Those of the claim, then the one that the L3 holds."""
    for heads_q, heads_kv in HEADS:
        for seqlen_k in SEQLENS_K:
            one = Problem(seqlen_q=1, seqlen_k=seqlen_k, heads_q=heads_q, heads_kv=heads_kv, dtype=dtype)
            batch = min(4 * l3_bytes // kv_bytes(one) + 1, MOST_BYTES // kv_bytes(one))
            yield Problem(batch=batch, seqlen_q=1, seqlen_k=seqlen_k, heads_q=heads_q, heads_kv=heads_kv, dtype=dtype)
    key_bytes = kv_bytes(Problem(seqlen_q=1, seqlen_k=1, heads_q=8, dtype=dtype))
    yield Problem(seqlen_q=1, seqlen_k=l3_bytes // 2 // key_bytes, heads_q=8, dtype=dtype)


def tensors(problem: Problem, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, and K and V one after the other at the start of `memory`."""
    import torch

    from attnbench.reference import torch_dtype

    dtype = torch_dtype(problem)
    k_bytes, all_bytes = math.prod(problem.k_shape) * ITEM_BYTES[problem.dtype], kv_bytes(problem)
    k, v = memory[:k_bytes].view(dtype), memory[k_bytes:all_bytes].view(dtype)
    some = torch.randn(k.numel() // problem.batch // problem.heads_kv, generator=torch.Generator().manual_seed(0))
    for tensor in (k, v):
        tensor.view(-1, some.numel()).copy_(some)  # each head the same: drawing all would take longer than measuring
    return torch.randn(problem.q_shape).to(dtype), k.view(problem.k_shape), v.view(problem.v_shape)


def main() -> int:
    options = cpu_bounds.parser(__doc__, rounds=9).parse_args()

    import torch

    from attnbench.devices.cpu import last_level_cache_bytes, total_cache_bytes

    report = cpu_bounds.Report()
    l3_bytes = total_cache_bytes(3) or last_level_cache_bytes()
    memory = torch.empty(MOST_BYTES, dtype=torch.uint8)
    table = Table("dtype", "Batch", "Heads", "sk", "K and V, MiB", "× L3", "Loop GB/s", "In turn", "jit_flash")
    for dtype in options.dtype:
        for problem in problems(dtype, l3_bytes):
            size = kv_bytes(problem)
            kernel = Kernel(problem, report.threads, tensors(problem, memory))

            def kernel_gbps(kernel: Kernel = kernel, size: int = size) -> float:
                return size / kernel.call_us() / 1e3

            read = partial(cpu_bounds.read_gbps, memory[:size], report.threads, -(-READ_BYTES // size))
            loop, turns, ours = in_turn(options.rounds, read, partial(read, block=BLOCK_BYTES), kernel_gbps)
            share = Spread.of_ratios(ours, loop)
            table.add(
                dtype,
                problem.batch,
                f"{problem.heads_q}x{problem.heads_kv}",
                problem.seqlen_k,
                f"{size / 2**20:.0f}",
                f"{size / l3_bytes:.1f}",
                Spread.of(loop).text("{:.1f}"),
                Spread.of_ratios(turns, loop).text("{:.0%}"),
                share.text("{:.0%}"),
                value=share.median,
                at_least=LIMIT if size > 4 * l3_bytes else None,
            )
    report.show(table)
    return report.exit_code()


if __name__ == "__main__":
    sys.exit(main())
