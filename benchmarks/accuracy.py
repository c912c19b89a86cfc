"""jit_flash's errors beside sdpa's, both against the float64 oracle. Run: python benchmarks/accuracy.py

With `--device cuda` on a GPU, beside sdpa_flash.

Claim: in the same dtype the largest error is at most 1.1 × sdpa's, and the root mean square at most 1.0 ×. The largest
error is that over all seeds, the square is averaged over all of them. It is held for attnbench's three kinds of inputs:
normal ones, some values 20 times as large, and logits so large that one key takes nearly all the weight. Ratios count
to the third decimal: where both round the exact result, all that differs is a tie here and there.

Printed: of each dtype and kind of inputs the median and the worst ratio over the problems; with --all every problem and
its errors. Nothing is timed, so a busy machine does not matter.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import statistics
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cpu_bounds
from cpu_bounds import Table

from attnbench.problem import DTYPES, Problem

if TYPE_CHECKING:
    from torch import Tensor

    from attnbench.backend import Backend

PROBLEMS = (
    Problem(seqlen_q=128, seqlen_k=1024),
    Problem(seqlen_q=512, seqlen_k=2048),
    Problem(seqlen_q=128, seqlen_k=8192),
    Problem(seqlen_q=512, seqlen_k=512, heads_q=4, heads_kv=2, head_dim=64, causal=True),
    Problem(seqlen_q=77, seqlen_k=333, heads_q=3, head_dim=80, head_dim_v=96),
    Problem(seqlen_q=1, seqlen_k=16384, heads_q=8, heads_kv=2),
)
"""Whole and broken tiles, split keys, a mask, one query."""
INPUTS = ("normal", "outliers", "large_logits")
LIMITS = {"max": 1.1, "RMS": 1.0}


@dataclass
class Errors:
    """Of one backend, pooled over seeds."""

    largest: float = 0.0
    squares: float = 0.0
    count: int = 0

    def add(self, output: Tensor, expected: Tensor) -> None:
        errors = (output.double() - expected).abs()
        if not errors.isfinite().all():  # a maximum may pass over NaN
            raise ValueError("an output is not finite")
        self.largest = max(self.largest, errors.max().item())
        self.squares += errors.square().sum().item()
        self.count += errors.numel()

    @property
    def rms(self) -> float:
        return math.sqrt(self.squares / self.count)


def backends_of(device: str) -> tuple[Backend, Backend]:
    """jit_flash, and the peer."""
    if device == "cpu":
        from attnbench_plugins.jit_flash.cpu import JitFlashCpu
        from attnbench_plugins.sdpa import Sdpa

        return JitFlashCpu(), Sdpa("cpu")
    from attnbench_plugins import sdpa_flash
    from attnbench_plugins.jit_flash.cuda import JitFlashCuda

    (flash,) = sdpa_flash.attnbench_backends()
    return JitFlashCuda(), flash


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--dtype", type=cpu_bounds.names(DTYPES), help="default: all that jit_flash takes there")
    parser.add_argument("--inputs", type=cpu_bounds.names(INPUTS), default=INPUTS, help="default: all")
    parser.add_argument("--seeds", type=cpu_bounds.positive, default=10, help="default: %(default)s")
    parser.add_argument("--all", action="store_true", help="print every problem as well")
    options = parser.parse_args()

    import torch

    from attnbench.reference import make_inputs, oracle

    report, dtypes, backends = cpu_bounds.Report(), DTYPES, backends_of(options.device)
    if options.device == "cuda":
        dtypes = tuple(dtype for dtype in DTYPES if dtype != "fp32")
    summary = Table("dtype", "Inputs", "Error", "Median ratio", "Worst ratio", "Worst at", form="{:.1f}")
    details = Table("Problem", "Inputs", "Error", "sdpa", "jit_flash", "Ratio", form="{:.1f}")
    for dtype, distribution in itertools.product(options.dtype or dtypes, options.inputs):
        ratios: dict[str, dict[str, float]] = {"max": {}, "RMS": {}}
        for problem in (dataclasses.replace(each, dtype=dtype) for each in PROBLEMS):
            if any(backend.unsupported(problem) for backend in backends):
                continue
            rows = torch.arange(problem.seqlen_q)
            ours, sdpa = pools = Errors(), Errors()
            for seed in range(options.seeds):
                inputs = make_inputs(problem, seed, distribution)
                expected = oracle(problem, inputs, rows)
                given = [tensor.to(options.device) for tensor in (inputs.q, inputs.k, inputs.v)]
                for backend, pool in zip(backends, pools):
                    pool.add(backend.prepare(problem, *given)().cpu(), expected)
            for name, own, peer in (("max", ours.largest, sdpa.largest), ("RMS", ours.rms, sdpa.rms)):
                ratio = ratios[name][problem.case_id] = round(own / peer, 3)
                cells = (problem.case_id, distribution, name, f"{peer:.3e}", f"{own:.3e}", f"{ratio:.3f}")
                details.add(*cells, value=ratio, at_most=LIMITS[name])
        for name, found in ratios.items():
            worst = max(found, key=found.__getitem__)
            cells = (
                dtype,
                distribution,
                name,
                f"{statistics.median(found.values()):.3f}",
                f"{found[worst]:.3f}",
                worst,
            )
            summary.add(*cells, value=found[worst], at_most=LIMITS[name])
    if options.all:
        print(f"\n{details}")
    report.show(summary, f"Errors against float64 over sdpa's, {options.seeds} seeds")
    return report.exit_code()


if __name__ == "__main__":
    sys.exit(main())
