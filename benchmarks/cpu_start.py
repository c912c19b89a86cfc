"""What jit_flash costs beside its arithmetic. Run: python benchmarks/cpu_start.py

Claims, a row each:
- the first start, which compiles into an empty cache, takes at most 15 s;
- a later start, from the cache, at most 50 ms. A start is `prepare` and the first call in a fresh process that has
  imported torch and the plugin;
- a call of one query and one key takes at most 10 µs, Python included;
- after a call each thread of the pool burns at most 50 µs before it sleeps: the CPU time of the process while it sleeps
  for 5 ms, less that of a sleep without a call before, over the threads that helped.

Printed: medians and quartiles; the first start is measured once.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

import cpu_bounds
from cpu_bounds import Kernel, Spread, Table

from attnbench.problem import Problem

ONE = Problem(seqlen_q=1, seqlen_k=1, dtype="fp32")
SHARED = Problem(seqlen_q=512, seqlen_k=2048, dtype="fp32")
CALLS = 1000
SLEEP_S = 0.005
FIRST_LIMIT_S, LATER_LIMIT_MS, CALL_LIMIT_US, SPIN_LIMIT_US = 15.0, 50.0, 10.0, 50.0


def start_s() -> float:
    """Of this process, which must not have started jit_flash before."""
    import torch

    from attnbench_plugins.jit_flash.cpu import JitFlashCpu

    q, k, v = (torch.randn(shape) for shape in (ONE.q_shape, ONE.k_shape, ONE.v_shape))
    backend = JitFlashCpu()
    start = time.perf_counter()
    backend.prepare(ONE, q, k, v)()
    return time.perf_counter() - start


def start_elsewhere_s(cache_dir: str) -> float:
    command = [sys.executable, __file__, "--start"]
    environment = {**os.environ, "ATTNBENCH_CACHE_DIR": cache_dir}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


def call_us(kernel: Kernel) -> float:
    call = kernel.call
    start = time.perf_counter_ns()
    for _ in range(CALLS):
        call()
    return (time.perf_counter_ns() - start) / 1e3 / CALLS


def sleep_cpu_us() -> float:
    """The CPU time that the whole process uses while this thread sleeps."""
    start = time.process_time_ns()
    time.sleep(SLEEP_S)
    return (time.process_time_ns() - start) / 1e3


def spin_us(kernel: Kernel, helpers: int) -> float:
    """The CPU time that each helper uses after a call."""
    alone = sleep_cpu_us()
    kernel.call()
    return (sleep_cpu_us() - alone) / helpers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=cpu_bounds.positive, default=7, help="from the cache; default: %(default)s")
    parser.add_argument(
        "--start", action="store_true", help="only print the seconds that a start takes in this process"
    )
    options = parser.parse_args()
    if options.start:
        print(start_s())
        return 0

    report = cpu_bounds.Report()
    table = Table("What", "Measured", form="{:g}")
    with tempfile.TemporaryDirectory() as folder:
        cache_dir = os.path.join(folder, "cache")
        first = start_elsewhere_s(cache_dir)
        table.add("first start, s", f"{first:.1f}", value=first, at_most=FIRST_LIMIT_S)
        later = Spread.of([1e3 * start_elsewhere_s(cache_dir) for _ in range(options.starts)])
        table.add("later start, ms", later.text("{:.1f}"), value=later.median, at_most=LATER_LIMIT_MS)
    kernel = Kernel(ONE, report.threads)
    call = Spread.of([call_us(kernel) for _ in range(20)])
    table.add("a call at sq = sk = 1, µs", call.text("{:.2f}"), value=call.median, at_most=CALL_LIMIT_US)
    helpers = cpu_bounds.threads_used(SHARED) - 1
    if helpers:
        kernel = Kernel(SHARED, report.threads)
        spin = Spread.of([spin_us(kernel, helpers) for _ in range(100)])
        table.add("CPU after a call, µs a thread", spin.text("{:.0f}"), value=spin.median, at_most=SPIN_LIMIT_US)
    report.show(table)
    return report.exit_code()


if __name__ == "__main__":
    sys.exit(main())
