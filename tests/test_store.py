"""attnbench.store: what survives on disk, and what is refused when it is read back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import DEVICE, HOSTILE, ROOT, failed, header, passed, python

from attnbench import store
from attnbench.blocks import Block, How, Lap, Progress, Seen, Verdict
from attnbench.errors import AttnbenchError, ExitCode
from attnbench.report.tables import Tables
from attnbench.result import Result, Status
from attnbench.rows import csv_text, row
from attnbench.store import RunWriter

FILES = ["blocks.jsonl", "results.csv", "results.jsonl", "run.json"]


def case(seqlen_q: int, backend: str = "jit_flash", reason: str = "") -> Result:
    if reason:
        return failed(backend, reason=reason, seqlen_q=seqlen_q)
    return passed(backend, problem={"seqlen_q": seqlen_q})


_started: list[RunWriter] = []


def start(path: Path, *, fresh: bool = False, **more: Any) -> RunWriter:
    """A run that is closed with its test."""
    _started.append(RunWriter(path, header() | more, DEVICE, fresh=fresh))
    return _started[-1]


@pytest.fixture(autouse=True)
def _nothing_stays_open(tmp_path: Path) -> Iterator[None]:
    """A run holds a descriptor until it is closed, and workers of later tests get the numbers after all that are."""
    yield
    while _started:
        _started.pop().close()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that the folder was read by
            assert not os.readlink(f"/proc/self/fd/{name}").startswith(str(tmp_path))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three results."""
    writer = start(tmp_path / "run")
    writer.add([case(1), case(1, "sdpa", "it broke: µ")])
    writer.add([case(2)])
    return writer.path


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(AttnbenchError) as caught:
        store.load(path, **options)
    assert caught.value.exit_code == ExitCode.USAGE
    assert "\n" not in caught.value.message
    return caught.value.message


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_new_run_is_readable_files_from_the_start(tmp_path: Path) -> None:
    writer = start(tmp_path / "deep" / "er" / "run")
    assert sorted(p.name for p in writer.path.iterdir()) == FILES
    assert json.loads((writer.path / "run.json").read_text()) == header()
    assert (writer.path / "results.jsonl").read_text() == ""
    assert (writer.path / "results.csv").read_text() == csv_text([])
    assert {p.stat().st_mode & 0o777 for p in writer.path.iterdir()} == {0o644}


def test_each_add_is_in_record_and_csv_at_once(tmp_path: Path) -> None:
    writer = start(tmp_path / "run")
    results: list[Result] = []
    for batch in ([case(1), case(1, "sdpa", "it broke")], [case(2)], []):
        writer.add(batch)
        results += batch
        lines = (writer.path / "results.jsonl").read_text(encoding="utf-8").splitlines()
        assert [Result.from_json(json.loads(line)) for line in lines] == results
        assert (writer.path / "results.csv").read_text(encoding="utf-8") == csv_text(row(r, DEVICE) for r in results)
    assert sorted(p.name for p in writer.path.iterdir()) == FILES, "no staged file is left"


def test_what_is_written_is_loaded_the_same(run: Path) -> None:
    record = store.load(run)
    assert record.results == (case(1), case(1, "sdpa", "it broke: µ"), case(2))
    assert record.rows == tuple(row(result, DEVICE) for result in record.results)
    assert (record.source, record.device, record.header, record.warnings) == (run, DEVICE, header(), ())


def test_finish_writes_the_report(run: Path) -> None:
    store.write_atomically(run / "report.md", "old")
    writer = start(run.parent / "other")
    writer.finish("# µ\n", [row(case(1), DEVICE)], whole=True)
    assert (writer.path / "report.md").read_text(encoding="utf-8") == "# µ\n"


@pytest.mark.parametrize("reason", [*HOSTILE, "not a character: \udcff"])
def test_any_text_of_a_plugin_is_recorded_and_read_back(reason: str, tmp_path: Path) -> None:
    writer = start(tmp_path / "run")
    writer.add([case(1, reason=reason)])
    writer.add([case(2)])
    assert store.load(writer.path).results == (case(1, reason=reason), case(2))


def test_an_argument_that_is_no_utf8_does_not_stop_a_run(tmp_path: Path) -> None:
    command = ["attnbench", "run", "--out", "x\udcff"]
    start(tmp_path / "run", command=command).add([case(1)])
    assert store.load(tmp_path / "run").header["command"] == command


def occupied_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("mine")


def a_run(path: Path) -> None:
    start(path).add([case(1)])


def a_file(path: Path) -> None:
    path.write_text("mine")


def a_broken_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (occupied_folder, "exists and is not a run"),
        (a_run, "holds a run already"),
        (a_file, "exists and is not a run"),
        (a_broken_link, "exists and is not a run"),
    ],
)
def test_what_exists_is_refused_and_left_alone(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    make(path)
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(AttnbenchError) as caught:
        start(path)
    assert caught.value.message == f"{path} {message}"
    assert "--out" in (caught.value.hint or "")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    a_run(tmp_path)
    assert store.load(tmp_path).results == (case(1),)


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AttnbenchError, match=r"^cannot make .*/file/run: Not a directory$"):
        start(tmp_path / "file" / "run")


def test_a_folder_that_vanishes_is_one_clear_error(run: Path, tmp_path: Path) -> None:
    writer = start(tmp_path / "other")
    for path in writer.path.iterdir():
        path.unlink()
    writer.path.rmdir()
    with pytest.raises(AttnbenchError, match=r"cannot write .*: No such file or directory"):
        writer.add([case(1)])
    with pytest.raises(AttnbenchError, match=r"cannot write .*: No such file or directory"):
        writer.finish("text", [], whole=True)


def test_write_atomically_leaves_the_old_file_where_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    store.write_atomically(path, "old")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(AttnbenchError, match=r"cannot write .*file: No space left on device"):
        store.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


WRITE_ON = """
import sys
from pathlib import Path
from helpers import DEVICE, header
from test_store import case
from attnbench.store import RunWriter
writer = RunWriter(Path(sys.argv[1]), header(), DEVICE)
"""
TESTS = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])}


def test_every_finished_result_survives_kill_9(tmp_path: Path) -> None:
    code = WRITE_ON + "for n in range(1, 10**6):\n    writer.add([case(n)])\n    print(n, flush=True)\n"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True, env=TESTS
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 10:
                process.send_signal(signal.SIGKILL)
        told = int(line)
    assert process.returncode == -signal.SIGKILL
    results = store.load(tmp_path / "run").results
    assert len(results) >= told >= 10
    assert results == tuple(case(n) for n in range(1, len(results) + 1))


LIMITED = """
import resource
from attnbench.errors import AttnbenchError
record = writer.path / "results.jsonl"
writer.add([case(1)])
size = record.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + size // 2, resource.RLIM_INFINITY))
{prepare}
try:
    writer.add([case(2), case(3)])
except AttnbenchError as error:
    print(error.message)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(record.stat().st_size == size, record.read_bytes().count(b"\\0"))
    writer.add([case(4)])
"""
ROOM_COMES_BACK = """
import os
truncate = os.ftruncate
def truncate_and_make_room(*args):
    truncate(*args)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
os.ftruncate = truncate_and_make_room
"""


@pytest.mark.parametrize("prepare", ["", ROOM_COMES_BACK], ids=["limit stays", "room comes back at once"])
def test_a_write_that_fails_half_way_leaves_whole_lines_and_one_error(prepare: str, tmp_path: Path) -> None:
    answer = python(WRITE_ON + LIMITED.format(prepare=prepare), tmp_path / "run", env=TESTS)
    assert answer.err == ""
    record = tmp_path / "run" / "results.jsonl"
    assert answer.out.splitlines() == [f"cannot write {record}: File too large", "True 0"]
    assert store.load(tmp_path / "run").results == (case(1), case(4))


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_record_cut_anywhere_loses_its_last_line_only_and_says_so(run: Path) -> None:
    record = run / "results.jsonl"
    whole = record.read_bytes()
    lines = whole.splitlines(keepends=True)
    ends = [len(lines[0]), len(lines[0]) + len(lines[1]), len(whole)]
    mu = whole.index("µ".encode())
    for size in (*range(ends[0] + 1, ends[0] + 5), mu, mu + 1, mu + 2, ends[1] - 1, ends[1] + 1, ends[2] - 1):
        record.write_bytes(whole[:size])
        loaded = store.load(run)
        assert len(loaded.results) == sum(end <= size for end in ends), size
        assert loaded.warnings == (f"{record}: the last line is cut and was dropped",)
    for end, count in zip(ends, (1, 2, 3)):
        record.write_bytes(whole[:end])
        assert (len(store.load(run).results), store.load(run).warnings) == (count, ())


@pytest.mark.parametrize(
    "line", ["", "{", "5", "null", "[]", "{}", '{"problem": 5}', "\x00", "[" * 100_000, "NaN", '"\\ud800"']
)
def test_a_bad_line_in_the_middle_names_file_and_line(line: str, run: Path) -> None:
    record = run / "results.jsonl"
    lines = record.read_text(encoding="utf-8").splitlines()
    record.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n", encoding="utf-8")
    assert refusal(run).startswith(f"{record}, line 2 is no result: ")


def test_bytes_that_are_no_text_are_refused(run: Path) -> None:
    record = run / "results.jsonl"
    record.write_bytes(b"\xff\xfe\n" + record.read_bytes())
    assert "UTF-8" in refusal(run)


def leaves(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [path, *(leaf for key in value for leaf in leaves(value[key], (*path, key)))]
    return [path]


def changed(data: Any, path: tuple[Any, ...], value: object) -> Any:
    return value if not path else data | {path[0]: changed(data[path[0]], path[1:], value)}


def fault_or(run: Path, default: str) -> str:
    """What reading and showing a run complains of; `default` where nothing."""
    try:
        Tables(store.load(run)).render()
    except AttnbenchError as error:
        return error.message
    return default


@pytest.mark.parametrize("value", [None, True, -1, 0, 1.5, "x", [], [[]], {}, 10**400], ids=lambda v: repr(v)[:9])
def test_a_record_with_any_wrong_value_is_refused_or_shown(value: object, run: Path) -> None:
    """Whatever stands in a field, reading gives an AttnbenchError or a record that every table can show."""
    record = run / "results.jsonl"
    original = passed().to_json()
    for path in leaves(original):
        record.write_text(json.dumps(changed(original, path, value)) + "\n")
        assert "line 1" in fault_or(run, "line 1"), path


@pytest.mark.parametrize("value", [None, True, -1, 0, 1.5, "x", [], {}, {"fp16": "fast"}, {"fp16": 0}], ids=repr)
def test_a_header_with_any_wrong_value_is_refused_or_shown(value: object, run: Path) -> None:
    for path in leaves(header()):
        (run / "run.json").write_text(json.dumps(changed(header(), path, value)))
        assert str(run) in fault_or(run, str(run)), path


def test_a_number_beside_a_failure_is_refused(run: Path) -> None:
    data = passed().to_json() | {"status": "INCORRECT", "reason": "off"}
    (run / "results.jsonl").write_text(json.dumps(data) + "\n")
    assert refusal(run).endswith("line 1 is no result: a INCORRECT result has no measurement")


def test_a_result_that_is_there_twice_is_refused(run: Path) -> None:
    record = run / "results.jsonl"
    lines = record.read_text(encoding="utf-8").splitlines(keepends=True)
    record.write_text("".join([*lines, lines[0]]), encoding="utf-8")
    assert refusal(run) == f"{record}, line 4: b1-h1-q1-k1024-d128-fp16 on jit_flash is there twice"


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_schema_version_is_refused(version: object, run: Path) -> None:
    (run / "run.json").write_text(json.dumps(header() | {"schema_version": version}))
    assert refusal(run) == f"{run}/run.json cannot be read: its schema_version is {version!r}, not 1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run.json cannot be read: "),
        ("{", "run.json cannot be read: "),
        ("[" * 100_000, "run.json cannot be read: "),
        ("{}", "run.json cannot be read: it has no 'schema_version'"),
        ('{"schema_version": 1}', "run.json cannot be read: it has no 'device'"),
    ],
)
def test_a_broken_run_json_is_refused(text: str, message: str, run: Path) -> None:
    (run / "run.json").write_text(text)
    assert message in refusal(run)


def test_a_folder_without_run_json_is_no_run(run: Path) -> None:
    (run / "run.json").unlink()
    assert refusal(run) == f"{run} is not a run: it has no run.json"


def test_a_run_without_its_record_is_refused(run: Path) -> None:
    (run / "results.jsonl").unlink()
    assert refusal(run) == f"cannot read {run}/results.jsonl: No such file or directory"


@pytest.mark.parametrize("text", ["", '{"cut'])
def test_an_empty_record_is_refused(text: str, run: Path) -> None:
    (run / "results.jsonl").write_text(text)
    assert refusal(run) == f"{run}/results.jsonl holds no results"


def test_a_run_is_read_from_its_record_and_not_from_its_csv(run: Path) -> None:
    (run / "results.csv").write_text("broken")
    assert len(store.load(run).results) == 3


def test_a_csv_of_a_run_has_its_rows_but_no_raw_times(run: Path) -> None:
    record = store.load(run / "results.csv")
    assert record.results == ()
    assert [(r["sq"], r["kernel"], r["status"]) for r in record.rows] == [
        (1, "jit_flash", "PASSED"),
        (1, "sdpa", "RUNTIME_ERROR"),
        (2, "jit_flash", "PASSED"),
    ]
    assert dataclasses.asdict(record.device) | {"peak_tflops": {}} == dataclasses.asdict(DEVICE) | {"peak_tflops": {}}


def test_a_csv_may_begin_with_a_byte_order_mark(run: Path) -> None:
    path = run / "results.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert store.load(path).rows[0]["sq"] == 1


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"sq,sk\n\x80", "sq".encode("utf-16")])
def test_a_csv_that_is_no_utf8_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(data)
    assert refusal(path) == f"{path} is not UTF-8 text"


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "x.csv") == f"cannot read {tmp_path}/x.csv: No such file or directory"


def test_status_values_are_the_contracts() -> None:
    words = "PASSED UNSUPPORTED UNAVAILABLE INCORRECT TAMPERED IMPLAUSIBLE COMPILE_ERROR RUNTIME_ERROR OOM TIMEOUT"
    assert [status.value for status in Status] == [*words.split(), "CRASHED", "SKIPPED"]


def test_a_name_that_is_too_long_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 5000)
    assert refusal(path) == f"cannot read {path}: File name too long"
    with pytest.raises(AttnbenchError, match=r"^cannot make .*: File name too long$"):
        start(path)


NO_ROOM = """
import resource, sys
from pathlib import Path
from helpers import DEVICE, header
from attnbench.errors import AttnbenchError
from attnbench.store import RunWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    RunWriter(Path(sys.argv[1]), header(), DEVICE)
except AttnbenchError as error:
    print(error.message, error.hint, sep="\\n")
"""


@pytest.mark.parametrize(("room", "file"), [(0, "run.json"), (300, "results.csv")])
def test_a_run_that_cannot_begin_leaves_nothing(room: int, file: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name in ("new/er", "there"):
        answer = python(NO_ROOM, tmp_path / name, room, env=TESTS)
        assert answer.out.splitlines() == [
            f"cannot write {tmp_path / name / file}: File too large",
            "nothing was run; name another folder with --out",
        ], answer.err
    assert [p.name for p in tmp_path.iterdir()] == ["there"], "what was there already stays"


def test_a_fresh_run_takes_no_folder_that_is_there(tmp_path: Path) -> None:
    start(tmp_path / "a", fresh=True)
    (tmp_path / "empty").mkdir()
    for name in ("a", "empty"):
        with pytest.raises(FileExistsError):
            start(tmp_path / name, fresh=True)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(AttnbenchError, match=r"^cannot make .*link/run: File exists$"):
        start(tmp_path / "link" / "run", fresh=True)


def test_an_interrupt_while_results_are_written_waits_until_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = start(tmp_path / "run")
    fsync = os.fsync

    def interrupted(descriptor: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.add([case(1)])
    assert store.load(writer.path).results == (case(1),)
    assert (writer.path / "results.csv").read_text(encoding="utf-8") == csv_text([row(case(1), DEVICE)])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_rows_stand_in_the_plans_order_however_the_cases_ended(tmp_path: Path) -> None:
    first, second = passed(problem={"seqlen_q": 64}), passed(problem={"seqlen_q": 128})
    cases = [first.problem.case_id, second.problem.case_id]
    writer = start(tmp_path / "run", suite={"cases": cases}, backends=["jit_flash"])
    writer.add([second])
    writer.add([first])
    assert [values["sq"] for values in store.load(tmp_path / "run").rows] == [64, 128]
    lines = (tmp_path / "run" / "results.csv").read_text().splitlines()[1:]
    assert [line.split(",")[0] for line in lines] == ["64", "128"]


# Blocks of a run that is not finished

HOW = How("npu", "median", "hot")
CHECK = passed().check
assert CHECK is not None


def lap(time_us: float) -> Lap:
    return Lap(times_us=(time_us,), calls=(1,), host_us=(5.0,), timing_method="device_events")


def progress(index: int, blocks: int, *backends: str) -> Progress:
    """A problem of which so many blocks were taken, 10 µs in the first, 20 in the second…"""
    problem = case(index).problem
    return Progress(
        problem=problem,
        verdicts={name: Verdict(check=CHECK, used_cores=3) for name in backends},
        blocks=[
            Block(
                laps=dict.fromkeys(backends, lap(10.0 * (n + 1))),
                seen=(Seen(),),
                spent_s=1.0,
            )
            for n in range(blocks)
        ],
    )


def write_blocks(writer: RunWriter, state: Progress) -> None:
    """Every block of `state`, as a run writes them."""
    taken, state.blocks = state.blocks, []
    for block in taken:
        state.blocks.append(block)
        writer.add_block(state, HOW)


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """A run of two problems and backends: one finished case, and three blocks of the other problem."""
    asked = {"suite": {"cases": [case(1).problem.case_id, case(2).problem.case_id]}, "backends": ["jit_flash", "sdpa"]}
    writer = RunWriter(tmp_path / "unfinished", header() | asked, DEVICE)
    writer.add([case(1)])
    write_blocks(writer, progress(2, 3, "jit_flash", "sdpa"))
    writer.close()
    return writer.path


def test_the_blocks_of_an_unfinished_run_are_shown_with_a_note(unfinished: Path) -> None:
    record = store.load(unfinished)
    assert [result.key[1] for result in record.results] == ["jit_flash", "jit_flash", "sdpa"]
    assert record.results[1].measurement is not None
    assert record.results[1].measurement.blocks == ((10.0,), (20.0,), (30.0,))
    assert record.results[1].used_cores == 3
    assert [r["n_blocks"] for r in record.rows] == [2, 3, 3]
    assert record.warnings == ()
    assert record.gaps == store.Gaps(missing=1, short=2, of=4)
    page = Tables(record).render()
    assert "Warning: incomplete: of 4 cases 1 is missing and 2 have fewer blocks than asked for: attnbench" in page
    assert str(unfinished.parent) not in page, "a page may be shown to others"


def test_a_run_is_reopened_with_all_that_it_got_to(unfinished: Path) -> None:
    writer, found = RunWriter.reopen(unfinished)
    state = found[case(2).problem.case_id]
    assert state == progress(2, 3, "jit_flash", "sdpa")
    assert found[case(1).problem.case_id].results == {"jit_flash": case(1)}
    assert writer.has_something
    state.blocks.append(state.blocks[0])
    writer.add_block(state, HOW)
    writer.add(state.timed(HOW))
    writer.finish("done", [], whole=True)
    writer.close()
    record = store.load(unfinished)
    assert [len(r.measurement.blocks) for r in record.results if r.measurement] == [2, 4, 4]
    assert record.warnings == ()
    assert not (unfinished / "blocks.jsonl").exists()


def test_a_backend_that_failed_after_some_blocks_is_not_taken_up_again(unfinished: Path) -> None:
    writer, found = RunWriter.reopen(unfinished)
    state = found[case(2).problem.case_id]
    writer.add([case(2, "sdpa", "it broke")])
    writer.close()
    writer, found = RunWriter.reopen(unfinished)
    writer.close()
    state = found[case(2).problem.case_id]
    assert list(state.verdicts) == ["jit_flash"]
    assert list(state.results) == ["sdpa"]
    passed_, failed_ = ("jit_flash", "PASSED"), ("sdpa", "RUNTIME_ERROR")
    assert [(r.backend, r.status.value) for r in store.load(unfinished).results] == [passed_, passed_, failed_]


@pytest.mark.parametrize("name", ["results.jsonl", "blocks.jsonl"])
def test_half_a_line_is_never_read_back_and_cut_off_before_anything_is_added(unfinished: Path, name: str) -> None:
    path = unfinished / name
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(1, len(lines[-1]), 97):
        path.write_bytes(whole[:-cut])
        assert f"{path}: the last line is cut and was dropped" in store.load(unfinished).warnings
        writer, _ = RunWriter.reopen(unfinished)
        writer.close()
        assert path.read_bytes() == b"".join(lines[:-1])
    path.write_bytes(whole)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data | {"number": 7}, "does not follow the last"),
        (lambda data: data | {"block": data["block"] | {"laps": {}}}, "does not follow the last"),
        (lambda data: data | {"verdicts": {"sdpa": {}}}, "it has no 'check'"),
        (lambda data: data | {"problem": {"seqlen_q": -1, "seqlen_k": 1}}, "seqlen_q must be at least 1"),
        (lambda data: data | {"how": {}}, "missing"),
        (lambda data: [], "list"),
    ],
)
def test_a_block_that_is_none_is_refused_with_its_line(unfinished: Path, change, words: str) -> None:  # type: ignore[no-untyped-def]
    path = unfinished / "blocks.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], json.dumps(change(json.loads(lines[-1])))]) + "\n")
    with pytest.raises(AttnbenchError) as caught:
        store.load(unfinished)
    assert caught.value.message.startswith(f"{path}, line 3 is no block: ")
    assert words in caught.value.message


def test_only_one_attnbench_writes_a_run(unfinished: Path) -> None:
    writer, _ = RunWriter.reopen(unfinished)
    with pytest.raises(AttnbenchError, match="is being written by another attnbench"):
        RunWriter.reopen(unfinished)
    writer.close()
    RunWriter.reopen(unfinished)[0].close()


def test_what_is_no_run_cannot_be_reopened(tmp_path: Path) -> None:
    with pytest.raises(AttnbenchError, match=r"is not a run: it has no run\.json"):
        RunWriter.reopen(tmp_path)


def test_a_full_disk_leaves_whole_lines_in_the_journal(unfinished: Path) -> None:
    """A real limit on the size of a file, as a quota sets it."""
    before = (unfinished / "blocks.jsonl").read_bytes()
    writer, found = RunWriter.reopen(unfinished)
    state = found[case(2).problem.case_id]
    state.blocks.append(state.blocks[0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
    try:
        with pytest.raises(AttnbenchError, match=r"cannot write .*File too large"):
            writer.add_block(state, HOW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        writer.close()
    assert (unfinished / "blocks.jsonl").read_bytes() == before
