"""Owns what a person or a pipe sees of a command: data on stdout, all else on stderr. Knows no command."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO, cast

from attnbench.errors import AttnbenchError, ExitCode
from attnbench.text import one_line, printable

if TYPE_CHECKING:
    from attnbench.problem import Problem
    from attnbench.result import Result


class _Stderr:
    """A stream like stderr whose writes never fail: where nobody reads it any more, what is told goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, words: str) -> int:
        try:
            self._stream.write(words)
            self._stream.flush()
        except OSError:
            _to_nowhere(2)
        return len(words)

    def flush(self) -> None:
        self.write("")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _to_nowhere(descriptor: int) -> None:
    """Point a descriptor that refuses data at /dev/null, so that what is buffered for it fails nobody later."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


class Progress:
    """Tells on stderr how far a run is: a line a problem, and on a terminal a bar that moves between problems only."""

    def __init__(self, verbose: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._verbose = verbose
        # rich takes a reader that left for a reason to end the process.
        self._console = Console(file=cast(TextIO, _Stderr(sys.stderr)), highlight=False)
        # No refresh thread: it would draw, and take a core, while a backend is timed.
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            console=self._console,
            auto_refresh=False,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)
        self._prefix = ""

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def started(self, problem: Problem, index: int, total: int, block: int) -> None:
        self._prefix = f"[{index + 1:>{len(str(total))}}/{total}]"
        if block and not index and not self._console.is_terminal:
            self._line(f"block {block + 1}: {total} problem{'s' if total > 1 else ''}")
        self._bar.update(self._task, total=total, completed=index, description=f"block {block + 1}, {problem.case_id}")
        self._bar.refresh()

    def ended(self, results: Sequence[Result]) -> None:
        cases = [
            f"{r.backend} {r.measurement.time_us:.1f} µs" if r.measurement else f"{r.backend} {r.status}"
            for r in results
        ]
        self._line(f"{self._prefix} {results[0].problem.case_id}: {', '.join(cases)}")
        for result in results:
            if result.reason and (self._verbose or result.status not in _QUIET):
                self._line(f"      {result.backend}: {result.reason}")

    def _line(self, words: str) -> None:
        from rich.text import Text as RichText

        # Only where it must: one_line also takes an indent away.
        self._console.print(RichText(one_line(words) if "\n" in words else printable(words)), soft_wrap=True)


_QUIET = frozenset({"PASSED", "UNSUPPORTED", "UNAVAILABLE", "SKIPPED"})


@contextlib.contextmanager
def data_stream() -> Iterator[TextIO]:
    """The stream for data: what was stdout. Everything else that writes to stdout meanwhile, plugins and compilers
    too, lands on stderr, so that what is piped on is data alone."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    out = os.fdopen(os.dup(saved), "w", encoding=sys.stdout.encoding, errors="replace")
    try:
        yield out
    except KeyboardInterrupt as interrupt:  # typer would end the process without a word
        raise AttnbenchError("interrupted", exit_code=ExitCode.INTERRUPTED) from interrupt
    finally:
        with contextlib.suppress(OSError):  # `write` told already
            out.close()
        try:
            sys.stdout.flush()
        except OSError:
            _to_nowhere(1)
            sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


def write(out: TextIO, words: str) -> None:
    try:
        out.write(words if words.endswith("\n") else f"{words}\n")
        out.flush()
    except BrokenPipeError:  # the reader of our output left; what it read was fine
        pass
    except OSError as error:
        raise AttnbenchError(f"cannot write to stdout: {error.strerror or error}") from error


def write_json(out: TextIO, data: object) -> None:
    write(out, json.dumps(data, indent=2))


def write_table(out: TextIO, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from attnbench.report.text import table

    write(out, table(headers, rows, "simple", left=headers))


def say(words: str) -> None:
    _Stderr(sys.stderr).write(f"{printable(words)}\n")


def complain(error: AttnbenchError) -> None:
    say(f"error: {one_line(error.message)}")
    if error.hint:
        say(f"hint: {error.hint}")
