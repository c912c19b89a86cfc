"""Owns a run on disk: its directory, its append-only record, and reading it back. Knows no table.

`results.jsonl` is the record: a line a Result, flushed to the disk before the next case starts. `results.csv` and
`report.md` are made from it and replaced whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnbench.devices import DeviceInfo
from attnbench.errors import AttnbenchError
from attnbench.result import Result
from attnbench.rows import SCHEMA_VERSION, Row, csv_text, load_csv, row

NOTHING_RAN = "nothing was run; name another folder with --out"
RUN_FILE, RECORD_FILE, CSV_FILE, REPORT_FILE = "run.json", "results.jsonl", "results.csv", "report.md"


def write_atomically(path: Path, text: str) -> None:
    """Put `text` at `path` whole or not at all. Raises AttnbenchError where the file system refuses."""
    try:
        handle, staged = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            # An argument or a path may hold bytes that are no UTF-8; they must not stop a run.
            with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                file.write(text)
            os.chmod(staged, 0o644)
            os.replace(staged, path)
        except BaseException:
            os.unlink(staged)
            raise
    except OSError as error:
        raise _cannot("write", path, error) from error


class RunWriter:
    """Writes one run directory as the run goes; every finished Result survives whatever happens next."""

    def __init__(self, path: Path, header: Mapping[str, Any], device: DeviceInfo, *, fresh: bool = False) -> None:
        """Start a run in `path`, which must be new or an empty folder; with `fresh`, new.

        Raises AttnbenchError where it is something else or cannot be written, and FileExistsError where it had to be
        new and is not.
        """
        self.path = path
        self._header = header
        self._device = device
        self._results: list[Result] = []
        made = _make(path, fresh)
        try:
            write_atomically(path / RUN_FILE, json.dumps(header, indent=2, ensure_ascii=False) + "\n")
            write_atomically(path / RECORD_FILE, "")
            self._write_csv()
        except AttnbenchError as error:
            if made:
                _unmake(path, made)
            raise AttnbenchError(error.message, NOTHING_RAN) from error

    def add(self, results: Iterable[Result]) -> None:
        """Append results to the record and renew the CSV. Raises AttnbenchError, the record ending at a whole line.

        An interrupt waits until both hold the results.
        """
        with _interrupts_wait():
            self._add(list(results))

    def _add(self, results: list[Result]) -> None:
        record = self.path / RECORD_FILE
        data = b"".join(map(_line, results))
        try:
            # Unbuffered: a buffer would write its rest, at the old place, when a file that was just cut is closed.
            with open(record, "r+b", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                try:
                    while data:
                        data = data[file.write(data) :]
                    os.fsync(file.fileno())
                except OSError:
                    os.ftruncate(file.fileno(), size)
                    raise
        except OSError as error:
            raise _cannot("write", record, error) from error
        self._results += results
        self._write_csv()

    def _write_csv(self) -> None:
        ordered = in_plan_order(self._results, self._header)
        write_atomically(self.path / CSV_FILE, csv_text(row(result, self._device) for result in ordered))

    def finish(self, report: str) -> None:
        """Write report.md."""
        write_atomically(self.path / REPORT_FILE, report)

    @property
    def results(self) -> tuple[Result, ...]:
        return tuple(self._results)


def _make(path: Path, fresh: bool) -> list[Path]:
    """Make the folder of a run, and tell which folders were made, the innermost first."""
    try:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True)
        return missing
    except FileExistsError as error:
        if not os.path.lexists(path):
            raise _cannot("make", path, error, NOTHING_RAN) from error
        if fresh:
            raise
    except OSError as error:
        raise _cannot("make", path, error, NOTHING_RAN) from error
    try:
        occupied = not path.is_dir() or any(path.iterdir())
    except OSError as error:
        raise _cannot("read", path, error, NOTHING_RAN) from error
    if occupied:
        what = "holds a run already" if (path / RUN_FILE).is_file() else "exists and is not a run"
        raise AttnbenchError(f"{path} {what}", "name a new or an empty folder with --out")
    return []


def _unmake(path: Path, made: Sequence[Path]) -> None:
    """Remove a run that could not begin; nothing but its own files, and folders that are empty then."""
    with contextlib.suppress(OSError):
        for name in (RUN_FILE, RECORD_FILE, CSV_FILE):
            (path / name).unlink(missing_ok=True)
        for folder in made:
            folder.rmdir()


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Hold a Ctrl-C back until the block is over. Only the main thread gets any."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or handler is None:
        yield
        return
    came = False

    def note(*_: object) -> None:
        nonlocal came
        came = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def _line(result: Result) -> bytes:
    text = json.dumps(result.to_json(), ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
    return text.encode(errors="backslashreplace")  # of half a surrogate pair this makes the escape that JSON has for it


def _cannot(
    verb: str, path: Path, error: OSError, hint: str = "what was finished before is kept; try another --out"
) -> AttnbenchError:
    return AttnbenchError(f"cannot {verb} {path}: {error.strerror or error}", hint)


@dataclass(frozen=True)
class Record:
    """What a run directory or a CSV holds."""

    source: Path
    rows: tuple[Row, ...]
    device: DeviceInfo
    results: tuple[Result, ...] = ()
    """Empty for a CSV, which holds no raw times."""
    header: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """run.json, empty for a CSV."""
    warnings: tuple[str, ...] = ()


def load(path: Path, device_name: str | None = None) -> Record:
    """Read a run directory, or a CSV with at least results.csv's first seven columns.

    `device_name` says what device a CSV's numbers are of. Raises AttnbenchError naming what is wrong.
    """
    if os.path.isdir(path):  # which, unlike path.is_dir(), raises for no name
        if device_name is not None:
            raise AttnbenchError(f"{path} is a run, which names its device itself", "--device-name is for a CSV")
        return _load_run(path)
    rows, device, warnings = load_csv(path, _decode(path, _read(path)), device_name)
    return Record(path, tuple(rows), device, warnings=tuple(warnings))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AttnbenchError(f"cannot read {path}: {error.strerror or error}") from error


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise AttnbenchError(f"{path} is not UTF-8 text", "give a run directory or a CSV") from error


def _load_run(path: Path) -> Record:
    if not (path / RUN_FILE).is_file():
        raise AttnbenchError(f"{path} is not a run: it has no {RUN_FILE}", "give a run directory or a CSV")
    try:
        header = json.loads(_decode(path / RUN_FILE, _read(path / RUN_FILE)))
        if header["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"its schema_version is {header['schema_version']!r}, not {SCHEMA_VERSION}")
        device = DeviceInfo.from_json(header["device"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AttnbenchError(f"{path / RUN_FILE} cannot be read: {_words(error)}") from error
    rows, recorded, warnings = _parse_record(path / RECORD_FILE, device)
    results = in_plan_order(recorded, header)
    return Record(path, tuple(rows[r.key] for r in results), device, tuple(results), header, warnings)


def _parse_record(path: Path, device: DeviceInfo) -> tuple[dict[tuple[str, str], Row], list[Result], tuple[str, ...]]:
    whole, _, cut = _read(path).rpartition(b"\n")  # before decoding: the cut may go through a character
    warnings = (f"{path}: the last line is cut and was dropped",) if cut else ()
    lines = _decode(path, whole).split("\n") if whole else []
    results: dict[tuple[str, str], Result] = {}
    rows: dict[tuple[str, str], Row] = {}
    for number, line in enumerate(lines, 1):
        try:
            result = Result.from_json(json.loads(line))
            shown = row(result, device)
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise AttnbenchError(f"{path}, line {number} is no result: {_words(error)}") from error
        if result.key in results:
            raise AttnbenchError(f"{path}, line {number}: {' on '.join(result.key)} is there twice")
        results[result.key], rows[result.key] = result, shown
    if not results:
        raise AttnbenchError(f"{path} holds no results", "the run ended before its first case did")
    return rows, list(results.values()), warnings


def in_plan_order(results: Iterable[Result], header: Mapping[str, Any]) -> list[Result]:
    """Results as the run meant to take them, by problem and then by backend: the record has them as they ended."""
    try:
        cases = {case: index for index, case in enumerate(header["suite"]["cases"])}
        backends = {name: index for index, name in enumerate(header["backends"])}
    except (KeyError, TypeError):
        return list(results)
    return sorted(
        results,
        key=lambda r: (cases.get(r.problem.case_id, len(cases)), backends.get(r.backend, len(backends))),
    )


def _words(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)
