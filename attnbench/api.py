"""Owns a whole run from what was asked for to a run directory, for the CLI and for Python alike. Prints nothing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnbench import discovery, environment, ledger, plan, registry, roofline, runner, store
from attnbench.blocks import How, Progress
from attnbench.devices import DeviceInfo, peaks
from attnbench.errors import AttnbenchError, ExitCode, in_a_line
from attnbench.isolation import IsolatedWorker
from attnbench.ledger import Ledger
from attnbench.plan import Plan, Selection
from attnbench.problem import Problem, Suite
from attnbench.protocol import Protocol, make_protocol
from attnbench.registry import BackendInfo, Catalogue
from attnbench.result import HARMLESS, Result, Status
from attnbench.rows import SCHEMA_VERSION
from attnbench.runner import DEFAULT_TIMEOUT_S, Observer
from attnbench.seal import Seal
from attnbench.store import RunWriter
from attnbench.text import without_home
from attnbench.turn import AnyWorker
from attnbench.watch import MachineWatch
from attnbench.worker import Worker

if TYPE_CHECKING:
    import pandas as pd

REPORTS = Path("reports")
Shape = int | str | Sequence[int | str] | None


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    path: Path
    results: tuple[Result, ...]
    """Unfinished ones of an interrupted run too, which have fewer blocks."""
    interrupted: bool
    books: Ledger

    @property
    def exit_code(self) -> ExitCode:
        return ExitCode.INTERRUPTED if self.interrupted else exit_code(self.results)


def exit_code(results: Sequence[Result]) -> ExitCode:
    """0, 1 where something failed, 3 where nothing passed and nothing failed."""
    if any(result.status not in HARMLESS for result in results):
        return ExitCode.FAILED
    return ExitCode.OK if any(r.status is Status.PASSED for r in results) else ExitCode.NOTHING_PASSED


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a run is made, beside what it is made of."""

    protocol: Protocol
    seed: int = 0
    timeout_s: float = DEFAULT_TIMEOUT_S
    isolate: bool = True


def execute(
    the_plan: Plan,
    how: Settings,
    catalogue: Catalogue,
    observer: Observer,
    *,
    command: Sequence[str],
    out: Path | None = None,
    resume: Path | None = None,
    books: Ledger | None = None,
) -> Outcome:
    """Run a plan into a new run directory, or what is missing of it in the run `resume`.

    An interrupt ends it early, with what was finished. Raises AttnbenchError where the timeout is none, the directory
    cannot be written, or the run to go on with was made differently; what was finished stays in it.
    """
    require_timeout(how.timeout_s)
    start = _starter(the_plan, how)
    books = books or Ledger()
    with books.spend(ledger.START):
        info = the_plan.info
        if the_plan.device.unavailable() is None:  # else no row of the run has a time
            info = peaks.with_peaks(info, the_plan.device)
    header = {
        "schema_version": SCHEMA_VERSION,
        "command": list(command),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": dataclasses.asdict(info),
        "suite": {
            "name": the_plan.suite.name,
            "cases": [problem.case_id for problem in the_plan.suite],
            "problems": [problem.to_json() for problem in the_plan.suite],
        },
        "backends": [entry.name for entry in the_plan.entries],
        "summaries": {
            entry.name: environment.one_line(entry.backend.summary) for entry in the_plan.entries if entry.backend
        },
        "baseline": the_plan.baseline,
        "protocol": dataclasses.asdict(how.protocol),
        "timing_method": the_plan.device.timing_method,
        "seed": how.seed,
        "timeout_s": how.timeout_s,
        "isolate": how.isolate,
        "environment": environment.fingerprint(catalogue),
    }
    before: dict[str, Progress] = {}
    if resume is not None:
        if differences := _differences(store.read_header(resume), header):
            raise AttnbenchError(f"{resume} was made differently: {'; '.join(differences)}", "start a new run")
        writer, before = RunWriter.reopen(resume)
    else:
        writer = RunWriter(out, header, info) if out else _new_run(the_plan, header, info)
    run = runner.Run(
        the_plan,
        how.protocol,
        writer,
        observer,
        start=start,
        watch=MachineWatch(the_plan.device),
        seed=how.seed,
        baseline=the_plan.timed_baseline,
        implausible=_Roofline(the_plan, info),
        before=before,
        books=books,
    )
    interrupted = False
    results: tuple[Result, ...] = ()
    try:
        try:
            run.run()
        except KeyboardInterrupt:
            interrupted = True
        if writer.has_something:
            from attnbench.report.tables import Tables

            record = store.load(writer.path)
            results = record.results
            writer.finish(_report_page(header, Tables(record).render()), record.rows, whole=not interrupted)
    finally:
        writer.close()
    return Outcome(writer.path, results, interrupted, books)


class _Roofline:
    """Says why a result cannot be, after a second look at a peak that was measured."""

    def __init__(self, the_plan: Plan, info: DeviceInfo) -> None:
        self._device = the_plan.device
        self._info = info

    def __call__(self, result: Result) -> str:
        timing = result.measurement
        if timing is None:
            return ""
        fault = roofline.fault(result.problem, self._info, timing.cache, timing.time_us)
        if fault and self._info.peak_source == "measured":
            self._info = peaks.with_peaks(self._info, self._device, refresh=True)
            fault = roofline.fault(result.problem, self._info, timing.cache, timing.time_us)
        return fault


_COMPARED = (
    "suite.cases",
    "backends",
    "baseline",
    "protocol",
    "timing_method",
    "seed",
    "isolate",
    "environment",
    "device.kind",
    "device.name",
)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of two runs' headers must be the same and is not, in words."""
    found = []
    flat_before, flat_now = _flat(before), _flat(json.loads(json.dumps(now)))
    for name in sorted(flat_before.keys() | flat_now.keys()):
        if any(name == root or name.startswith(f"{root}.") for root in _COMPARED):
            old, new = flat_before.get(name), flat_now.get(name)
            if old != new:
                found.append(f"{name} was {old} and is {new}" if not isinstance(new or old, list) else f"{name} differ")
    return found


def _flat(data: Mapping[str, Any], root: str = "") -> dict[str, Any]:
    """A nested table by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{root}{name}.")
        else:
            flat[f"{root}{name}"] = value
    return flat


@dataclass(frozen=True)
class Earlier:
    """What a run that ended early was asked for."""

    selection: Selection
    suite: Suite
    protocol: Protocol
    seed: int
    timeout_s: float

    @classmethod
    def of(cls, path: Path) -> Earlier:
        """Raises AttnbenchError where there is no such run, or one of a version that did not record it."""
        header = store.read_header(path)
        try:
            return cls(
                Selection(
                    backends=",".join(header["backends"]), device=header["device"]["kind"], baseline=header["baseline"]
                ),
                Suite(header["suite"]["name"], tuple(map(Problem.from_json, header["suite"]["problems"]))),
                Protocol(**header["protocol"]),
                int(header["seed"]),
                float(header["timeout_s"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise AttnbenchError(f"{path} cannot be gone on with: {in_a_line(error)}", "start a new run") from error


def require_timeout(seconds: float) -> None:
    """Raises AttnbenchError where `seconds` is no time that a case can be given."""
    if not 0 < seconds < float("inf"):
        raise AttnbenchError(f"--timeout must be a number of seconds above 0, not {seconds:g}")


def _starter(the_plan: Plan, how: Settings) -> Callable[[BackendInfo], AnyWorker]:
    """What starts a backend's worker: in a process of its own or, for a debugger, in this one.

    Raises AttnbenchError where this one is not the backend's interpreter.
    """
    if how.isolate:
        return lambda info: IsolatedWorker(info, how.timeout_s, python=info.source.python or sys.executable)
    for entry in the_plan.entries:
        if entry.backend is not None and entry.backend.source.python:
            shown = without_home(entry.backend.source.python)
            raise AttnbenchError(
                f"{entry.name} belongs to {shown}: it cannot run in this process",
                f"leave out --no-isolate, or --skip {entry.name}",
            )
    seal = Seal(the_plan.device.timing_functions())
    return lambda info: Worker(registry.load(info), the_plan.device, how.timeout_s, seal)


def check(
    the_plan: Plan,
    observer: Observer,
    *,
    seed: int = 0,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    isolate: bool = True,
) -> list[Result]:
    """Check correctness alone, on every distribution of inputs; writes nothing."""
    require_timeout(timeout_s)
    how = Settings(protocol=Protocol(), timeout_s=timeout_s, isolate=isolate)
    kept = _Kept()
    watch = MachineWatch(the_plan.device)
    runner.Run(the_plan, None, kept, observer, start=_starter(the_plan, how), watch=watch, seed=seed).run()
    return kept.results


class _Kept:
    """A recorder that keeps results in memory."""

    def __init__(self) -> None:
        self.results: list[Result] = []

    def add(self, results: Sequence[Result]) -> None:
        self.results += results

    def add_block(self, progress: Progress, how: How) -> None: ...


def _new_run(the_plan: Plan, header: dict[str, Any], info: DeviceInfo) -> RunWriter:
    """A run below reports/ under the first name that nobody has, also not another run that starts right now."""
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{the_plan.device.kind}-{the_plan.suite.name}"
    name, names = stem, (f"{stem}-{number}" for number in itertools.count(2))
    while True:
        try:
            return RunWriter(REPORTS / name, header, info, fresh=True)
        except FileExistsError:
            name = next(names)


def _report_page(header: dict[str, Any], tables: str) -> str:
    from attnbench.report.text import code, escape

    protocol = header["protocol"]
    facts = [
        f"# attnbench: {escape(header['suite']['name'], 'github')} on {escape(header['device']['name'], 'github')}",
        f"{code(' '.join(header['command']))}, {header['started']}, protocol {protocol['name']}, "
        f"{protocol['cache']} cache, seed {header['seed']}",
    ]
    return "\n\n".join([*facts, tables]) + "\n"


class _Silent:
    """An observer that tells nobody."""

    def started(self, problem: Problem, index: int, total: int, block: int) -> None: ...

    def ended(self, results: Sequence[Result]) -> None: ...


def run(
    backends: str | Sequence[str] | None = None,
    suite: str | Path | None = None,
    *,
    seqlen_q: Shape = None,
    seqlen_k: Shape = None,
    head_dim: Shape = None,
    batch: Shape = None,
    heads: Shape = None,
    device: str = "auto",
    dtype: str | None = None,
    causal: bool | None = None,
    protocol: str | None = None,
    warmup: int | None = None,
    iters: int | None = None,
    cache: str = "hot",
    budget_s: float | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    isolate: bool = True,
    python: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Run backends over a suite, as `attnbench run` does, and return results.csv as a DataFrame.

    `backends` is a list or a comma list of names or prefixes (None: all available); `suite` a name or a TOML file;
    seqlen_q, seqlen_k, head_dim, batch and heads are each a value or a list, and exclude a suite. The run directory is
    `out`, by default a new one under reports/. Without `isolate` backends run in this process, as under --no-isolate.
    `python` maps names of entry points or backends to other interpreters, as --python does. The rest is as in
    `attnbench run --help`.

    Raises AttnbenchError for what cannot be run, and KeyboardInterrupt when interrupted, after writing what was
    finished.
    """
    from attnbench.report.tables import frame

    selection = Selection(
        backends=_comma_list(backends),
        suite=None if suite is None else str(suite),
        seqlen_q=_comma_list(seqlen_q),
        seqlen_k=_comma_list(seqlen_k),
        head_dim=_comma_list(head_dim),
        batch=_comma_list(batch),
        heads=_comma_list(heads),
        device=device,
        dtype=_comma_list(dtype),
        causal=None if causal is None else str(causal).lower(),
    )
    catalogue = discovery.discover(python=python, files=plan.files_of(selection))
    chosen = plan.make(selection, catalogue)
    outcome = execute(
        chosen,
        Settings(
            protocol=make_protocol(protocol, warmup, iters, cache, budget_s),
            seed=seed,
            timeout_s=timeout_s,
            isolate=isolate,
        ),
        catalogue,
        _Silent(),
        command=["attnbench.run"],  # what else this process was started with is nobody's business
        out=Path(out) if out else None,
    )
    if outcome.interrupted:
        raise KeyboardInterrupt
    return frame(store.load(outcome.path).rows)


def load(path: str | Path, device_name: str | None = None) -> pd.DataFrame:
    """A run directory, or a CSV with results.csv's first seven columns, as a DataFrame with all its columns."""
    from attnbench.report.tables import frame

    return frame(store.load(Path(path), device_name).rows)


def _comma_list(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return ",".join(map(str, value)) if isinstance(value, Sequence) else str(value)
