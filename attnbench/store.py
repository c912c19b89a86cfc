"""Owns a run on disk: its directory, its append-only record, and reading it back. Knows no table.

`results.jsonl` is the record: a line a Result, flushed to the disk before the next case starts. `blocks.jsonl` holds
the blocks of problems that are not finished, a line a block, and is gone when the run is. `results.csv` and `report.md`
are made from both and replaced whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import itertools
import json
import os
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnbench.blocks import Block, How, Progress, Verdict
from attnbench.devices import DeviceInfo
from attnbench.errors import AttnbenchError
from attnbench.problem import Problem
from attnbench.result import Result
from attnbench.rows import SCHEMA_VERSION, Row, csv_text, load_csv, row

NOTHING_RAN = "nothing was run; name another folder with --out"
RUN_FILE, RECORD_FILE, CSV_FILE, REPORT_FILE = "run.json", "results.jsonl", "results.csv", "report.md"
JOURNAL_FILE = "blocks.jsonl"


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
    """Writes one run directory as the run goes; every finished Result and block survives whatever happens next."""

    def __init__(self, path: Path, header: Mapping[str, Any], device: DeviceInfo, *, fresh: bool = False) -> None:
        """Start a run in `path`, which must be new or an empty folder; with `fresh`, new.

        Raises AttnbenchError where it is something else or cannot be written, and FileExistsError where it had to be
        new and is not.
        """
        self.path = path
        self._header = header
        self._device = device
        self._results: list[Result] = []
        self._rows: dict[tuple[str, str], Row] = {}
        """Each made once: percentiles of all calls take long."""
        self._blocks = 0
        made = _make(path, fresh)
        try:
            write_atomically(path / RUN_FILE, json.dumps(header, indent=2, ensure_ascii=False) + "\n")
            write_atomically(path / RECORD_FILE, "")
            write_atomically(path / JOURNAL_FILE, "")
            self._write_csv()
            self._lock = _lock(path)
        except AttnbenchError as error:
            if made:
                _unmake(path, made)
            raise AttnbenchError(error.message, NOTHING_RAN) from error

    @classmethod
    def reopen(cls, path: Path) -> tuple[RunWriter, dict[str, Progress]]:
        """Go on with a run that ended early, and tell how far it had got, by case_id.

        What a last line was cut to is dropped. Raises AttnbenchError where it is no run, is still being written, or
        cannot be read or written.
        """
        writer = cls.__new__(cls)
        header, device = _header_and_device(path)
        writer.path, writer._header, writer._device = path, header, device
        writer._lock = _lock(path)
        for name in (RECORD_FILE, JOURNAL_FILE):
            _cut_half_line(path / name)
        results = _parse_record(path / RECORD_FILE, device)
        writer._results = results
        writer._rows = {result.key: row(result, device) for result in results}
        found = {case: state for case, (state, _) in _parse_journal(path / JOURNAL_FILE).items()}
        writer._blocks = sum(len(state.blocks) for state in found.values())
        for result in results:
            state = found.setdefault(result.problem.case_id, Progress(problem=result.problem))
            state.results[result.backend] = result
            state.verdicts.pop(result.backend, None)
        return writer, found

    def add(self, results: Sequence[Result]) -> None:
        """Append results to the record and renew the CSV. Raises AttnbenchError, the record ending at a whole line.

        An interrupt waits until both hold the results.
        """
        with _interrupts_wait():
            _append(self.path / RECORD_FILE, b"".join(_line(result.to_json()) for result in results))
            self._results += results
            self._rows.update({result.key: row(result, self._device) for result in results})
            self._write_csv()

    def add_block(self, progress: Progress, how: How) -> None:
        """Append a problem's newest block to the journal. Raises AttnbenchError, the journal ending at a whole line."""
        line = {
            "problem": progress.problem.to_json(),
            "number": len(progress.blocks) - 1,
            "verdicts": {name: dataclasses.asdict(verdict) for name, verdict in progress.verdicts.items()},
            "how": dataclasses.asdict(how),
            "block": progress.blocks[-1].to_json(),
        }
        with _interrupts_wait():
            _append(self.path / JOURNAL_FILE, _line(line))
            self._blocks += 1

    def _write_csv(self) -> None:
        ordered = in_plan_order(self._results, self._header)
        write_atomically(self.path / CSV_FILE, csv_text(self._rows[result.key] for result in ordered))

    def finish(self, report: str, rows: Iterable[Row], *, whole: bool) -> None:
        """Write report.md and the CSV of `rows`; with `whole` nothing is missing, and the journal goes."""
        write_atomically(self.path / CSV_FILE, csv_text(rows))
        write_atomically(self.path / REPORT_FILE, report)
        if whole:
            (self.path / JOURNAL_FILE).unlink(missing_ok=True)

    def close(self) -> None:
        """Let another attnbench go on with the run."""
        os.close(self._lock)

    @property
    def has_something(self) -> bool:
        """Whether there is anything to report of: a result, or a block of one."""
        return bool(self._results or self._blocks)

    @property
    def header(self) -> Mapping[str, Any]:
        return self._header


def _append(path: Path, data: bytes) -> None:
    """Append whole lines, flushed to the disk, or nothing. Raises AttnbenchError."""
    try:
        # Unbuffered: a buffer would write its rest, at the old place, when a file that was just cut is closed.
        with open(path, "r+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), size)
                raise
    except OSError as error:
        raise _cannot("write", path, error) from error


def _cut_half_line(path: Path) -> None:
    try:
        data = path.read_bytes() if path.exists() else b""
        whole = data.rpartition(b"\n")
        with open(path, "ab") as file:
            file.truncate(len(whole[0]) + len(whole[1]))
    except OSError as error:
        raise _cannot("write", path, error) from error


def _lock(path: Path) -> int:
    """A descriptor whose lock says that somebody writes the run; the system lets go of it with the process."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _cannot("read", path, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise AttnbenchError(f"{path} is being written by another attnbench", "wait until it has ended") from error
    except OSError:  # a file system without locks
        pass
    return descriptor


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
    require_free(path)
    return []


def require_free(path: Path) -> None:
    """Raises AttnbenchError where a run cannot be made at `path`, as far as that can be told without making one."""
    try:
        if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
            what = "holds a run already" if (path / RUN_FILE).is_file() else "exists and is not a run"
            raise AttnbenchError(f"{path} {what}", "name a new or an empty folder with --out")
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _cannot("make", path, error, NOTHING_RAN) from error


def _unmake(path: Path, made: Sequence[Path]) -> None:
    """Remove a run that could not begin; nothing but its own files, and folders that are empty then."""
    with contextlib.suppress(OSError):
        for name in (RUN_FILE, RECORD_FILE, JOURNAL_FILE, CSV_FILE):
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


def _line(data: Mapping[str, Any]) -> bytes:
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
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
    gaps: Gaps | None = None
    """What an interrupted run has not done; None where nothing is missing."""


@dataclass(frozen=True)
class Gaps:
    """Cases, each a problem and a backend, that a run was asked for and has not finished."""

    missing: int
    """Of which nothing is known."""
    short: int
    """With fewer blocks than asked for."""
    of: int


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


def read_header(path: Path) -> dict[str, Any]:
    """run.json of a run. Raises AttnbenchError where there is none that can be read."""
    return _header_and_device(path)[0]


def _header_and_device(path: Path) -> tuple[dict[str, Any], DeviceInfo]:
    if not (path / RUN_FILE).is_file():
        raise AttnbenchError(
            f"{path} is not a run: it has no {RUN_FILE}", "a run is the directory that attnbench run --out made"
        )
    try:
        header = json.loads(_decode(path / RUN_FILE, _read(path / RUN_FILE)))
        if header["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"its schema_version is {header['schema_version']!r}, not {SCHEMA_VERSION}")
        return header, DeviceInfo.from_json(header["device"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AttnbenchError(f"{path / RUN_FILE} cannot be read: {_words(error)}") from error


def _load_run(path: Path) -> Record:
    header, device = _header_and_device(path)
    results = _parse_record(path / RECORD_FILE, device)
    warnings = [f"{path / name}: the last line is cut and was dropped" for name in _cut_files(path)]
    done = {result.key for result in results}
    unfinished = [
        result
        for state, how in _parse_journal(path / JOURNAL_FILE).values()
        for result in state.timed(how)
        if result.key not in done
    ]
    if not results and not unfinished:
        raise AttnbenchError(f"{path / RECORD_FILE} holds no results", "the run ended before its first case did")
    ordered = in_plan_order([*results, *unfinished], header)
    return Record(
        path,
        tuple(row(result, device) for result in ordered),
        device,
        tuple(ordered),
        header,
        tuple(warnings),
        _gaps(header, {result.key for result in ordered}, len(unfinished)),
    )


def _gaps(header: Mapping[str, Any], known: set[tuple[str, str]], short: int) -> Gaps | None:
    try:
        asked = set(itertools.product(header["suite"]["cases"], header["backends"]))
    except (KeyError, TypeError):  # of a version that did not record it
        asked = known
    missing = len(asked - known)
    return Gaps(missing, short, len(asked | known)) if missing or short else None


def _cut_files(path: Path) -> list[str]:
    """Which of the files that grow by lines end in half a one."""
    names = [name for name in (RECORD_FILE, JOURNAL_FILE) if (path / name).exists()]
    return [name for name in names if (data := _read(path / name)) and not data.endswith(b"\n")]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    whole, _, _ = _read(path).rpartition(b"\n")  # before decoding: a cut may go through a character
    return enumerate(_decode(path, whole).split("\n") if whole else [], 1)


def _parse_record(path: Path, device: DeviceInfo) -> list[Result]:
    results: dict[tuple[str, str], Result] = {}
    for number, line in _lines(path):
        try:
            result = Result.from_json(json.loads(line))
            row(result, device)  # a number that makes no row is no result
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise AttnbenchError(f"{path}, line {number} is no result: {_words(error)}") from error
        if result.key in results:
            raise AttnbenchError(f"{path}, line {number}: {' on '.join(result.key)} is there twice")
        results[result.key] = result
    return list(results.values())


def _parse_journal(path: Path) -> dict[str, tuple[Progress, How]]:
    """How far each problem got, by case_id. The newest line of a problem says which backends are still in it."""
    found: dict[str, tuple[Progress, How]] = {}
    for number, line in _lines(path) if path.exists() else ():
        try:
            data = json.loads(line)
            problem = Problem.from_json(data["problem"])
            state, how = found.setdefault(problem.case_id, (Progress(problem=problem), How(**data["how"])))
            state.verdicts = {name: Verdict.from_json(verdict) for name, verdict in data["verdicts"].items()}
            block = Block.from_json(data["block"])
            if data["number"] != len(state.blocks) or not set(state.verdicts) <= set(block.laps):
                raise ValueError(f"block {data['number']} of {problem.case_id} does not follow the last")
            state.blocks.append(block)
            state.timed(how)
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise AttnbenchError(f"{path}, line {number} is no block: {_words(error)}") from error
    return found


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
