"""How far attnbench's verdicts can be trusted on this machine, measured. Run: python tools/calibrate.py

A/A: one backend under two names is compared with itself; how often is it called different? The verdicts' level is 99%,
so 1 of 100 is nominal. A/B: a copy slowed by 3%, by a spin of that share of its own time, is compared with the
original; how often is it called slower? A comparison is one problem of an `attnbench run`, which holds several; each of
its blocks is taken by processes of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from pathlib import Path

from attnbench import store
from attnbench.result import Result, speedup

PLUGIN = """
import time

import torch
from attnbench import Backend, hookimpl
from torch.nn.functional import scaled_dot_product_attention


class Copy(Backend):
    device = "cpu"

    def __init__(self, name, slowed):
        self.name, self.slowed = name, slowed

    def prepare(self, problem, q, k, v):
        def call():
            return scaled_dot_product_attention(q, k, v, scale=problem.softmax_scale)

        if not self.slowed:
            return call
        clock, times = time.perf_counter_ns, []
        for _ in range(60):
            start = clock()
            call()
            times.append(clock() - start)
        spin = SLOWED * sorted(times)[30]

        def slow_call():
            out = call()
            until = clock() + spin
            while clock() < until:
                pass
            return out

        return slow_call


@hookimpl
def attnbench_backends():
    return [Copy("original", False), Copy("same", False), Copy("slowed", True)]
"""
HEAD_DIMS = tuple(range(32, 132, 5))
"""One problem each: the smaller they are the more of them fit into a run, and the more noise counts."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--same", type=int, default=200, help="A/A comparisons")
    options.add_argument("--slowed", type=int, default=50, help="A/B comparisons")
    options.add_argument("--by", type=float, default=0.03, help="share by which B is slowed")
    options.add_argument("--budget", type=float, default=10.0, help="seconds of timing for a problem")
    options.add_argument("--seqlens", default="256,1024", help="query and key length")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="calibrate-") as folder:
        install(Path(folder), chosen.by)
        for title, contender, wanted in (("A/A", "same", chosen.same), ("A/B", "slowed", chosen.slowed)):
            if wanted < 1:
                continue
            compare(Path(folder), title, contender, wanted, chosen.budget, chosen.seqlens)


def install(folder: Path, by: float) -> None:
    """A distribution with the backends to compare, found by PYTHONPATH alone."""
    (folder / "calibration_copies.py").write_text(PLUGIN.replace("SLOWED", repr(by)))
    info = folder / "calibration_copies-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: calibration-copies\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[attnbench.backends]\ncalibration_copies = calibration_copies\n")


def compare(folder: Path, title: str, contender: str, wanted: int, budget_s: float, seqlens: str) -> None:
    """Make as many comparisons as wanted, run by run, and tell how they ended."""
    seqlen_q, seqlen_k = seqlens.split(",")
    verdicts: Counter[str] = Counter()
    ratios: list[float] = []
    detectable: list[float] = []
    blocks: list[int] = []
    dropped = rounds = 0
    start_s = time.monotonic()
    while verdicts.total() < wanted:
        dims = HEAD_DIMS[: wanted - verdicts.total()]
        out = folder / f"{contender}-{verdicts.total()}"
        command = [sys.executable, "-m", "attnbench.cli", "run", "--device", "cpu", "--out", str(out)]
        command += ["--backends", f"original,{contender}", "--baseline", "original", "--budget", str(budget_s)]
        command += ["--seqlen-q", seqlen_q, "--seqlen-k", seqlen_k, "--head-dim", ",".join(map(str, dims))]
        command += ["--seed", str(verdicts.total())]
        done = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"a run failed:\n{textwrap.indent(done.stderr, '  ')}")
        found: dict[str, dict[str, Result]] = {}
        for result in store.load(out).results:
            found.setdefault(result.problem.case_id, {})[result.backend] = result
        for pair in found.values():
            base, other = pair["original"].measurement, pair[contender].measurement
            if base is None or other is None:
                sys.exit(f"a case did not pass: {[(r.status, r.reason) for r in pair.values()]}")
            ratio = speedup(base, other)
            verdicts[ratio.verdict] += 1
            ratios.append(ratio.value)
            detectable.append(ratio.detectable or 0.0)
            blocks.append(len(base.blocks))
            if base.conditions is not None:
                dropped += base.conditions.rounds_dropped
                rounds += base.conditions.rounds
        ratios.sort()
        detectable.sort()
        middle = len(ratios) // 2
        facts = {
            "comparisons": len(ratios),
            **{verdict: verdicts[verdict] for verdict in ("faster", "tie", "slower")},
            "ratio: median, least, most": [round(ratios[i], 4) for i in (middle, 0, -1)],
            "detectable: median, most": [round(detectable[i], 4) for i in (middle, -1)],
            "blocks: mean": round(sum(blocks) / len(blocks), 1),
            "rounds kept, dropped": [rounds, dropped],
            "seconds": round(time.monotonic() - start_s),
        }
        words = f"{title} ({contender} against original, budget {budget_s:g} s): {json.dumps(facts)}"
        print(f"so far, of {wanted}: {words}", file=sys.stderr, flush=True)  # an interrupt loses none of it
    print(words, flush=True)


if __name__ == "__main__":
    main()
