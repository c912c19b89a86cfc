"""A run that ended early: nothing measured is lost, nothing half-written is read, --resume takes what is missing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import SCRIPT, TINY, Answer, attnbench

PROBLEMS = ("--seqlen-q", "16,32", *TINY[2:])
FIVE_BLOCKS = ("--iters", "100", "--warmup", "1")
WORDS = ("run", "--backends", "gemm_ref,sdpa", *PROBLEMS, *FIVE_BLOCKS)
ENV = {"ATTNBENCH_PLUGINS": "gemm_ref,sdpa", "OMP_NUM_THREADS": "1"}


def go(*words: object, cwd: Path, **env: str) -> Answer:
    return attnbench(*words, cwd=cwd, env=os.environ | ENV | env, timeout=180)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines() if line.endswith(b"}")]


def shape(run: Path) -> list[tuple]:
    """What of a run's table does not depend on the clock."""
    results = lines(run / "results.jsonl")
    return sorted(
        (r["problem"]["seqlen_q"], r["backend"], r["status"], tuple(map(len, r["measurement"]["blocks"])))
        for r in results
    )


WHOLE = [(sq, name, "PASSED", (20,) * 5) for sq in (16, 32) for name in ("gemm_ref", "sdpa")]


def descendants(pid: int) -> set[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, front = set(), {pid}
    while front := {child for child, parent in parents.items() if parent in front} - found:
        found |= front
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in its third block, and left no process behind."""
    folder = tmp_path_factory.mktemp("killed")
    runner = subprocess.Popen(
        [str(SCRIPT), *WORDS, "--out", "r"], cwd=folder, env=os.environ | ENV, stderr=subprocess.DEVNULL
    )
    below: set[int] = set()
    try:
        until = time.monotonic() + 120
        journal = folder / "r" / "blocks.jsonl"
        while time.monotonic() < until and not (journal.exists() and journal.read_bytes().count(b"\n") >= 5):
            below |= descendants(runner.pid)
            time.sleep(0.01)
    finally:
        runner.kill()
        runner.wait()
    until = time.monotonic() + 20
    while time.monotonic() < until and any(map(is_alive, below)):
        time.sleep(0.02)
    assert len(below) >= 4
    assert [pid for pid in below if is_alive(pid)] == []
    assert lines(folder / "r" / "results.jsonl") == []
    return folder


@pytest.fixture
def copy(killed: Path, tmp_path: Path) -> Path:
    """A folder of one's own with the killed run in it as `r`."""
    shutil.copytree(killed / "r", tmp_path / "r")
    return tmp_path


def test_what_was_measured_before_a_kill_is_shown(copy):
    answer = go("report", "r", cwd=copy)
    assert answer.code == 0
    hint = "Warning: incomplete: of 4 cases 4 have fewer blocks than asked for: attnbench run --resume RUN goes on"
    assert hint in answer.out
    as_csv = go("report", "r", "--format", "csv", cwd=copy)
    assert hint in as_csv.err
    assert hint not in as_csv.out
    assert "### gemm_ref vs sdpa" in answer.out


def test_resume_takes_only_what_is_missing_and_gives_the_table_of_a_whole_run(copy):
    before = lines(copy / "r" / "blocks.jsonl")
    with open(copy / "r" / "blocks.jsonl", "ab") as file:
        file.write(b'{"problem": {"seqlen_q"')  # what a kill in the middle of a write leaves
    header = (copy / "r" / "run.json").read_text()
    answer = go("run", "--resume", "r", "--cache", "hot", "--seed", "0", cwd=copy)  # as it was made
    assert answer.code == 0, answer.err
    assert shape(copy / "r") == WHOLE
    assert (copy / "r" / "run.json").read_text() == header
    assert not (copy / "r" / "blocks.jsonl").exists()
    for line in before:
        for name, lap in line["block"]["laps"].items():
            (result,) = [
                r
                for r in lines(copy / "r" / "results.jsonl")
                if (r["backend"], r["problem"]) == (name, line["problem"])
            ]
            assert result["measurement"]["blocks"][line["number"]] == lap["times_us"]
    again = go("run", "--resume", "r", cwd=copy)
    assert again.code == 0
    assert again.out == answer.out
    assert shape(copy / "r") == WHOLE


def test_resume_with_out_and_all_the_options_again_does_the_same(copy):
    answer = go(*WORDS, "--out", "r", "--resume", cwd=copy)
    assert answer.code == 0, answer.err
    assert shape(copy / "r") == WHOLE


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (("--iters", "60"), "protocol.iters was 100 and is 60"),
        (("--protocol", "adaptive"), "protocol.name was fixed and is adaptive"),
        (("--backends", "sdpa"), "backends differ"),
        (("--seed", "7"), "seed was 0 and is 7"),
        (("--cache", "cold"), "protocol.cache was hot and is cold"),
        (("--no-isolate",), "isolate was True and is False"),
    ],
)
def test_a_run_that_was_made_differently_is_refused_and_left_alone(copy, words, difference):
    before = {path.name: path.read_bytes() for path in (copy / "r").iterdir()}
    answer = go("run", "--resume", "r", *words, cwd=copy)
    assert answer.code == 2
    assert "r was made differently: " in answer.problem
    assert difference in answer.problem
    assert {path.name: path.read_bytes() for path in (copy / "r").iterdir()} == before


def test_another_environment_or_way_of_timing_is_refused_saying_how(copy):
    path = copy / "r" / "run.json"
    header = json.loads(path.read_text())
    header["environment"]["libraries"]["torch"] = "1.0"
    header["timing_method"] = "device_events"
    path.write_text(json.dumps(header))
    answer = go("run", "--resume", "r", cwd=copy)
    assert answer.code == 2
    assert "environment.libraries.torch was 1.0 and is " in answer.problem
    assert "timing_method was device_events and is host_clock" in answer.problem


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--resume", "nowhere"), "nowhere is not a run: it has no run.json"),
        (("--resume",), "--resume names no run"),
        (("--resume", "r", "--out", "s"), "--out and --resume RUN exclude each other"),
    ],
)
def test_what_cannot_be_resumed_is_said_in_a_line(copy, words, problem):
    answer = go("run", *words, cwd=copy)
    assert answer.code == 2
    assert problem in answer.problem


def test_an_interrupt_keeps_and_shows_what_was_finished_and_says_how_to_go_on(tmp_path):
    runner = subprocess.Popen(
        [str(SCRIPT), *WORDS, "--out", "r"],
        cwd=tmp_path,
        env=os.environ | ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    journal = tmp_path / "r" / "blocks.jsonl"
    until = time.monotonic() + 120
    while time.monotonic() < until and not (journal.exists() and journal.read_bytes().count(b"\n") >= 3):
        time.sleep(0.01)
    runner.send_signal(signal.SIGINT)
    out, err = runner.communicate(timeout=60)
    assert runner.returncode == 130
    assert "error: interrupted: what was finished is kept and shown" in err
    assert "hint: attnbench run --resume r goes on" in err
    assert "### gemm_ref vs sdpa" in out
    assert (tmp_path / "r" / "results.csv").read_text().count("PASSED") == 4
    answer = go("run", "--resume", "r", cwd=tmp_path)
    assert answer.code == 0, answer.err
    assert shape(tmp_path / "r") == WHOLE
