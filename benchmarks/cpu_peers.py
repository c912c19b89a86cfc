"""jit_flash against the fastest other CPU attention, shape by shape. Run: python benchmarks/cpu_peers.py

Runs `attnbench run` with jit_flash and all peers that are available here (sdpa, gemm_ref, openvino, onnxruntime,
sdpa_upcast) over pto's 5×4 grid of lengths, with 1, 8 and 32 heads, causal and not; it takes hours, `--suite small`
minutes. `python benchmarks/cpu_peers.py RUN…` runs nothing and sums up runs that are there.

Claim: jit_flash's speedup over the fastest peer that passed is,

    fp32   in geometric mean at least 1.15, nowhere under 1.0
    bf16   in geometric mean at least 1.6, nowhere under 1.2
    fp16   in geometric mean at least 2.3 over peers other than sdpa_upcast and 1.05 over that, nowhere under 1.0

Printed: mean and minimum of each, how often which peer was the fastest, and the shapes below the limit. A shape that
jit_flash did not pass misses; one that no peer passed is left out.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpu_bounds import Table, names

from attnbench.problem import DTYPES
from attnbench.stats import geometric_mean

ATTNBENCH = (sys.executable, "-m", "attnbench.cli")
OURS = "jit_flash"
UPCAST = "sdpa_upcast"
NATIVE = ("sdpa", "gemm_ref", "openvino", "onnxruntime")
SUITES = {
    "pto": ("--heads", "1,8,32"),
    "small": ("--heads", "1,8", "--seqlen-q", "128,512", "--seqlen-k", "1k,2k"),
}
"""Options of `attnbench run`; what is not given is pto's."""


@dataclass(frozen=True)
class Claim:
    dtype: str
    peers: tuple[str, ...]
    mean: float
    minimum: float


CLAIMS = (
    Claim("fp32", (*NATIVE, UPCAST), 1.15, 1.0),
    Claim("bf16", (*NATIVE, UPCAST), 1.6, 1.2),
    Claim("fp16", NATIVE, 2.3, 1.0),
    Claim("fp16", (UPCAST,), 1.05, 1.0),
)


@dataclass(frozen=True)
class Comparison:
    """jit_flash and the fastest peer at one shape of one run."""

    case_id: str
    peer: str
    speedup: float
    """0 where jit_flash did not pass."""


Row = dict[str, str]


def run(options: argparse.Namespace, folder: Path) -> None:
    """Fill `folder`, new or empty. Raises SystemExit where attnbench leaves no results."""
    listed = subprocess.run([*ATTNBENCH, "list", "--device", "cpu", "--json"], check=True, stdout=subprocess.PIPE)
    available = {backend["name"] for backend in json.loads(listed.stdout) if backend["available"]}
    backends = [name for name in (OURS, *NATIVE, UPCAST) if name in available]
    command = ["run", "--device", "cpu", "--backends", ",".join(backends), *SUITES[options.suite]]
    command += ["--dtype", ",".join(options.dtype), "--causal", options.causal, "--out", str(folder)]
    if options.budget is not None:
        command += ["--budget", str(options.budget)]
    print(f"attnbench {shlex.join(command)}\n", flush=True)
    # Its tables go to stderr: stdout is for the summary. Its exit code tells of peers that failed, too.
    code = subprocess.run([*ATTNBENCH, *command], stdout=sys.stderr).returncode
    if not (folder / "results.csv").is_file():
        sys.exit(f"attnbench run ended with {code} and left no results")


def comparisons(rows: Iterable[Row], peers: Sequence[str], dtype: str) -> list[Comparison]:
    """Of one run, the shapes that jit_flash was asked for and a peer passed."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["dtype"] == dtype and row["device"] == "cpu":
            cases.setdefault(row["case_id"], {})[row["kernel"]] = row
    found = []
    for case_id, kernels in cases.items():
        passed = {name: float(row["time_us"]) for name, row in kernels.items() if row["status"] == "PASSED"}
        times = {name: passed[name] for name in peers if name in passed}
        if OURS in kernels and times:
            fastest = min(times, key=times.__getitem__)
            found.append(Comparison(case_id, fastest, times[fastest] / passed[OURS] if OURS in passed else 0.0))
    return found


def summary(runs: Sequence[list[Row]], dtypes: Sequence[str]) -> tuple[Table, Table]:
    """What became of the claims, and the shapes at which jit_flash is slower than they allow."""
    table = Table("dtype", "Against the fastest of", "Shapes", "Fastest", "Speedup", "Is", form="{:.2f}×")
    shapes = Table("Shape", "Fastest peer", "Speedup", form="{:.2f}×")
    for claim in CLAIMS:
        compared = [each for rows in runs for each in comparisons(rows, claim.peers, claim.dtype)]
        if claim.dtype not in dtypes or not compared:
            continue
        fastest = Counter(each.peer for each in compared)
        passing = {
            row["kernel"] for rows in runs for row in rows if row["status"] == "PASSED" and row["dtype"] == claim.dtype
        }
        cells = (
            claim.dtype,
            ", ".join(name for name in claim.peers if name in passing),
            len(compared),
            ", ".join(f"{name} {count}" for name, count in fastest.most_common()),
        )
        passed = [each.speedup for each in compared if each.speedup]
        mean = geometric_mean(passed) if passed else 0.0
        least = min(each.speedup for each in compared)
        table.add(*cells, "geometric mean", f"{mean:.2f}×", value=mean, at_least=claim.mean)
        table.add(claim.dtype, "", "", "", "minimum", f"{least:.2f}×", value=least, at_least=claim.minimum)
        for each in sorted(compared, key=lambda each: each.speedup):
            if each.speedup < claim.minimum:
                speedup = f"{each.speedup:.2f}×" if each.speedup else "not passed"
                shapes.add(each.case_id, each.peer, speedup, value=each.speedup, at_least=claim.minimum)
    return table, shapes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="a run directory, or a results.csv")
    parser.add_argument("--dtype", type=names(DTYPES), default=list(DTYPES), help="default: all")
    parser.add_argument("--suite", choices=SUITES, default="pto", help="default: %(default)s")
    parser.add_argument("--causal", default="false,true", help="default: %(default)s")
    parser.add_argument("--budget", type=float, help="seconds of timing for a problem; default: attnbench's")
    parser.add_argument("--out", type=Path, help="the run directory, new or empty; default: a temporary one")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folders = options.runs
        if not folders:
            folders = [options.out or Path(temporary) / "run"]
            run(options, folders[0])
        runs = []
        for folder in folders:
            path = folder / "results.csv" if folder.is_dir() else folder
            try:
                with path.open(newline="") as lines:
                    reader = csv.DictReader(lines)
                    if "status" not in (reader.fieldnames or ()):
                        parser.error(f"{path} is not the results.csv of a run")
                    runs.append(list(reader))
            except OSError as error:
                parser.error(f"{path}: {error.strerror}")

    table, shapes = summary(runs, options.dtype)
    if not table.rows:
        sys.exit("nothing to compare: no problem with jit_flash and a peer that passed")
    print(table)
    if shapes.rows:
        print(f"\n{shapes}")
    return 1 if table.missed else 0


if __name__ == "__main__":
    sys.exit(main())
