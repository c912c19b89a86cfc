"""Times by graph replay beside ncu's of the same kernels. Run: python benchmarks/cuda_timing.py

Claim: for calls of 10 µs and more both agree within 3%. ncu takes a kernel's own duration (gpu__time_duration), with
clocks and caches left as they are, of calls in a process of its own; a graph's time holds the step from one kernel to
the next as well, which is why shorter calls have no limit.

Printed: of each call the kernels it launches, the median of both, and their ratio. It needs a GPU, ncu on PATH or named
by --ncu, and the right to read the GPU's counters.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cpu_bounds
from cpu_bounds import Table

if TYPE_CHECKING:
    from torch import Tensor

LEAST_US = 10.0
LIMIT = 0.03
WARM_UP, CALLS, TURN, PAUSE_S = 200, 30, 6, 0.01
"""ncu looks at the calls after the warm-up, which has brought the clocks up."""
METRIC, RANGE = "gpu__time_duration.sum", "timed"
TO_US = {"nsecond": 1e-3, "ns": 1e-3, "usecond": 1.0, "us": 1.0, "msecond": 1e3, "ms": 1e3, "second": 1e6, "s": 1e6}
KERNELS = ("add_16mib", "add_256mib", "softmax", "mm_2048", "mm_8192", "flash_2048", "flash_causal_4096")


def call_of(name: str) -> Callable[[], Tensor]:
    """One of KERNELS, its tensors allocated."""
    import torch

    kind, _, size = name.rpartition("_")
    if kind == "add":
        x = torch.ones(int(size.removesuffix("mib")) << 18, device="cuda")
        out = torch.empty_like(x)
        return lambda: torch.add(x, 1.0, out=out)
    if name == "softmax":
        scores = torch.randn(8192, 8192, device="cuda")
        return lambda: torch.softmax(scores, -1)
    if kind == "mm":
        a, b, c = (torch.randn(int(size), int(size), dtype=torch.bfloat16, device="cuda") for _ in range(3))
        return lambda: torch.mm(a, b, out=c)
    from attnbench.problem import Problem
    from attnbench_plugins.sdpa_flash import attnbench_backends

    problem = Problem(seqlen_q=int(size), seqlen_k=int(size), heads_q=16, dtype="bf16", causal=kind == "flash_causal")
    shapes = (problem.q_shape, problem.k_shape, problem.v_shape)
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes)
    (flash,) = attnbench_backends()
    return flash.prepare(problem, q, k, v)


def profiled(name: str) -> None:
    """What runs below ncu: the calls, in a range."""
    import torch

    call = call_of(name)
    for _ in range(WARM_UP):
        call()
    torch.cuda.synchronize()
    torch.cuda.nvtx.range_push(RANGE)
    for _ in range(CALLS):
        call()
    torch.cuda.synchronize()
    torch.cuda.nvtx.range_pop()


@dataclass(frozen=True)
class Profile:
    """What ncu says of a call."""

    call_us: float
    kernels: int


def parse(text: str) -> Profile:
    """Of ncu's CSV: the durations of all kernels, in the order launched. Raises ValueError where it is none."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    durations = [
        float(row["Metric Value"].replace(",", "")) * TO_US[row["Metric Unit"]]
        for row in csv.DictReader(io.StringIO("\n".join(lines)))
        if row["Metric Name"] == METRIC
    ]
    kernels, rest = divmod(len(durations), CALLS)
    if not kernels or rest:
        raise ValueError(f"ncu tells of {len(durations)} kernels in {CALLS} calls")
    calls = [sum(durations[first : first + kernels]) for first in range(0, len(durations), kernels)]
    return Profile(statistics.median(calls), kernels)


def profile(ncu: str, name: str) -> Profile:
    """Raises ValueError with what ncu said."""
    how = ("--csv", "--metrics", METRIC, "--clock-control", "none", "--cache-control", "none")
    command = [ncu, *how, "--nvtx", "--nvtx-include", f"{RANGE}/", sys.executable, __file__, "--profiled", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(f"{ncu} cannot be started: {error.strerror}") from error
    try:
        return parse(done.stdout)
    except (ValueError, KeyError) as error:
        said = "\n".join([*done.stdout.splitlines()[-5:], *done.stderr.splitlines()[-5:]])
        raise ValueError(f"{error}\n{said}") from error


def graph_us(name: str) -> float:
    """The median of as many turns of a few calls as calls are profiled, with a pause before each.

    ncu, too, has the GPU idle between kernels: without, a GPU at its power limit would run at other clocks. A call that
    is alone after a pause would hold what waking up takes.
    """
    from attnbench.devices.cuda import CudaDevice

    device, call = CudaDevice(), call_of(name)
    device.time_calls(call, WARM_UP, cold=False)
    times = []
    for _ in range(CALLS):
        time.sleep(PAUSE_S)
        timing = device.time_calls(call, TURN, cold=False)
        if timing.fallback:
            raise ValueError(timing.fallback)
        times += timing.times_us
    device.forget(call)
    return statistics.median(times)


def table_of(found: Iterable[tuple[str, float, Profile]]) -> Table:
    """A row for each (name, µs by graph, what ncu says)."""
    table = Table("Call", "Kernels", "ncu, µs", "Graph, µs", "Graph / ncu", form="{:.2f}")
    for name, graph, ncu in found:
        ratio = graph / ncu.call_us
        cells = (name, ncu.kernels, f"{ncu.call_us:.2f}", f"{graph:.2f}", f"{ratio:.3f}")
        away = max(ratio, 1 / ratio)
        table.add(*cells, value=away, at_most=1 + LIMIT if ncu.call_us >= LEAST_US else None)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", type=cpu_bounds.names(KERNELS), default=KERNELS, help="default: all")
    parser.add_argument("--ncu", default="ncu", help="default: %(default)s")
    parser.add_argument("--profiled", choices=KERNELS, help="only make the calls that ncu looks at")
    options = parser.parse_args()
    if options.profiled:
        profiled(options.profiled)
        return 0

    from attnbench.devices import device

    if reason := device("cuda").unavailable():
        print(reason, file=sys.stderr)
        return 2
    print(device("cuda").info().name)
    try:
        found = [(name, graph_us(name), profile(options.ncu, name)) for name in options.kernels]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    table = table_of(found)
    print(f"\n{table}\n\nlimits missed: {table.missed}")
    return 1 if table.missed else 0


if __name__ == "__main__":
    sys.exit(main())
