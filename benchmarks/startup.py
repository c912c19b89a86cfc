"""How long attnbench's commands take from start to end, against what each may take. Run: python benchmarks/startup.py

Whole processes by the wall clock, five runs of each after one that fills the page cache. The ratio to an empty
interpreter's start, taken in turn with them, tells a slow machine from a slow command.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

PUBLISHED = Path(__file__).parent.parent / "reports" / "ascend-910b2" / "results.csv"
ATTNBENCH = [sys.executable, "-m", "attnbench.cli"]
COMMANDS = {
    "python -c pass": ([sys.executable, "-c", "pass"], None),
    "attnbench --help": ([*ATTNBENCH, "--help"], 0.3),
    "attnbench run --help": ([*ATTNBENCH, "run", "--help"], 0.3),
    "attnbench report CSV": ([*ATTNBENCH, "report", str(PUBLISHED)], 1.5),
    "attnbench list": ([*ATTNBENCH, "list"], 4.0),
}
RUNS = 5


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for run in range(RUNS + 1):
        for name, (command, _) in COMMANDS.items():
            elapsed = seconds(command)
            if run:
                taken[name].append(elapsed)
    empty = statistics.median(taken["python -c pass"])
    for name, (_, limit) in COMMANDS.items():
        median = statistics.median(taken[name])
        bound = "" if limit is None else f", may take {limit:g} s: {'ok' if median <= limit else 'TOO SLOW'}"
        print(
            f"{name}: {median:.3f} s ({min(taken[name]):.3f} to {max(taken[name]):.3f}, {median / empty:.0f}×){bound}"
        )


if __name__ == "__main__":
    main()
