"""Configurations of jit_flash's CUDA kernel beside each other, and what its model makes of them.

Run: python benchmarks/cuda_configs.py, which looks at h100_configs.csv beside it; or, on a Hopper GPU, with
`--time FILE.csv` it first times every configuration of pto's problems that has work for at least 30 SMs and not more
than fit at once, by CUDA graphs, and writes FILE.csv.

Claim: the model of plugins/jit_flash/cuda_config.py meets the times within 5% (root mean square of the logarithms'
differences), and what it chooses among them is in geometric mean at most 2% slower than the fastest, nowhere more than
8%. On another GPU than the one it is fitted to the first may be missed.

Printed: of each problem the fastest configuration and the chosen one. Exits with 1 where a limit is missed.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cpu_bounds import Table

from attnbench.problem import PTO, Problem
from attnbench.stats import geometric_mean
from attnbench_plugins.jit_flash.cuda_config import Config, configs, predicted_us, units

DATA = Path(__file__).with_name("h100_configs.csv")
FIELDS = ("rows", "keys", "stages", "cluster", "split_v")
H100 = {1: 132, 2: 66, 3: 43, 4: 31, 6: 20, 8: 15} | dict.fromkeys((10, 12, 14, 15, 16), 7)
"""Clusters that the H100 of h100_configs.csv ran at once, by their size: asked of it for 1, 8 and 16, for others taken
from the times, which jump where one more has to wait."""
LEAST_BLOCKS, CALLS = 30, 300
MEETS, MEAN, WORST = 0.05, 1.02, 1.08

Times = Mapping[Problem, Mapping[Config, float]]
"""In µs."""


def read(path: Path) -> Times:
    found: dict[Problem, dict[Config, float]] = defaultdict(dict)
    with path.open(newline="") as lines:
        for row in csv.DictReader(lines):
            case = Problem(seqlen_q=int(row["seqlen_q"]), seqlen_k=int(row["seqlen_k"]), dtype="fp16")
            found[case][Config(*(int(row[name]) for name in FIELDS))] = float(row["device_us"])
    return found


def timed(clusters: Mapping[int, int]) -> Iterator[tuple[Problem, Config, float]]:
    import torch

    from attnbench.devices.cuda import CudaDevice
    from attnbench_plugins.jit_flash import cuda

    device, backend = CudaDevice(), cuda.JitFlashCuda()
    cases = [problem.resolve("cuda") for problem in PTO.problems]
    chosen = [
        (case, config)
        for case in cases
        for config in configs(case)
        if units(case, config) <= clusters[config.cluster] and units(case, config) * config.cluster >= LEAST_BLOCKS
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda pair: cuda.cubin(*pair), chosen))
    for case, config in chosen:
        q, k, v = (torch.randn(shape, device="cuda").half() for shape in (case.q_shape, case.k_shape, case.v_shape))
        call = backend.prepare(case, q, k, v, config=config)
        device.time_calls(call, CALLS, cold=False)
        yield case, config, statistics.median(device.time_calls(call, CALLS, cold=False).times_us)
        device.forget(call)


def write(path: Path, rows: Iterable[tuple[Problem, Config, float]]) -> None:
    with path.open("w", newline="") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(["seqlen_q", "seqlen_k", *FIELDS, "device_us"])
        for case, config, time_us in rows:
            values = (getattr(config, name) for name in FIELDS)
            writer.writerow([case.seqlen_q, case.seqlen_k, *values, f"{time_us:.3f}"])


def tables(times: Times, clusters: Mapping[int, int]) -> Iterator[Table]:
    table = Table("Problem", "Fastest", "µs", "Chosen", "µs", "Slower by")
    slower, errors = [], []
    for case, by_config in times.items():
        errors += [math.log(predicted_us(case, config, clusters) / time_us) for config, time_us in by_config.items()]
        fastest = min(by_config, key=by_config.__getitem__)
        chosen = min(by_config, key=lambda config: predicted_us(case, config, clusters))
        slower.append(by_config[chosen] / by_config[fastest])
        cells = (cell for config in (fastest, chosen) for cell in (_words(config), f"{by_config[config]:.2f}"))
        table.add(case.case_id, *cells, f"{slower[-1] - 1:.1%}", value=slower[-1] - 1, at_most=WORST - 1)
    yield table
    table = Table("Of all", "Is", form="{:.0%}")
    missed, mean = math.sqrt(statistics.fmean(error**2 for error in errors)), geometric_mean(slower) - 1
    table.add("the model is off by", f"{missed:.1%}", value=missed, at_most=MEETS)
    table.add("what it chooses is slower by", f"{mean:.1%}", value=mean, at_most=MEAN - 1)
    yield table


def _words(config: Config) -> str:
    split = f", V in {config.split_v}" if config.split_v > 1 else ""
    return f"{config.rows} × {config.keys}, {config.stages} stages, {config.cluster} blocks{split}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", type=Path, metavar="FILE.csv", help="time, and write this file")
    options = parser.parse_args()
    path, clusters = options.time or DATA, H100
    if options.time:
        import torch

        from attnbench_plugins.jit_flash.cuda import CAPABILITY, JitFlashCuda, active_clusters

        reason = JitFlashCuda().unavailable()
        if not reason and torch.cuda.get_device_capability() != CAPABILITY:
            reason = "these configurations are those of the kernel for Hopper"
        if reason:
            print(reason, file=sys.stderr)
            return 2
        clusters = dict(active_clusters(0))
        print("clusters at once, by size:", clusters)
        write(path, timed(clusters))
    found = list(tables(read(path), clusters))
    print(*found, sep="\n\n")
    return 1 if sum(table.missed for table in found) else 0


if __name__ == "__main__":
    sys.exit(main())
