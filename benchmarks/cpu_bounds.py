"""Owns what the benchmarks of jit_flash on a CPU share: the bounds of cpu_bounds.cpp, samples taken in turn, tables
whose rows are held against a limit. Knows none of the claims.

A shared machine's speed steps by half within seconds. So nothing is compared with what was measured earlier: kernel and
bound take turns every few milliseconds, each round gives a ratio, and the median of the ratios is judged.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from attnbench import contention, jit, settings
from attnbench.problem import DTYPES, Dtype, Problem
from attnbench.stats import percentile
from attnbench_plugins.jit_flash import cpu

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Path(__file__).with_name("cpu_bounds.cpp")
MOMENT_US = 5000.0
"""A sample takes about this long: starting and joining two threads, untimed, takes 0.14 ms more."""

Sample = Callable[[], float]
"""Measures for a moment and returns a rate."""


def parser(
    doc: str | None, *, rounds: int, dtypes: Sequence[Dtype] = ("fp32", "bf16", "fp16")
) -> argparse.ArgumentParser:
    """The options that all benchmarks have. `doc` is the script's docstring."""
    parsed = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parsed.add_argument("--dtype", type=names(DTYPES), default=list(dtypes), help=f"default: {','.join(dtypes)}")
    parsed.add_argument("--rounds", type=positive, default=rounds, help="default: %(default)s")
    return parsed


def positive(text: str) -> int:
    """A type for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """A type for argparse: a comma-separated list of some of `known`."""

    def parse(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return found

    return parse


# ---- bounds ----------------------------------------------------------------------------------------------------------


@functools.cache
def _library() -> ctypes.CDLL:
    """cpu_bounds.cpp, compiled for the instruction sets that jit_flash is compiled for."""
    from attnbench.devices.peaks import CPU_FLAGS, CPU_SOURCE

    forced = settings.cpu_isa()
    isa_flags = next((isa.flags for isa in cpu.ISAS if isa.name == forced), ())
    with cpu.as_file(cpu.files("attnbench_kernels") / "cpu") as kernels:
        folders = (f"-I{CPU_SOURCE.parent}", f"-I{kernels}")
        library = jit.compile(SOURCE, flags=(*CPU_FLAGS, *isa_flags, *folders)).load()
    for name in ("bound_fp32_gflops", "bound_bf16_gflops", "bound_micro_gflops", "bound_read_gbps"):
        getattr(library, name).restype = ctypes.c_double
    return library


def fp32_gflops(threads: int, us: float = MOMENT_US) -> float:
    """What multiply-adds in registers reach now."""
    return float(_library().bound_fp32_gflops(threads, ctypes.c_double(us)))


def bf16_gflops(threads: int, us: float = MOMENT_US) -> float:
    """What bf16 products in registers or tiles reach now; 0 where jit_flash computes bf16 in fp32."""
    return float(_library().bound_bf16_gflops(threads, ctypes.c_double(us)))


def micro_gflops(threads: int, *, bf16: bool, us: float = MOMENT_US) -> float:
    """What jit_flash's micro-kernel reaches now on packed operands in L1 and L2, at head size 128."""
    return float(_library().bound_micro_gflops(threads, ctypes.c_double(us), int(bf16)))


def read_gbps(memory: Tensor, threads: int, passes: int = 1, block: int = 0) -> float:
    """What reading a contiguous tensor from its start to its end, `passes` times, reaches now; or `block` bytes of its
    first half and as many of its second in turn."""
    address, size = ctypes.c_void_p(memory.data_ptr()), ctypes.c_int64(memory.nbytes)
    return float(_library().bound_read_gbps(address, size, ctypes.c_int64(passes), threads, ctypes.c_int64(block)))


# ---- the kernel ------------------------------------------------------------------------------------------------------


class Kernel:
    """jit_flash, ready to be called for a problem on `threads` threads."""

    def __init__(self, problem: Problem, threads: int, tensors: Sequence[Tensor] = ()) -> None:
        """`tensors` are q, k and v; left out, they are drawn."""
        import torch

        from attnbench.reference import make_inputs

        if not tensors:
            inputs = make_inputs(problem, seed=0)
            tensors = (inputs.q, inputs.k, inputs.v)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            self.call = cpu.JitFlashCpu().prepare(problem, *tensors)
        finally:
            torch.set_num_threads(before)
        self.problem = problem
        self.call()  # memory is mapped, threads are started
        start = time.perf_counter_ns()
        self.call()
        self.usual_us = (time.perf_counter_ns() - start) / 1e3

    def call_us(self) -> float:
        """The mean time of a call, over as many as take MOMENT_US, and at least one."""
        call, clock, calls = self.call, time.perf_counter_ns, 0
        if self.usual_us < MOMENT_US:
            call()  # the pool's threads sleep after another sample; a call beside others finds them awake
        start = clock()
        while True:
            call()
            calls += 1
            elapsed_us = (clock() - start) / 1e3
            if elapsed_us >= MOMENT_US:
                return elapsed_us / calls

    def gflops(self) -> float:
        """Of the two products alone."""
        return self.problem.flops_gemm / self.call_us() / 1e3


def isa() -> str:
    """The instruction sets that jit_flash uses."""
    return str(cpu._library().flash_attention_isa().decode())


def workspace_bytes(problem: Problem) -> int:
    """What jit_flash allocates beyond inputs and output."""
    return int(cpu._library().flash_attention_workspace(ctypes.byref(cpu._arguments(problem, 0))))


def threads_used(problem: Problem) -> int:
    """The threads that share the work, of those that torch uses."""
    units: int = cpu.JitFlashCpu().parallel_units(problem)
    return units


def in_turn(rounds: int, *samples: Sample) -> list[list[float]]:
    """Of each sample its rate in each round. A round goes there and back, so that a steady drift falls on all alike."""
    rates: list[list[float]] = [[] for _ in samples]
    for _ in range(rounds):
        there = [sample() for sample in samples]
        back = [sample() for sample in reversed(samples)][::-1]
        for index, pair in enumerate(zip(there, back)):
            rates[index].append(sum(pair) / 2)
    return rates


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of what the rounds gave."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(percentile(values, 50), percentile(values, 25), percentile(values, 75))

    @classmethod
    def of_ratios(cls, above: Sequence[float], below: Sequence[float]) -> Spread:
        """Round by round."""
        return cls.of([a / b for a, b in zip(above, below)])

    def text(self, form: str) -> str:
        """As in `87% (85% to 88%)`; `form` is a format of one number, such as `{:.0%}`."""
        return f"{form.format(self.median)} ({form.format(self.low)} to {form.format(self.high)})"


# ---- tables ----------------------------------------------------------------------------------------------------------


class Table:
    """Rows with a limit and whether it is kept; a row without one is there to be read."""

    def __init__(self, *headers: str, form: str = "{:.0%}") -> None:
        """`form` is the format of limits."""
        self.headers, self.form = headers, form
        self.rows: list[list[object]] = []
        self.missed = 0

    def add(
        self, *cells: object, value: float = 0.0, at_least: float | None = None, at_most: float | None = None
    ) -> None:
        """A row whose `value`, shown in one of its cells, has one limit at most."""
        limit, verdict = "", ""
        if at_least is not None or at_most is not None:
            kept = value >= at_least if at_least is not None else value <= (at_most or 0.0)
            sign, bound = ("≥", at_least) if at_least is not None else ("≤", at_most)
            limit, verdict = f"{sign} {self.form.format(bound)}", "ok" if kept else "MISSED"
            self.missed += not kept
        self.rows.append([*cells, limit, verdict])

    def __str__(self) -> str:
        from tabulate import tabulate

        headers = [*self.headers, "Limit", "Verdict"]
        return str(tabulate(self.rows, headers, tablefmt="github", disable_numparse=True))


class Report:
    """Prints what the figures are of, the tables, and at the end what became of the limits."""

    def __init__(self) -> None:
        import torch

        from attnbench.devices.cpu import cpu_name

        self.threads = torch.get_num_threads()
        self.missed = 0
        self._before = contention.sample()
        print(f"{cpu_name()}, {isa()}, torch uses {self.threads} threads")

    def show(self, table: Table, title: str = "") -> None:
        self.missed += table.missed
        print(f"\n{title}\n\n{table}" if title else f"\n{table}", flush=True)

    def exit_code(self) -> int:
        """1 where a limit is missed."""
        after = contention.sample()
        if self._before and after:
            share = contention.between(self._before, after)
            print(f"\nprocessors taken meanwhile: {share.others:.0%} by other programs, {share.steal:.0%} by the host")
        print(f"limits missed: {self.missed}")
        return 1 if self.missed else 0
