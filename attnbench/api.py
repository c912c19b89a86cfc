"""Owns a whole run from what was asked for to a run directory, for the CLI and for Python alike. Prints nothing."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnbench import discovery, environment, plan, registry, runner, store
from attnbench.errors import AttnbenchError, ExitCode
from attnbench.isolation import IsolatedWorker
from attnbench.plan import Plan, Selection
from attnbench.problem import Problem
from attnbench.protocol import Protocol, make_protocol
from attnbench.registry import BackendInfo, Catalogue
from attnbench.result import HARMLESS, Result, Status
from attnbench.rows import SCHEMA_VERSION
from attnbench.runner import DEFAULT_TIMEOUT_S, AnyWorker, Observer
from attnbench.store import RunWriter
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
    interrupted: bool

    @property
    def exit_code(self) -> ExitCode:
        return ExitCode.INTERRUPTED if self.interrupted else exit_code(self.results)


def exit_code(results: Sequence[Result]) -> ExitCode:
    """0, 1 where something failed, 3 where nothing passed and nothing failed."""
    if any(result.status not in HARMLESS for result in results):
        return ExitCode.FAILED
    return ExitCode.OK if any(r.status is Status.PASSED for r in results) else ExitCode.NOTHING_PASSED


def execute(
    the_plan: Plan,
    protocol: Protocol,
    catalogue: Catalogue,
    observer: Observer,
    *,
    command: Sequence[str],
    out: Path | None = None,
    seed: int = 0,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    isolate: bool = True,
) -> Outcome:
    """Run a plan into a new run directory. An interrupt ends it early, with what was finished.

    Raises AttnbenchError where the timeout is none, or the directory cannot be written; what was finished stays in it.
    """
    require_timeout(timeout_s)
    start = _starter(the_plan, timeout_s, isolate=isolate)
    header = {
        "schema_version": SCHEMA_VERSION,
        "command": list(command),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": dataclasses.asdict(the_plan.info),
        "suite": {"name": the_plan.suite.name, "cases": [problem.case_id for problem in the_plan.suite]},
        "backends": [entry.name for entry in the_plan.entries],
        "baseline": the_plan.baseline,
        "protocol": dataclasses.asdict(protocol),
        "seed": seed,
        "timeout_s": timeout_s,
        "environment": environment.fingerprint(catalogue),
    }
    writer = RunWriter(out, header, the_plan.info) if out else _new_run(the_plan, header)
    interrupted = False
    try:
        runner.run(the_plan, protocol, writer.add, observer, seed=seed, start=start)
    except KeyboardInterrupt:
        interrupted = True
    if writer.results:
        from attnbench.report.tables import Tables

        writer.finish(_report_page(header, Tables(store.load(writer.path)).render()))
    return Outcome(writer.path, writer.results, interrupted)


def require_timeout(seconds: float) -> None:
    """Raises AttnbenchError where `seconds` is no time that a case can be given."""
    if not 0 < seconds < float("inf"):
        raise AttnbenchError(f"--timeout must be a number of seconds above 0, not {seconds:g}")


def _starter(the_plan: Plan, timeout_s: float, *, isolate: bool) -> Callable[[BackendInfo], AnyWorker]:
    """What starts a backend's worker: in a process of its own or, for a debugger, in this one.

    Raises AttnbenchError where this one is not the backend's interpreter.
    """
    if isolate:
        return lambda info: IsolatedWorker(info, timeout_s, python=info.source.python or sys.executable)
    for entry in the_plan.entries:
        if entry.backend is not None and entry.backend.source.python:
            shown = environment.without_home(entry.backend.source.python)
            raise AttnbenchError(
                f"{entry.name} belongs to {shown}: it cannot run in this process",
                f"leave out --no-isolate, or --skip {entry.name}",
            )
    return lambda info: Worker(registry.load(info), the_plan.device, timeout_s)


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
    results: list[Result] = []
    start = _starter(the_plan, timeout_s, isolate=isolate)
    runner.run(the_plan, None, results.extend, observer, seed=seed, start=start)
    return results


def _new_run(the_plan: Plan, header: dict[str, Any]) -> RunWriter:
    """A run below reports/ under the first name that nobody has, also not another run that starts right now."""
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{the_plan.device.kind}-{the_plan.suite.name}"
    name, names = stem, (f"{stem}-{number}" for number in itertools.count(2))
    while True:
        try:
            return RunWriter(REPORTS / name, header, the_plan.info, fresh=True)
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

    def started(self, problem: Problem, index: int, total: int) -> None: ...

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

    catalogue = discovery.discover(python=python)
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
    chosen = plan.make(selection, catalogue)
    outcome = execute(
        chosen,
        make_protocol(protocol, warmup, iters, cache, budget_s),
        catalogue,
        _Silent(),
        command=["attnbench.run"],  # what else this process was started with is nobody's business
        out=Path(out) if out else None,
        seed=seed,
        timeout_s=timeout_s,
        isolate=isolate,
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
