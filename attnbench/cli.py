"""Owns the command line: parse, call, print. Decides nothing that the Python API does not."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnbench import running, settings
from attnbench.console import Progress, complain, data_stream, say, write, write_json, write_table
from attnbench.errors import AttnbenchError, ExitCode
from attnbench.options import (
    AsJson,
    Backends,
    Baseline,
    Batch,
    Causal,
    Device,
    Dtype,
    HeadDim,
    Heads,
    NoIsolate,
    NoPlugin,
    Python,
    Seed,
    SeqlenK,
    SeqlenQ,
    Skip,
    SuiteName,
    Timeout,
    Verbose,
)

if TYPE_CHECKING:
    from attnbench.plan import Selection
    from attnbench.problem import DeviceKind

# No rich markup: help stays fast, and no text from outside is taken for markup.
app = typer.Typer(name="attnbench", rich_markup_mode=None, pretty_exceptions_enable=False)
cache_app = typer.Typer(rich_markup_mode=None, help="Show or clear the compiled kernels.")
plugins_app = typer.Typer(rich_markup_mode=None)
app.add_typer(cache_app, name="cache")
app.add_typer(plugins_app, name="plugins")

NO_PATH = ""
"""What no path is."""


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"attnbench {version('attnbench')}")
        raise typer.Exit


@app.callback()
def root(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The referee of attention kernels: proves them correct, times them side by side, prints tables to trust.

    Exit codes: 0 fine; 1 something failed; 2 usage or unreadable input; 3 nothing passed; 4 a requested plugin failed
    to load; 130 interrupted.
    """


@app.command("list")
def list_backends(
    device: Annotated[str | None, typer.Option(help="Only backends of this device.", metavar="NAME")] = None,
    no_plugin: NoPlugin = None,
    python: Python = None,
    as_json: AsJson = False,
) -> None:
    """List backends: on which device, and whether this machine can run them or why not."""
    from attnbench.problem import DEVICE_KINDS

    with data_stream() as out:
        catalogue = running.discover(no_plugin, python)
        kind = None
        if device is not None:
            from attnbench import devices

            kind = devices.choose(device).kind
        found = [b for d in DEVICE_KINDS for b in catalogue.backends if b.device == d and kind in (None, d)]
        if as_json:
            fields = ("name", "device", "available", "reason", "summary")
            write_json(
                out,
                [
                    {f: getattr(b, f) for f in fields}
                    | {"distribution": b.source.distribution, "version": b.source.version}
                    for b in found
                ],
            )
        else:
            rows = [
                [
                    b.name,
                    b.device,
                    "yes" if b.available else "no",
                    f"{b.source.distribution} {b.source.version}",
                    ", ".join(f"{name} {version}" for name, version in b.libraries if version),
                    b.summary,
                    b.reason or "",
                ]
                for b in found
            ]
            write_table(out, ("backend", "device", "available", "from", "library", "summary", "why not"), rows)
        running.tell_failures(catalogue)


@plugins_app.callback(invoke_without_command=True)
def plugins(
    context: typer.Context,
    no_plugin: NoPlugin = None,
    python: Python = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Also tell what was called of each, and what it gave.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List plugins: where they come from, what they bring, and why one failed to load. `check` tries one."""
    if context.invoked_subcommand is not None:
        return
    with data_stream() as out:
        catalogue = running.discover(no_plugin, python)
        if as_json:
            write_json(
                out,
                [
                    {
                        "distribution": p.source.distribution,
                        "version": p.source.version,
                        "entry_point": p.source.name,
                        "backends": list(p.backends),
                        "error": p.error,
                    }
                    for p in catalogue.plugins
                ],
            )
            return
        rows = [
            [
                p.source.name,
                p.source.distribution,
                p.source.version,
                ", ".join(p.backends),
                ", ".join(p.suites),
                f"{p.load_s:.2f}",
                p.error_line or _loaded_by(p.source.python),
            ]
            for p in catalogue.plugins
        ]
        write_table(out, ("entry point", "distribution", "version", "backends", "suites", "load s", "state"), rows)
        for plugin in catalogue.plugins if trace else ():
            say(f"\n{plugin.source.name}")
            for call in plugin.calls:
                say(f"  {call}")
        for plugin in catalogue.failures:
            say(f"\n{plugin.source.name} of {plugin.source.distribution} {plugin.source.version}:\n{plugin.error}")


@plugins_app.command("check")
def plugins_check(
    name: Annotated[str, typer.Argument(help="A backend's name, or file.py:name.", metavar="NAME")],
    device: Annotated[str | None, typer.Option(help="Only on this device.", metavar="NAME")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for each test.")] = 120.0,
    python: Python = None,
    as_json: AsJson = False,
) -> None:
    """Run the conformance kit on a backend: what every one must do, test by test, in a process of its own."""
    with data_stream() as out:
        from attnbench import api, devices, plan
        from attnbench.testing import check
        from attnbench.testing.conform import FAILED

        api.require_timeout(timeout)
        catalogue = running.discover(None, python, plan.files_of(plan.Selection(backends=name)))
        kind = None if device is None else devices.choose(device).kind
        names = plan.resolve_backends(name, catalogue, "plugins check", kind=kind)
        if len(names) > 1:
            raise AttnbenchError(f"plugins check takes one backend, not {len(names)}", "check one after the other")
        found = [info for info in catalogue.backends if info.name in names and kind in (None, info.device)]
        usable = [info for info in found if info.available]
        if not usable:
            why = "; ".join(f"on {info.device}: {info.reason}" for info in found) or f"it does not run on {kind}"
            raise AttnbenchError(f"{', '.join(names)} cannot be checked here: {why}", None, ExitCode.NOTHING_PASSED)
        outcomes: dict[DeviceKind, list[check.Outcome]] = {}
        for info in usable:
            outcomes[info.device] = []
            for one in check.check(info, timeout):
                outcomes[info.device].append(one)
                if one.outcome == FAILED:  # at once: the next may take its whole time
                    say(" ".join(filter(None, [one.test.replace("_", " "), one.dtype, f"FAILED: {one.words}"])))
        if as_json:
            rows = [{"device": kind} | dataclasses.asdict(one) for kind, all_ in outcomes.items() for one in all_]
            write_json(out, rows)
        else:
            for kind, all_ in outcomes.items():
                say(f"{', '.join(names)} on {kind}")
                write_table(out, ("test", "outcome", "why"), check.table(all_))
        failed = [one for all_ in outcomes.values() for one in all_ if one.outcome == FAILED]
        for trace in dict.fromkeys(one.trace for one in failed if one.trace):
            say(f"\n{trace}")
        if failed:
            _end(ExitCode.FAILED)


@app.command("new-plugin")
def new_plugin(
    name: Annotated[str, typer.Argument(help="What to call it: my-flash.", metavar="NAME")],
    kind: Annotated[
        str, typer.Option("--kind", help="What it is written in: torch, triton, cuda, cpp or pto.", metavar="KIND")
    ] = "torch",
) -> None:
    """Write a package that brings one backend, into a new folder here: it installs, runs and passes its tests."""
    with data_stream():
        from attnbench import scaffold
        from attnbench.plan import choice

        choice(kind, scaffold.KINDS, "kind")
        written = scaffold.create(name, kind, Path())
        for path in written:
            say(f"  {path}")
        say(f"next: pip install -e './{name}[test]', then attnbench list; {name}/README.md says more")


@app.command()
def check(
    backends: Backends = None,
    skip: Skip = None,
    device: Device = "auto",
    suite: SuiteName = None,
    seqlen_q: SeqlenQ = None,
    seqlen_k: SeqlenK = None,
    head_dim: HeadDim = None,
    batch: Batch = None,
    heads: Heads = None,
    dtype: Dtype = None,
    causal: Causal = None,
    timeout: Timeout = None,
    seed: Seed = None,
    no_plugin: NoPlugin = None,
    python: Python = None,
    no_isolate: NoIsolate = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Check correctness alone, also on outliers and large logits. Nothing is timed or written."""
    with data_stream() as out:
        selection = _selection(locals())
        from attnbench import api

        timeout = _timeout(timeout)
        catalogue, the_plan = running.make_plan(selection, no_plugin, python)
        running.tell_plan(the_plan, "correctness alone")
        from attnbench.report.tables import check_table

        with Progress(verbose) as observer:
            results = api.check(the_plan, observer, seed=seed or 0, timeout_s=timeout, isolate=not no_isolate)
        if as_json:
            write_json(out, [result.to_json() for result in results])
        else:
            write(out, check_table(results, running.DEFAULT_FORMAT))
        _end(api.exit_code(results))


@app.command()
def run(
    backends: Backends = None,
    skip: Skip = None,
    baseline: Baseline = None,
    device: Device = "auto",
    suite: SuiteName = None,
    seqlen_q: SeqlenQ = None,
    seqlen_k: SeqlenK = None,
    head_dim: HeadDim = None,
    batch: Batch = None,
    heads: Heads = None,
    dtype: Dtype = None,
    causal: Causal = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="adaptive: until the intervals are narrow; fixed: warm-ups, iterations, mean. [default: adaptive]",
            metavar="NAME",
        ),
    ] = None,
    warmup: Annotated[int | None, typer.Option(help="Untimed calls first; asks for fixed. [default: 50]")] = None,
    iters: Annotated[int | None, typer.Option(help="Timed calls; asks for fixed. [default: 200]")] = None,
    cache: Annotated[
        str | None,
        typer.Option(help="hot, or cold: flushed before every call.", metavar="STATE", show_default="hot"),
    ] = None,
    timeout: Timeout = None,
    budget: Annotated[
        float | None, typer.Option(help="Seconds of timing for a problem, under adaptive. [default: 20]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run directory, new or empty. [default: reports/<time>-<device>-<suite>]")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Go on with this run, or with --out: only what is missing. Options not given are its own.",
            metavar="RUN",
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Run again when a plugin's or kernel's source changes, until Ctrl-C.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and exit.")] = False,
    seed: Seed = None,
    no_plugin: NoPlugin = None,
    python: Python = None,
    no_isolate: NoIsolate = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Prove backends correct, time them side by side, and print speedups and throughput.

    Shape options build a cross product and exclude --suite; what is not given is batch 1, one head, head size 128 and
    pto's lengths. --dtype and --causal go with both.
    """
    with data_stream() as stream:
        from attnbench import store

        if out is not None and resume is None:  # before the seconds that importing torch takes
            store.require_free(out)
        from attnbench import api, ledger
        from attnbench.ledger import Ledger
        from attnbench.protocol import make_protocol

        books = Ledger()
        if watch and (out or resume is not None or dry_run or as_json or no_isolate):
            raise AttnbenchError(
                "--watch makes one run after another, and goes with none of --out, --resume, --dry-run, --json, "
                "--no-isolate",
                "leave that option out",
            )
        how = make_protocol(protocol, warmup, iters, cache or "hot", budget)
        selection, suite_before, going_on = _selection(locals()), None, None
        if resume is not None:
            going_on, out = _run_to_resume(resume, out), None
            earlier = api.Earlier.of(going_on)
            asked = {"name": protocol, "warmup": warmup, "iters": iters, "cache": cache, "budget_s": budget}
            given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
            how = dataclasses.replace(earlier.protocol, **given)  # where it differs, the run is refused
            seed = earlier.seed if seed is None else seed
            timeout = earlier.timeout_s if timeout is None else timeout
            if not selection.names_problems:
                suite_before = earlier.suite
            selection = selection.over(earlier.selection)
        timeout = _timeout(timeout)
        settings = api.Settings(protocol=how, seed=seed or 0, timeout_s=timeout, isolate=not no_isolate)
        if watch:
            _end(running.watch(stream, selection, no_plugin, python, settings, verbose))
            return
        with books.spend(ledger.START):
            catalogue, the_plan = running.make_plan(selection, no_plugin, python, suite_before)
        if dry_run:
            running.print_plan(stream, the_plan, as_json)
            return
        outcome = running.execute(stream, the_plan, settings, catalogue, books, verbose, as_json, out, going_on)
        _end(outcome.exit_code)


@app.command()
def report(
    source: Annotated[str, typer.Argument(help="A run directory, or a CSV.", metavar="RUN|CSV")],
    format: Annotated[
        str, typer.Option(help="csv, or a format of tabulate: github, plain, latex, html, …", metavar="NAME")
    ] = running.DEFAULT_FORMAT,
    baseline: Baseline = None,
    device_name: Annotated[str | None, typer.Option(help="The device that a CSV's numbers are of.")] = None,
) -> None:
    """Print the tables of a run, or of a CSV with at least results.csv's first seven columns.

    Those are sq,sk,head_size,kernel,time_us,tflops,flops_total.
    """
    with data_stream() as out:
        from attnbench import store
        from attnbench.plan import choice
        from attnbench.report.tables import Tables
        from attnbench.report.text import CSV, FORMATS

        choice(format, FORMATS, "format")
        record = store.load(Path(source), device_name)
        tables = Tables(record, baseline)
        for warning in record.warnings:
            say(f"note: {warning}")
        for warning in tables.warnings if format == CSV else ():  # where there is no place for it
            say(warning)
        write(out, tables.render(format))


@app.command()
def env(no_plugin: NoPlugin = None, python: Python = None, as_json: AsJson = False) -> None:
    """Show the hardware and software that a run would record."""
    with data_stream() as out:
        from attnbench import environment

        facts = environment.fingerprint(running.discover(no_plugin, python))
        if as_json:
            write_json(out, facts)
            return
        rows = []
        for name, value in facts.items():
            nested = value if isinstance(value, dict) else None
            shown = ", ".join(f"{k} {v}" for k, v in nested.items()) if nested is not None else value
            rows.append([name, "none" if shown in (None, "") else str(shown)])
        write_table(out, ("what", "value"), rows)


@cache_app.command("show")
def cache_show() -> None:
    """Show where compiled kernels are kept, and which."""
    with data_stream() as out:
        from attnbench.jit import cache

        kept = cache.default()
        rows = [
            [e.key[:12], e.source, f"{e.size_bytes / 1024:.0f}", f"{e.created:%Y-%m-%d %H:%M:%S} UTC", e.compiler]
            for e in kept.entries()
        ]
        write_table(out, ("key", "source", "KiB", "built", "compiler"), rows)
        say(
            f"{kept.root}: {len(rows)} entries, {kept.size_bytes / 1024:.0f} KiB "
            f"of {settings.cache_limit_bytes() / 1024:.0f}"
        )


@cache_app.command("clear")
def cache_clear() -> None:
    """Delete all compiled kernels but those being built right now."""
    with data_stream():
        from attnbench.jit import cache

        kept = cache.default()
        freed = kept.clear()
        say(f"{kept.root}: freed {freed / 1024:.0f} KiB")


# --- helpers ----------------------------------------------------------------------------------------------------------


def _loaded_by(python: str) -> str:
    from attnbench.text import without_home

    return f"loaded by {without_home(python)}" if python else "loaded"


def _selection(options: dict[str, Any]) -> Selection:
    from attnbench.plan import Selection

    fields = {field.name for field in dataclasses.fields(Selection)}
    return Selection(**{name: value for name, value in options.items() if name in fields})


def _timeout(seconds: float | None) -> float:
    from attnbench import api, runner

    seconds = runner.DEFAULT_TIMEOUT_S if seconds is None else seconds
    api.require_timeout(seconds)
    return seconds


def _run_to_resume(resume: str, out: Path | None) -> Path:
    """The run that --resume names or, where it names none, --out."""
    if resume != NO_PATH:
        if out is not None:
            raise AttnbenchError("--out and --resume RUN exclude each other", "a run goes on where it is")
        return Path(resume)
    if out is None:
        raise AttnbenchError("--resume names no run", "attnbench run --resume RUN")
    return out


def _end(code: ExitCode) -> None:
    if code is not ExitCode.OK:
        raise typer.Exit(int(code))


def _with_values(words: Sequence[str]) -> list[str]:
    """The command line with `--resume` given a value where it has none: with --out it is a switch."""
    found: list[str] = []
    for word, following in zip(words, [*words[1:], "--"]):
        found += [word, NO_PATH] if word == "--resume" and following.startswith("-") else [word]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script. Turns every expected error into a line, a hint and an exit code."""
    words = _with_values(sys.argv[1:] if arguments is None else arguments)
    settings.leave_torch_alone()
    try:
        code = app(words, prog_name="attnbench", standalone_mode=False)
    except AttnbenchError as error:
        complain(error)
        code = int(error.exit_code)
    except Exception as error:
        # typer's own usage errors have no public type that all its versions share, but they all speak like this.
        if not hasattr(error, "format_message"):
            raise
        command = getattr(getattr(error, "ctx", None), "command_path", "attnbench")
        complain(AttnbenchError(str(error.format_message()), f"{command} --help shows the options"))
        code = int(ExitCode.USAGE)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
