"""How jit_flash's time, memory and speed grow with the problem and the threads. Run: python benchmarks/cpu_scaling.py

Three claims, a table each.
- Time is linear in sq·sk to 32k × 32k. Printed: time per (query, key) pair, and how many multiply-adds in registers
  take as long; that count may grow by 5% at most from 1k × 1k on.
- Memory beyond inputs and output is at most 8 MB per thread. Printed: what the kernel asks for, and as a cross-check
  how much the process's resident memory grows at its peak, from before `prepare` until after a call, less the output.
- All threads are at least 0.93 × as much faster than one as they are with multiply-adds in registers, measured in the
  same rounds; also for one head and 128 queries. Printed: both speedups and their ratio.

Medians and quartiles over rounds.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import cpu_bounds
from cpu_bounds import Kernel, Report, Spread, Table, in_turn

from attnbench.problem import ITEM_BYTES, Dtype, Problem

SQUARES = (1 << 10, 4 << 10, 16 << 10, 32 << 10)
GROWTH_LIMIT = 1.05
BYTES_LIMIT = 8e6
SPLIT = Problem(seqlen_q=128, seqlen_k=8192, dtype="fp32")
MEMORY = (
    *(Problem(seqlen_q=size, seqlen_k=size, dtype="fp32") for size in SQUARES),
    Problem(seqlen_q=2048, seqlen_k=8192, heads_q=32, dtype="fp32"),
    Problem(seqlen_q=2048, seqlen_k=8192, head_dim=256, dtype="fp32"),
    SPLIT,
    Problem(seqlen_q=1, seqlen_k=128 << 10, heads_q=32, heads_kv=8, dtype="fp32"),
)
MEASURED_PAIRS = 2048 * 8192 * 32
"""Resident memory is measured by running the problem once, up to this size."""
THREADS = ((2048, 2048), (128, 1024), (128, 8192))
THREADS_LIMIT = 0.93


def linear(dtype: Dtype, rounds: int, report: Report) -> Table:
    table = Table("dtype", "sq = sk", "ps a pair", "FMAs a pair", "Growth", form="{:.2f}")
    kernels = [Kernel(Problem(seqlen_q=size, seqlen_k=size, dtype=dtype), report.threads) for size in SQUARES]
    samples: list[Callable[[], float]] = []
    for kernel in kernels:
        # A hundredth of a call of seconds says too little of the machine's speed meanwhile.
        moment_us = max(cpu_bounds.MOMENT_US, kernel.usual_us / 10)
        samples += [partial(cpu_bounds.fp32_gflops, report.threads, moment_us), kernel.gflops]
    rates = in_turn(rounds, *samples)
    # FLOP/s over FLOPs a pair are pairs a second.
    flops_a_pair = [kernel.problem.flops_gemm / kernel.problem.visible_pairs for kernel in kernels]
    fmas = [
        [peak / rate * flops / 2 for peak, rate in zip(peaks, ours)]
        for peaks, ours, flops in zip(rates[::2], rates[1::2], flops_a_pair)
    ]
    for size, ours, own_fmas, flops in zip(SQUARES, rates[1::2], fmas, flops_a_pair):
        growth = Spread.of_ratios(own_fmas, fmas[0])
        table.add(
            dtype,
            size,
            Spread.of([flops / rate * 1e3 for rate in ours]).text("{:.0f}"),
            Spread.of(own_fmas).text("{:.0f}"),
            growth.text("{:.2f}"),
            value=growth.median,
            at_most=None if size == SQUARES[0] else GROWTH_LIMIT,
        )
    return table


def memory(report: Report) -> Table:
    table = Table("Problem", "Threads", "Asked for, MB", "MB a thread", "Resident, MB", form="{:.1f} MB a thread")
    for problem in MEMORY:
        threads = cpu_bounds.threads_used(problem)
        asked = cpu_bounds.workspace_bytes(problem) / threads
        resident = resident_growth_bytes(problem, report.threads) if pairs(problem) <= MEASURED_PAIRS else None
        table.add(
            problem.case_id,
            threads,
            f"{asked * threads / 1e6:.2f}",
            f"{asked / 1e6:.2f}",
            "" if resident is None else f"{resident / 1e6:.2f}",
            value=max(asked, (resident or 0.0) / threads) / 1e6,
            at_most=BYTES_LIMIT / 1e6,
        )
    return table


def pairs(problem: Problem) -> int:
    return problem.batch * problem.heads_q * problem.visible_pairs


def resident_growth_bytes(problem: Problem, threads: int) -> int | None:
    """The peak over what was resident before; None where the system does not tell."""
    from attnbench.reference import make_inputs

    inputs = make_inputs(problem, seed=0)
    with suppress(AttributeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before and is still resident would be taken again unseen
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
        before = status_bytes("VmRSS")
        Kernel(problem, threads, (inputs.q, inputs.k, inputs.v))
        out_bytes = math.prod(problem.out_shape) * ITEM_BYTES[problem.dtype]
        return status_bytes("VmHWM") - before - out_bytes
    return None


def status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def threads(dtype: Dtype, rounds: int, report: Report) -> Table:
    table = Table("dtype", "sq", "sk", "Threads", "FMA speedup", "jit_flash speedup", "Ratio", form="{:.2f}")
    if report.threads == 1:
        return table
    for seqlen_q, seqlen_k in THREADS:
        problem = Problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, dtype=dtype)
        samples: list[Callable[[], float]] = []
        for count in (1, report.threads):
            samples += [partial(cpu_bounds.fp32_gflops, count), Kernel(problem, count).gflops]
        peak, ours, peak_all, ours_all = in_turn(rounds, *samples)
        bounds, speedups = ([b / a for a, b in zip(*both)] for both in ((peak, peak_all), (ours, ours_all)))
        ratio = Spread.of_ratios(speedups, bounds)
        table.add(
            dtype,
            seqlen_q,
            seqlen_k,
            report.threads,
            Spread.of(bounds).text("{:.2f}"),
            Spread.of(speedups).text("{:.2f}"),
            ratio.text("{:.2f}"),
            value=ratio.median,
            at_least=THREADS_LIMIT,
        )
    return table


def main() -> int:
    parser = cpu_bounds.parser(__doc__, rounds=15, dtypes=["fp32"])
    parser.add_argument("--only", choices=("linear", "memory", "threads"), help="one table; default: all")
    options = parser.parse_args()
    report = Report()
    if options.only in (None, "memory"):
        report.show(memory(report), "Memory beyond inputs and output")
    for dtype in options.dtype:
        if options.only in (None, "threads"):
            report.show(threads(dtype, options.rounds, report), f"From 1 thread to {report.threads}")
        if options.only in (None, "linear"):
            # A round of it takes seconds.
            report.show(linear(dtype, -(-options.rounds // 3), report), "Time per (query, key) pair")
    return report.exit_code()


if __name__ == "__main__":
    sys.exit(main())
