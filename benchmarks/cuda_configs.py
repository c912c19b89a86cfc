"""Configurations of jit_flash's CUDA kernel beside each other, and what its model makes of them.

Run: python benchmarks/cuda_configs.py, which looks at h100_configs.csv beside it; or, on a Hopper GPU, with
`--time FILE.csv` it first times, by CUDA graphs, the configurations of the problems below that have work for at least
30 SMs and of which the model expects at most 1.6 times the least, and writes FILE.csv.

Claim: the model of plugins/jit_flash/cuda_config.py meets the times within 10% (root mean square of the logarithms'
differences; a GPU that slows down under long loads is part of it), and what it chooses among them is in geometric mean
at most 1% slower than the fastest, nowhere more than 5%. On another GPU than the one it is fitted to all may be
missed.

Printed: of each problem the fastest configuration and the chosen one. Exits with 1 where a limit is missed.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cpu_bounds import Table

from attnbench.problem import PTO, Problem, cross
from attnbench.stats import geometric_mean
from attnbench_plugins.jit_flash.cuda_config import Config, choose, configs, predicted_us, units

DATA = Path(__file__).with_name("h100_configs.csv")
CASE_FIELDS = ("batch", "heads_q", "heads_kv", "seqlen_q", "seqlen_k", "causal")
FIELDS = tuple(field.name for field in dataclasses.fields(Config))
FP16 = {"dtype": ("fp16",)}
CASES = (
    *(case.resolve("cuda") for case in PTO),
    *(
        case
        for batch, n in ((4, 1024), (4, 4096), (1, 16384))
        for case in cross(**FP16, batch=(batch,), heads_q=(16,), seqlen_q=(n,), seqlen_k=(n,), causal=(False, True))
    ),
    *cross(**FP16, batch=(1, 8, 64), heads_q=(32,), heads_kv=(8,), seqlen_q=(1,), seqlen_k=(1024, 8192, 32768)),
)
"""pto, many heads, decoding."""
H100_SMS = 132
"""Of the H100 of h100_configs.csv."""
LEAST_BLOCKS, FAR_OFF, MOST_CALLS, MOST_US = 30, 1.6, 300, 20_000
MEETS, MEAN, WORST = 0.10, 1.01, 1.05

Times = Mapping[Problem, Mapping[Config, float]]
"""In µs."""


def read(path: Path) -> Times:
    found: dict[Problem, dict[Config, float]] = defaultdict(dict)
    with path.open(newline="") as lines:
        for row in csv.DictReader(lines):
            case = Problem(dtype="fp16", **{name: _value(Problem, name, row[name]) for name in CASE_FIELDS})
            config = Config(**{name: _value(Config, name, row[name]) for name in FIELDS})
            found[case][config] = float(row["device_us"])
    return found


def _value(of: type, name: str, text: str) -> int | bool:
    return text == "True" if of.__annotations__[name] == "bool" else int(text)


def worth_timing(case: Problem, sms: int) -> Iterator[Config]:
    expected = {config: predicted_us(case, config, sms) for config in configs(case, sms)}
    for config, time_us in expected.items():
        if units(case, config) * config.parts >= LEAST_BLOCKS and time_us <= FAR_OFF * min(expected.values()):
            yield config


def timed(sms: int) -> Iterator[tuple[Problem, Config, float]]:
    import torch

    from attnbench.devices.cuda import CudaDevice
    from attnbench_plugins.jit_flash import cuda

    device, backend = CudaDevice(), cuda.JitFlashCuda()
    chosen = [(case, config) for case in CASES for config in worth_timing(case, sms)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda pair: cuda.cubin(*pair), chosen))
    for case, config in chosen:
        q, k, v = (torch.randn(shape, device="cuda").half() for shape in (case.q_shape, case.k_shape, case.v_shape))
        call = backend.prepare(case, q, k, v, config=config)
        calls = max(10, min(MOST_CALLS, int(MOST_US / predicted_us(case, config, sms))))
        device.time_calls(call, calls, cold=False)
        yield case, config, statistics.median(device.time_calls(call, calls, cold=False).times_us)
        device.forget(call)


def write(path: Path, rows: Iterable[tuple[Problem, Config, float]]) -> None:
    with path.open("w", newline="") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow([*CASE_FIELDS, *FIELDS, "device_us"])
        for case, config, time_us in rows:
            values = (getattr(case, name) for name in CASE_FIELDS), (getattr(config, name) for name in FIELDS)
            writer.writerow([*itertools.chain(*values), f"{time_us:.3f}"])


def tables(times: Times, sms: int) -> Iterator[Table]:
    table = Table("Problem", "Fastest", "µs", "Chosen", "µs", "Slower by")
    slower, errors = [], []
    for case, every in times.items():
        if choose(case, sms) not in every:
            table.add(case.case_id, "", "", _words(choose(case, sms)), "not timed", "")
            continue
        by_config = {config: time_us for config, time_us in every.items() if config in set(configs(case, sms))}
        errors += [math.log(predicted_us(case, config, sms) / time_us) for config, time_us in by_config.items()]
        fastest = min(by_config, key=by_config.__getitem__)
        chosen = min(by_config, key=lambda config: predicted_us(case, config, sms))
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
    words = [f"{config.rows} × {config.keys}", f"{config.stages} stages"]
    if config.parts > 1:
        words.append(f"{config.parts} parts")
    if config.split_v > 1:
        words.append(f"V in {config.split_v}")
    if config.shared_rows > 1:
        words.append("shared rows")
    if config.persistent:
        words.append("persistent")
    return ", ".join(words)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", type=Path, metavar="FILE.csv", help="time, and write this file")
    options = parser.parse_args()
    path, sms = options.time or DATA, H100_SMS
    if options.time:
        import torch

        from attnbench_plugins.jit_flash.cuda import CAPABILITY, JitFlashCuda, current_sms

        reason = JitFlashCuda().unavailable()
        if not reason and torch.cuda.get_device_capability() != CAPABILITY:
            reason = "these configurations are those of the kernel for Hopper"
        if reason:
            print(reason, file=sys.stderr)
            return 2
        torch.zeros((), device="cuda")  # which gives this thread the device's context
        sms = current_sms()
        write(path, timed(sms))
    found = list(tables(read(path), sms))
    print(*found, sep="\n\n")
    return 1 if sum(table.missed for table in found) else 0


if __name__ == "__main__":
    sys.exit(main())
