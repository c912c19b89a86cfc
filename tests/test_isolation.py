"""Worker processes: whatever a backend does to its own, the runner gets a status, a reason and no orphan."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from attnbench import contention, isolation, processes, spot
from attnbench.child import LINE_LENGTH
from attnbench.devices import Timing
from attnbench.isolation import IsolatedWorker
from attnbench.patches import Patch
from attnbench.problem import Problem
from attnbench.reference import Reference, make_inputs
from attnbench.registry import BackendInfo, EntryPointRef
from attnbench.result import HOST_CLOCK, Status
from attnbench.wire import Region
from attnbench.worker import CaseFailed, Timed

PROBLEM = Problem(seqlen_q=8, seqlen_k=16, head_dim=8, dtype="fp32")
INPUTS = make_inputs(PROBLEM, 0)
PIDS = "pids.txt"
HOT = {"cold": False, "seed": 1, "look_at": []}

FAULTY = """
import ctypes, json, os, signal, subprocess, sys, time
import torch
from attnbench import Backend, hookimpl


def right(problem, q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) * problem.softmax_scale, -1) @ v


def no_alarm_rings():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})


def hang():
    no_alarm_rings()
    time.sleep(600)


def hang_with_children():
    left = subprocess.Popen(["sleep", "600"], start_new_session=True)
    with open(os.environ["PIDS"], "w") as file:
        print(os.getpid(), left.pid, file=file)
    hang()


def memory():
    raise MemoryError("all gone")


def say(words):
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, words)
        except OSError:
            pass


def swamp():
    say((1 << 31).to_bytes(4, "big"))


def babble():
    say(b"\\0\\0\\0\\5hello")


def claim_nothing():
    say(b'\\0\\0\\0\\17{"value": "no"}')


def lie(times_us, elapsed_s, wait_s, **more):
    time.sleep(wait_s)
    timing = {"times_us": times_us, "method": "host_clock", "calls_a_sample": 1, "calls_a_change": 1, "fallback": ""}
    body = json.dumps({"value": {"timing": {**timing, **more}, "elapsed_s": elapsed_s}}).encode()
    say(len(body).to_bytes(4, "big") + body)


FAULTS = {
    "clock_lies": lambda: lie([1000.0], 0.001, 1.0),
    "times_lie": lambda: lie([1.0], 1.0, 1.0),
    "claims_no_change": lambda: lie([1.0], 1.0, 0.0, calls_a_change=8),
    "claims_a_mean": lambda: lie([1.0], 1.0, 0.0, calls_a_sample=2, calls_a_change=2),
    "claims_a_method": lambda: lie([1.0], 1.0, 0.0, method="guessed"),
    "claims_more": lambda: lie([1.0, 1.0], 1.0, 0.0),
    "hoards": lambda: torch.empty(64 << 30, dtype=torch.uint8),
    "segv": lambda: ctypes.string_at(0),
    "sigkill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "abort": os.abort,
    "exit_0": lambda: os._exit(0),
    "exit_3": lambda: os._exit(3),
    "raises": lambda: 1 / 0,
    "sys_exit": lambda: sys.exit(0),
    "memory": memory,
    "hang": hang,
    "hang_politely": lambda: time.sleep(600),
    "hang_with_children": hang_with_children,
    "close_all": lambda: os.closerange(3, 64),
    "swamp": swamp,
    "babble": babble,
    "claim_nothing": claim_nothing,
    "prints": lambda: (print("from python"), os.write(1, b"from the system\\n")),
    "floods": lambda: [os.write(2, b"flood" * 200 + b"\\n") for _ in range(2000)],
    "fine": lambda: None,
}


class Faulty(Backend):
    device = "cpu"

    def __init__(self, name):
        self.name = name

    def prepare(self, problem, q, k, v):
        def call():
            FAULTS[self.name]()
            return right(problem, q, k, v)

        return call


class Clock(Backend):
    name, device = "clock", "cpu"

    def prepare(self, problem, q, k, v):
        ticks = iter(range(10**9))
        time.perf_counter_ns = lambda: next(ticks)

        def call():
            time.sleep(0.01)
            return right(problem, q, k, v)

        return call


@hookimpl
def attnbench_backends():
    return [*map(Faulty, FAULTS), Clock()]
"""


@pytest.fixture(scope="module", autouse=True)
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "faulty.py").write_text(FAULTY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        patch.setenv("PIDS", str(folder / PIDS))
        yield folder


def info(name: str) -> BackendInfo:
    return BackendInfo(name, "cpu", "", "", True, None, EntryPointRef("faulty", "1", "faulty", "faulty"))


@pytest.fixture
def worker() -> Iterator:
    with contextlib.ExitStack() as stack:

        def make(name: str, timeout_s: float = 60.0) -> IsolatedWorker:
            made = IsolatedWorker(info(name), timeout_s)
            stack.callback(made.close)
            made.begin()
            return made

        yield make


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def assert_gone(pids: list[int]) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until and any(map(is_alive, pids)):
        time.sleep(0.02)
    assert [pid for pid in pids if is_alive(pid)] == []


def pids(folder: Path) -> list[int]:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            if (text := (folder / PIDS).read_text()).endswith("\n"):
                return [int(word) for word in text.split()]
        time.sleep(0.02)
    raise AssertionError("the backend was never called")


ENDS = [
    ("segv", Status.CRASHED, "its process was killed by SIGSEGV"),
    ("sigkill", Status.CRASHED, "its process was killed by SIGKILL (out of memory?)"),
    ("abort", Status.CRASHED, "its process was killed by SIGABRT"),
    ("exit_0", Status.CRASHED, "its process ended with exit code 0"),
    ("exit_3", Status.CRASHED, "its process ended with exit code 3"),
    ("raises", Status.RUNTIME_ERROR, "the call: ZeroDivisionError: division by zero"),
    ("sys_exit", Status.RUNTIME_ERROR, "the call: SystemExit: 0"),
    ("memory", Status.OOM, "the call: MemoryError: all gone"),
    ("close_all", Status.CRASHED, "its process ended with exit code 0"),
    ("swamp", Status.CRASHED, "its answer to output cannot be read: a message of 2147483648 bytes is too large"),
    ("babble", Status.CRASHED, "its answer to output cannot be read: it is no JSON"),
    ("hang", Status.TIMEOUT, "the limit of 0.5 s ran out at output, and its process was killed"),
    ("hang_politely", Status.TIMEOUT, "the limit of 0.5 s ran out at the call"),
]


@pytest.mark.parametrize(("name", "status", "reason"), ENDS, ids=[end[0] for end in ENDS])
def test_every_end_has_its_status_and_the_next_phase_a_fresh_process(worker, name, status, reason):
    made = worker(name, 0.5 if status is Status.TIMEOUT else 60.0)
    made.prepare(PROBLEM, INPUTS)
    first = made._child
    with pytest.raises(CaseFailed) as caught:
        made.output()
    assert caught.value.status is status
    assert caught.value.reason.startswith(reason)
    made.begin()
    assert made.unsupported(PROBLEM) is None
    # What merely raised goes on; what hung, and what answered for itself, may still be at it.
    assert (made._child is first) is (status in (Status.RUNTIME_ERROR, Status.OOM))


def test_a_right_backend_is_right_through_shared_memory_and_reads_renewed_inputs(worker):
    made = worker("fine")
    for seed in (0, 1):
        inputs = make_inputs(PROBLEM, seed)
        made.prepare(PROBLEM, inputs) if seed == 0 else made.renew(inputs)
        assert Reference.of(PROBLEM, inputs, seed).judge(made.output()).passed
        assert all(now.equal(put) for now, put in zip(made.inputs(), (inputs.q, inputs.k, inputs.v)))
    timed = made.time_calls(7, cold=False, seed=3, look_at=[2, 6])
    assert len(timed.timing.times_us) == 7
    assert 0 < timed.timing.total_us(7) / 1e6 <= timed.elapsed_s < 60
    for call, output in zip((2, 6), timed.outputs):
        assert spot.fault(PROBLEM, make_inputs(PROBLEM, 1), output, 1e-5, 0, Patch.of(PROBLEM, 3, call)) == ""
    assert spot.fault(PROBLEM, make_inputs(PROBLEM, 1), timed.outputs[0], 1e-5, 0, Patch.of(PROBLEM, 3, 6)) != ""
    assert made.warm_up(0.001, 5) > 0


def test_a_worker_that_ends_its_keeper_goes_with_it_and_is_told(worker):
    """It could not be stopped any more while the others are timed."""
    made = worker("fine")
    made.prepare(PROBLEM, INPUTS)
    below = list(processes.descendants(made._child._keeper.pid))
    assert below
    os.kill(made._child._keeper.pid, signal.SIGKILL)
    made.pause()
    assert_gone(below)
    with pytest.raises(CaseFailed) as caught:
        made.begin()
    assert caught.value.status is Status.CRASHED
    assert caught.value.reason == "its process was killed by SIGKILL (out of memory?)"
    made.begin()
    assert made.unsupported(PROBLEM) is None


def test_a_process_that_cannot_be_stopped_is_ended(worker, monkeypatch):
    made = worker("fine")
    monkeypatch.setattr(made._child, "order", lambda order: False)
    made.pause()
    with pytest.raises(CaseFailed) as caught:
        made.begin()
    assert (caught.value.status, caught.value.reason) == (
        Status.CRASHED,
        "its process could not be stopped while others are timed",
    )


def test_a_process_that_cannot_be_started_is_unavailable_and_ends_nothing_else(tmp_path):
    made = IsolatedWorker(info("fine"), 60.0, python=str(tmp_path / "python"))
    for _ in range(2):
        with pytest.raises(CaseFailed) as caught:
            made.begin()
        assert caught.value.status is Status.UNAVAILABLE
        assert caught.value.reason == "its process cannot be started: No such file or directory"
    made.pause()
    made.close()


def test_a_process_that_ends_at_its_start_is_crashed_with_its_last_words_and_tells_all(plugin, capfd):
    (plugin / "broken").mkdir()
    (plugin / "broken" / "torch.py").write_text("raise ImportError('\x1b[1mlibcudart.so\x1b[0m: no such file\\n\\n')")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(plugin / "broken"), prepend=os.pathsep)
        made = IsolatedWorker(info("fine"), 60.0)
    for _ in range(2):
        with pytest.raises(CaseFailed) as caught:
            made.begin()
        assert (caught.value.status, caught.value.reason) == (
            Status.CRASHED,
            "its process ended with exit code 1; last on stderr: ImportError: libcudart.so: no such file",
        )
    assert "Traceback (most recent call last):" in capfd.readouterr().err
    made.close()


def test_last_words_are_short_and_without_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nprintf 'no /home/somebody/lib %0999d\\n' 0 >&2\nkill -9 $$\n")
    python.chmod(0o755)
    made = IsolatedWorker(info("fine"), 60.0, python=str(python))
    with pytest.raises(CaseFailed) as caught:
        made.begin()
    head, words = caught.value.reason.split("; last on stderr: ")
    assert head == "its process was killed by SIGKILL (out of memory?)"
    assert words == "no ~/lib " + "0" * (LINE_LENGTH - 9)
    made.close()


def test_a_worker_may_write_any_amount_to_stderr_and_all_of_it_is_passed_on(worker, capfd):
    made = worker("floods")
    made.prepare(PROBLEM, INPUTS)
    capfd.readouterr()
    assert Reference.of(PROBLEM, INPUTS, 0).judge(made.output()).passed
    made.close()
    assert capfd.readouterr().err == ("flood" * 200 + "\n") * 2000


def test_the_memory_of_a_problem_is_given_back_on_both_sides(worker):
    made = worker("fine")
    (served,) = processes.descendants(made._child._keeper.pid)

    def shared(pid):
        found = 0
        for path in list(Path(f"/proc/{pid}/fd").iterdir()):
            with contextlib.suppress(FileNotFoundError):  # the one that the folder was read by
                found += "memfd:attnbench" in os.readlink(path)
        return found

    for _ in range(3):
        made.prepare(PROBLEM, INPUTS)
        made.output()
        assert (shared(os.getpid()), shared(served)) == (2, 1)  # an mmap of Python's has a descriptor of its own
        made.release()
        assert made.unsupported(PROBLEM) is None
        assert (shared(os.getpid()), shared(served)) == (0, 0)


def test_shared_memory_needs_no_posix_fallocate(monkeypatch):
    """macOS has none."""
    monkeypatch.delattr(os, "posix_fallocate")
    region = Region(PROBLEM)
    region.put(INPUTS)
    assert all(there.equal(put) for there, put in zip(region.inputs, (INPUTS.q, INPUTS.k, INPUTS.v)))
    region.close()


def test_a_twin_is_prepared_beside_the_first(worker):
    made, others = worker("fine"), make_inputs(PROBLEM, 1)
    made.prepare(PROBLEM, INPUTS)
    made.prepare_twin(PROBLEM, others)
    assert Reference.of(PROBLEM, others, 1).judge(made.output(twin=True)).passed
    assert Reference.of(PROBLEM, INPUTS, 0).judge(made.output()).passed
    made.release_twin()
    assert Reference.of(PROBLEM, INPUTS, 0).judge(made.output()).passed


def test_what_a_backend_prints_does_not_reach_stdout(worker, capfd):
    made = worker("prints")
    made.prepare(PROBLEM, INPUTS)
    made.output()
    out, err = capfd.readouterr()
    assert out == ""
    assert "from the system" in err


@pytest.mark.parametrize(
    "name", ["claim_nothing", "claims_no_change", "claims_a_mean", "claims_a_method", "claims_more"]
)
def test_an_answer_of_another_kind_than_asked_for_is_none(worker, name):
    made = worker(name)
    made.prepare(PROBLEM, INPUTS)
    with pytest.raises(CaseFailed) as caught:
        made.time_calls(1, **HOT)
    assert caught.value.status is Status.CRASHED
    assert "it is not what was asked for" in caught.value.reason


@pytest.mark.parametrize(
    ("device", "changes", "fits"),
    [
        ("cuda", {}, True),
        ("cuda", {"calls_a_sample": 1, "calls_a_change": 8, "times_us": [1.0] * 10, "method": "device_events"}, True),
        ("cuda", {"calls_a_sample": 5}, False),  # of calls on different inputs, or too few times
        ("cuda", {"calls_a_change": 6}, False),
        ("cuda", {"calls_a_change": 24}, False),
        ("cuda", {"calls_a_sample": 0}, False),
        ("cuda", {"calls_a_sample": True}, False),
        ("cuda", {"times_us": [1.0, 1.0]}, False),
        ("cuda", {"times_us": [1.0, 1.0, 0.0]}, False),
        ("cuda", {"method": ["cuda_graph"]}, False),
        ("cuda", {"fallback": None}, False),
        ("cpu", {}, False),
        ("cpu", {"calls_a_sample": 1, "calls_a_change": 1, "times_us": [1.0] * 10, "method": "host_clock"}, True),
        ("cpu", {"calls_a_sample": 1, "calls_a_change": 1, "times_us": [1.0] * 10}, False),
        ("npu", {}, False),
        ("npu", {"method": "npu_graph"}, True),
        ("npu", {"method": "cuda_graph"}, False),
        ("cuda", {"method": "npu_graph"}, False),
    ],
)
def test_a_timing_has_a_form_that_its_device_may_give(device, changes, fits):
    timing = {"times_us": [1.0] * 3, "method": "cuda_graph", "calls_a_sample": 4, "calls_a_change": 4, "fallback": ""}
    assert isolation._is_timing(timing | changes, 10, device) is fits
    assert not isolation._is_timing(timing | changes | {"more": 1}, 10, device)


def test_a_changed_clock_is_tampered(worker):
    made = worker("clock")
    with pytest.raises(CaseFailed) as caught:
        made.prepare(PROBLEM, INPUTS)
    assert (caught.value.status, caught.value.reason) == (Status.TAMPERED, "it changed time.perf_counter_ns")


CLAIMS = [
    ("clock_lies", "by its clock 0.001 s went by while "),
    ("times_lie", "its times add up to 0.000 s of the "),
]


@pytest.mark.parametrize(("name", "words"), CLAIMS, ids=[name for name, _ in CLAIMS])
def test_what_a_worker_says_of_time_must_fit_the_wall_clock_here(worker, name, words, monkeypatch):
    monkeypatch.setattr(contention, "sample", lambda: None)  # whatever else the machine does meanwhile
    made = worker(name)
    made.prepare(PROBLEM, INPUTS)
    with pytest.raises(CaseFailed) as caught:
        made.time_calls(1, **HOT)
    assert caught.value.status is Status.TAMPERED
    assert caught.value.reason.startswith(words)


SHARES = [(0, 0, True), (0.5, 0, False), (0, 0.5, False), (0.1, 0.1, True)]


@pytest.mark.parametrize(("others", "steal", "lies"), SHARES)
def test_what_a_worker_waited_for_processors_that_others_took_is_no_lie(monkeypatch, others, steal, lies):
    share = contention.Share(processors=2, others=others, steal=steal)
    monkeypatch.setattr(contention, "between", lambda before, now: share)
    clock, timed = isolation._WallClock(), Timed(Timing(times_us=[1.0], method=HOST_CLOCK), 10.0, [])
    with pytest.raises(CaseFailed, match=r"add up to 0\.001 s of the 10\.000 s") if lies else contextlib.nullcontext():
        clock.compare(timed, 0.001, 10.0, 0.1)


def test_a_plugin_that_changes_the_clock_when_it_is_imported_never_starts(plugin, monkeypatch):
    (plugin / "early.py").write_text(
        "import time\nkeep = time.monotonic\ntime.monotonic = lambda: keep()\nfrom faulty import attnbench_backends\n"
    )
    source = EntryPointRef("early", "1", "early", "early")
    made = IsolatedWorker(BackendInfo("fine", "cpu", "", "", True, None, source), 60.0)
    try:
        for _ in range(2):
            with pytest.raises(CaseFailed) as caught:
                made.begin()
            assert caught.value.status is Status.TAMPERED
            assert caught.value.reason == "when it was imported, it changed time.monotonic"
    finally:
        made.close()


def test_memory_that_cannot_be_shared_is_no_failure_of_the_backend(worker):
    made = worker("fine")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(CaseFailed) as caught:
            made.prepare(PROBLEM, INPUTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.status is Status.SKIPPED
    assert caught.value.reason == "the memory shared with its process cannot be had: File too large"
    made.prepare(PROBLEM, INPUTS)
    assert made.output().isfinite().all()


def test_a_backend_beyond_the_memory_limit_is_oom(plugin):
    program = (
        "import resource\n"
        "from test_isolation import *\n"
        "resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))\n"
        "made = IsolatedWorker(info('hoards'), 60.0)\n"
        "made.begin(); made.prepare(PROBLEM, INPUTS)\n"
        "try:\n    made.output()\n"
        "except CaseFailed as failure:\n    print(failure.status, failure.reason)\n"
        "made.close()"
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stdout.startswith("OOM the call: "), done.stderr


def test_a_hung_worker_is_killed_with_the_grandchild_that_left_its_group(worker, plugin):
    (plugin / PIDS).unlink(missing_ok=True)
    made = worker("hang_with_children", 1.0)
    made.prepare(PROBLEM, INPUTS)
    with pytest.raises(CaseFailed) as caught:
        made.output()
    assert caught.value.status is Status.TIMEOUT
    assert_gone(pids(plugin))


def test_kill_9_of_the_runner_leaves_no_orphan(plugin):
    (plugin / PIDS).unlink(missing_ok=True)
    program = (
        "from test_isolation import *\n"
        "made = IsolatedWorker(info('hang_with_children'), 600.0)\n"
        "made.begin(); made.prepare(PROBLEM, INPUTS); made.output()"
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    runner = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path})
    try:
        found = pids(plugin)
        assert all(map(is_alive, found))
    finally:
        runner.kill()
        runner.wait()
    assert_gone(found)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.skipif(sys.platform != "linux", reason="process states are read from /proc")
def test_a_paused_worker_is_stopped_and_the_next_question_wakes_it(worker):
    made = worker("fine")
    made.prepare(PROBLEM, INPUTS)
    children = Path(f"/proc/{made._child._keeper.pid}/task/{made._child._keeper.pid}/children").read_text().split()
    (pid,) = map(int, children)
    for _ in range(5):
        made.pause()
        assert state(pid) == "T"
        assert len(made.time_calls(1, **HOT).timing.times_us) == 1
        assert state(pid) != "T"


def test_the_current_folder_does_not_reach_the_worker(worker, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise SystemExit('the current folder was imported')")
    monkeypatch.chdir(tmp_path)
    made = worker("fine")
    assert made.unsupported(PROBLEM) is None


def test_close_ends_the_process(worker):
    made = worker("fine")
    keeper = made._child._keeper
    made.close()
    assert keeper.returncode is not None
