"""Owns a run as a terminal sees it: what there is to run, what will be, how it goes, its tables, and --watch.

Knows no command, and decides nothing that the Python API does not.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from attnbench import settings
from attnbench.console import Progress, complain, say, write, write_json, write_table
from attnbench.errors import AttnbenchError, ExitCode, in_a_line

if TYPE_CHECKING:
    from attnbench.api import Outcome, Settings
    from attnbench.ledger import Ledger
    from attnbench.plan import Plan, Selection
    from attnbench.problem import Suite
    from attnbench.registry import Catalogue, EntryPointRef

DEFAULT_FORMAT = "github"
WATCH_EVERY_S = 0.3
"""How often --watch looks at the sources."""
BUSY_SHARE = 0.1
"""With one of two cores taken, OpenMP's barriers made a 40 µs call take 8 ms."""


def discover(
    no_plugin: Sequence[str] | None, python: Sequence[str] | None, files: Sequence[EntryPointRef] = ()
) -> Catalogue:
    """All plugins and backends, `python` being what --python was given: NAME=EXE. Raises AttnbenchError."""
    from attnbench import discovery

    if os.environ.get(settings.AUTOLOAD) == "1":  # or every plugin would fail at it, each in other words
        try:
            import torch  # noqa: F401
        except Exception as error:
            why = in_a_line(error.__cause__ or error)
            hint = "unset it: attnbench imports a device's package itself, and tells why it cannot"
            raise AttnbenchError(f"under {settings.AUTOLOAD}=1 torch cannot be imported: {why}", hint) from error
    return discovery.discover(frozenset(no_plugin or ()), _interpreters(python or ()), files)


def _interpreters(words: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        name, _, executable = (part.strip() for part in word.partition("="))
        if not name or not executable:
            raise AttnbenchError(
                f"--python must be NAME=EXE, not {word!r}", "for example --python flash=/envs/flash/bin/python"
            )
        if name in found:
            raise AttnbenchError(f"--python gives {name} two interpreters", "give one")
        found[name] = executable
    return found


def make_plan(
    selection: Selection,
    no_plugin: Sequence[str] | None,
    python: Sequence[str] | None,
    suite: Suite | None = None,
) -> tuple[Catalogue, Plan]:
    """What a run of the selection will do, after telling which plugins failed. Raises AttnbenchError."""
    from attnbench import plan

    catalogue = discover(no_plugin, python, plan.files_of(selection))
    tell_failures(catalogue)
    return catalogue, plan.make(selection, catalogue, suite)


def execute(
    stream: TextIO,
    the_plan: Plan,
    settings: Settings,
    catalogue: Catalogue,
    books: Ledger,
    verbose: bool,
    as_json: bool = False,
    out: Path | None = None,
    resume: Path | None = None,
) -> Outcome:
    """Make a run, tell how it goes, and print its tables."""
    from attnbench import api, environment, store
    from attnbench.report.tables import Tables, json_text

    how = settings.protocol
    limit = f", at most {how.budget_s:g} s of timing for each" if how.name == "adaptive" else ""
    tell_plan(the_plan, f"protocol {how.name}, {how.cache} cache{limit}")
    for limitation in environment.limitations():
        say(f"note: {limitation}")
    busy = environment.busy_share()
    if busy is not None and busy > BUSY_SHARE:
        say(f"note: other programs keep the processor {busy:.0%} busy: times will be wrong; close them")
    with Progress(verbose) as observer:
        outcome = api.execute(
            the_plan,
            settings,
            catalogue,
            observer,
            command=environment.command(),
            out=out,
            resume=resume,
            books=books,
        )
    if verbose:
        say(f"{outcome.books}")
    say(f"the run is in {outcome.path}")
    if outcome.results:
        tables = Tables(store.load(outcome.path))
        write(stream, json_text(tables.record.rows) if as_json else tables.render(DEFAULT_FORMAT))
    elif as_json:
        write(stream, "[]")
    if outcome.interrupted:
        what = "what was finished is kept and shown" if outcome.results else "nothing was finished"
        # A run keeps names, and that of a file that is installed nowhere says nothing.
        files = {
            entry.name: f"{os.path.relpath(entry.backend.source.file)}:{entry.backend.source.name}"
            for entry in the_plan.entries
            if entry.backend is not None and entry.backend.source.file
        }
        words = ",".join(files.get(entry.name, entry.name) for entry in the_plan.entries)
        named = f" --backends {shlex.quote(words)}" if files else ""
        complain(
            AttnbenchError(
                f"interrupted: {what}", f"attnbench run --resume {shlex.quote(str(outcome.path))}{named} goes on"
            )
        )
    elif outcome.exit_code is ExitCode.NOTHING_PASSED:
        complain(AttnbenchError("nothing passed, so there is no time to show", "the details say why"))
    return outcome


def watch(
    stream: TextIO,
    selection: Selection,
    no_plugin: Sequence[str] | None,
    python: Sequence[str] | None,
    settings: Settings,
    verbose: bool,
) -> ExitCode:
    """Make one run after another, each when a source of the plan's backends changed, until an interrupt ends one."""
    from attnbench import plan, sources, store
    from attnbench.ledger import Ledger
    from attnbench.report.difference import difference
    from attnbench.report.tables import Tables

    places = tuple(source.file for source in plan.files_of(selection))
    before: Tables | None = None
    while True:
        seen = sources.snapshot(places)
        try:
            catalogue, the_plan = make_plan(selection, no_plugin, python)
            known, names = places, {entry.name for entry in the_plan.entries}
            # Also of those that are not available, which an edit may change, and of what an edit broke.
            now = (place for p in catalogue.plugins if names & set(p.backends) for place in p.sources)
            places = tuple(dict.fromkeys([*known, *now]))
            if places != known:
                seen = sources.snapshot(places)
            outcome = execute(stream, the_plan, settings, catalogue, Ledger(), verbose)
        except AttnbenchError as error:
            if not places:  # there is nothing to wait for
                raise
            complain(error)
        else:
            if outcome.interrupted:
                return outcome.exit_code
            if outcome.results:
                # The same baseline in each, where there is one, also where it alone has a time.
                baseline = the_plan.timed_baseline if the_plan.timed_baseline in names else None
                tables = Tables(store.load(outcome.path), baseline)
                if before is not None:
                    write(stream, f"\n{difference(before, tables)}")
                before = tables
        say(f"\nwatching {len(seen)} files; Ctrl-C ends it")
        changed = sources.wait_for_change(places, seen, WATCH_EVERY_S)
        say(f"changed: {', '.join(path.name for path in changed)}\n")


def tell_failures(catalogue: Catalogue) -> None:
    for plugin in catalogue.failures:
        say(f"note: plugin {plugin.source.name} of {plugin.source.distribution} failed to load: {plugin.error_line}")
        if plugin.source.file and plugin.error != plugin.error_line:  # its author is at the keyboard
            say(f"{plugin.error}")


def tell_plan(the_plan: Plan, how: str) -> None:
    from attnbench.report.text import counted

    dtypes = ", ".join(dict.fromkeys(problem.dtype for problem in the_plan.suite))
    names = ", ".join(entry.name for entry in the_plan.entries)
    cores = f", {the_plan.info.cores} cores" if the_plan.info.cores else ""
    say(f"{the_plan.info.kind}: {the_plan.info.name}{cores}")
    problems = counted(len(the_plan.suite), "problem")
    say(f"suite {the_plan.suite.name}: {problems}, {dtypes}; {how}; {names}")


def print_plan(out: TextIO, the_plan: Plan, as_json: bool) -> None:
    rows = [
        (problem.case_id, entry.name, entry.status and entry.status.value, entry.reason)
        for problem in the_plan.suite
        for entry in the_plan.entries
    ]
    if as_json:
        names = ("case_id", "kernel", "status", "reason")
        write_json(out, [dict(zip(names, (*case, status, reason or None))) for *case, status, reason in rows])
        return
    shown = [[case, kernel, status or "to run", reason] for case, kernel, status, reason in rows]
    write_table(out, ("case", "kernel", "state", "reason"), shown)
