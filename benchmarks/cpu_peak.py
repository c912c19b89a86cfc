"""How much of the CPU's peak jit_flash reaches. Run: python benchmarks/cpu_peak.py

Claim: from 512×2048 up, at least 85% of what fp32 multiply-adds in registers reach, and in bf16 at least 75% of what
AVX-512's bf16 dot products do; on one thread and on all. No limit is set for AMX, which multiplies so fast that the
softmax takes longer, and for what is computed in fp32, fp16 always and bf16 without either: that is a share of the fp32
peak.

Printed: the peak, and as shares of it, round by round, jit_flash (its two products alone, as if the softmax cost
nothing) and its micro-kernel on packed operands in L1 and L2, which bounds it. Medians and quartiles.
"""

from __future__ import annotations

import sys
from functools import partial

import cpu_bounds
from cpu_bounds import Kernel, Spread, Table, in_turn

from attnbench.problem import Problem

SHAPES = ("512x2048", "1024x4096", "2048x2048", "2048x8192")
FP32_LIMIT, BF16_LIMIT = 0.85, 0.75


def main() -> int:
    parser = cpu_bounds.parser(__doc__, rounds=25)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="seqlen_q x seqlen_k; default: %(default)s")
    parser.add_argument("--heads", type=cpu_bounds.positive, default=1, help="default: %(default)s")
    options = parser.parse_args()

    report = cpu_bounds.Report()
    table = Table("dtype", "sq", "sk", "Threads", "Peak GFLOP/s", "jit_flash", "Micro-kernel")
    for dtype in options.dtype:
        own = dtype == "bf16" and cpu_bounds.bf16_gflops(1) > 0
        peak = cpu_bounds.bf16_gflops if own else cpu_bounds.fp32_gflops
        limit = BF16_LIMIT if own and cpu_bounds.isa() == "avx512_bf16" else FP32_LIMIT if dtype == "fp32" else None
        for shape in options.shapes.split(","):
            seqlen_q, seqlen_k = map(int, shape.split("x"))
            problem = Problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads_q=options.heads, dtype=dtype)
            for threads in sorted({1, report.threads}):
                kernel = Kernel(problem, threads)
                micro = partial(cpu_bounds.micro_gflops, threads, bf16=own)
                peaks, ours, micros = in_turn(options.rounds, partial(peak, threads), kernel.gflops, micro)
                share = Spread.of_ratios(ours, peaks)
                table.add(
                    dtype,
                    seqlen_q,
                    seqlen_k,
                    threads,
                    Spread.of(peaks).text("{:.0f}"),
                    share.text("{:.0%}"),
                    Spread.of_ratios(micros, peaks).text("{:.0%}"),
                    value=share.median,
                    at_least=limit,
                )
    report.show(table)
    return report.exit_code()


if __name__ == "__main__":
    sys.exit(main())
