"""attnbench.worker: what a backend's exceptions, hangs and wrong returns become, and that they end there."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time

import pytest
import torch

from attnbench.backend import Backend
from attnbench.devices.cpu import CpuDevice
from attnbench.jit import CompileError
from attnbench.patches import Patch, Patched
from attnbench.problem import Problem
from attnbench.reference import make_inputs
from attnbench.registry import BackendInfo, EntryPointRef
from attnbench.result import Status
from attnbench.seal import Seal
from attnbench.worker import ONE_THREAD_VALUES, REASON_LENGTH, CaseFailed, Worker, _copy, _pieces

PROBLEM = Problem(seqlen_q=4, seqlen_k=6, head_dim=8, dtype="fp32")
INPUTS = make_inputs(PROBLEM, 0)
HOT = {"cold": False, "seed": 1, "look_at": []}
INFO = BackendInfo("toy", "cpu", "", "", True, None, EntryPointRef("toy-dist", "1", "toy", "toy"))


class Toy(Backend):
    """Returns a copy of q; a test replaces what it wants broken."""

    name, device = "toy", "cpu"

    def __init__(self, **broken):
        self.__dict__.update(broken)

    def prepare(self, problem, q, k, v):
        return lambda: q.clone()


@pytest.fixture
def worker():
    """A worker of the backend given, not yet prepared."""

    def make(backend, timeout_s=30.0):
        return Worker(backend, CpuDevice(), timeout_s, Seal())

    return make


@pytest.fixture
def prepared(worker):
    """A worker whose callable is the one given."""

    def make(call, timeout_s=30.0):
        made = worker(Toy(prepare=lambda *_: call), timeout_s)
        made.prepare(PROBLEM, INPUTS)
        return made

    return make


def thrower(error):
    def throw(*_):
        raise error

    return throw


def failure(function, *arguments, **options):
    with pytest.raises(CaseFailed) as caught:
        function(*arguments, **options)
    return caught.value.status, caught.value.reason


# What is raised


def out_of_memory(*_):
    return torch.empty(1 << 60)


RAISED = [
    (thrower(ValueError("bad tile")), Status.RUNTIME_ERROR, "ValueError: bad tile"),
    (thrower(SystemExit(3)), Status.RUNTIME_ERROR, "SystemExit: 3"),
    (thrower(AssertionError()), Status.RUNTIME_ERROR, "AssertionError: no message"),
    (thrower(RuntimeError("\n  first\nsecond")), Status.RUNTIME_ERROR, "RuntimeError: first"),
    (thrower(MemoryError()), Status.OOM, "MemoryError: no message"),
    (thrower(torch.OutOfMemoryError("CUDA out of memory")), Status.OOM, "OutOfMemoryError: CUDA out of memory"),
    (out_of_memory, Status.OOM, "RuntimeError: "),
    (thrower(CompileError("g++ does not know -march=z9")), Status.COMPILE_ERROR, "g++ does not know -march=z9"),
]


@pytest.mark.parametrize(("throw", "status", "words"), RAISED)
def test_what_a_backend_raises_becomes_a_status_wherever_it_raises(worker, prepared, throw, status, words):
    whole = worker(Toy(unsupported=throw, prepare=throw, parallel_units=throw))
    called = prepared(throw)
    for where, function, arguments in (
        ("unsupported()", whole.unsupported, (PROBLEM,)),
        ("parallel_units()", whole.parallel_units, (PROBLEM,)),
        ("prepare()", whole.prepare, (PROBLEM, INPUTS)),
        ("the call", called.output, ()),
        ("a timed call", lambda: called.time_calls(2, **HOT), ()),
        ("a call", called.host_us, (2,)),
    ):
        found, reason = failure(function, *arguments)
        assert found is status
        assert reason.startswith(f"{where}: {words}")
        assert "\n" not in reason


def test_a_long_reason_is_cut(prepared):
    _, reason = failure(prepared(thrower(ValueError("x" * 10_000))).output)
    cut = ("the call: ValueError: " + "x" * REASON_LENGTH)[:REASON_LENGTH]
    assert re.fullmatch(rf"{cut} \(test_worker\.py, line \d+\)", reason)


def test_the_home_folder_is_not_in_a_reason(prepared, monkeypatch):
    monkeypatch.setenv("HOME", "/home/jane")
    _, reason = failure(prepared(thrower(OSError("no /home/jane/sdk/lib.so"))).output)
    assert re.fullmatch(r"the call: OSError: no ~/sdk/lib\.so \(test_worker\.py, line \d+\)", reason)


def test_a_reason_names_the_plugins_own_line_and_not_torchs(prepared):
    def call():
        return torch.ones(2) @ torch.ones(3)  # raised far below

    _, reason = failure(prepared(call).output)
    line = call.__code__.co_firstlineno + 1
    assert reason.startswith("the call: RuntimeError: ")
    assert reason.endswith(f" (test_worker.py, line {line})")


@pytest.mark.parametrize("method", ["prepare", "output", "time_calls"])
def test_an_interrupt_passes_through(worker, prepared, method):
    broken = worker(Toy(prepare=thrower(KeyboardInterrupt())))
    called = prepared(thrower(KeyboardInterrupt()))
    functions = {
        "prepare": lambda: broken.prepare(PROBLEM, INPUTS),
        "output": called.output,
        "time_calls": lambda: called.time_calls(1, **HOT),
    }
    with pytest.raises(KeyboardInterrupt):
        functions[method]()


# What is returned


@pytest.mark.parametrize("call", [None, 3, torch.zeros(4, 4)])
def test_prepare_must_return_something_to_call(prepared, call):
    status, reason = failure(prepared, call)
    assert status is Status.RUNTIME_ERROR
    assert reason == f"prepare(): TypeError: it returned a {type(call).__name__}, nothing to call"


@pytest.mark.parametrize("units", [0, -1, 1.5, "8", True, 10**400, 1 << 20])
def test_parallel_units_must_be_a_number_of_cores(worker, units):
    status, reason = failure(worker(Toy(parallel_units=lambda _: units)).parallel_units, PROBLEM)
    assert status is Status.RUNTIME_ERROR
    assert reason.startswith("parallel_units(): ")
    assert "cores" in reason


def test_parallel_units_may_be_a_number_or_none_or_missing(worker):
    class Bare:
        name, device = "bare", "cpu"

        def unavailable(self):
            return None

        def unsupported(self, problem):
            return "why not"

        def prepare(self, problem, q, k, v):
            return lambda: q

    assert worker(Toy(parallel_units=lambda problem: problem.batch)).parallel_units(PROBLEM) == 1
    assert worker(Toy()).parallel_units(PROBLEM) is None
    assert worker(Bare()).parallel_units(PROBLEM) is None
    assert worker(Bare()).unsupported(PROBLEM) == "why not"
    assert worker(Toy()).unsupported(PROBLEM) is None


def test_an_output_is_a_copy_and_anything_else_comes_back_as_it_is(prepared):
    kept = torch.zeros(2, 3)
    output = prepared(lambda: kept).output()
    kept += 1
    assert (output == 0).all()
    for other in (None, "text", (kept,), torch.nn.Parameter(kept)):
        assert prepared(lambda other=other: other).output() is other


def test_an_output_with_a_gradient_history_is_detached(prepared):
    leaf = torch.ones(3, requires_grad=True)
    output = prepared(lambda: leaf * 2).output()
    assert not output.requires_grad
    assert output.tolist() == [2, 2, 2]


# Inputs


def test_inputs_are_the_backends_own_copies_and_renewed_in_place(worker):
    seen = []
    made = worker(Toy(prepare=lambda problem, *qkv: seen.extend(qkv) or (lambda: qkv[0])))
    made.prepare(PROBLEM, INPUTS)
    assert [tensor.equal(value) for tensor, value in zip(seen, (INPUTS.q, INPUTS.k, INPUTS.v))] == [True] * 3
    addresses = [tensor.data_ptr() for tensor in seen]
    assert not set(addresses) & {INPUTS.q.data_ptr(), INPUTS.k.data_ptr(), INPUTS.v.data_ptr()}
    others = make_inputs(PROBLEM, 1)
    made.renew(others)
    assert [tensor.data_ptr() for tensor in seen] == addresses
    assert [tensor.equal(value) for tensor, value in zip(seen, (others.q, others.k, others.v))] == [True] * 3
    assert all(now.equal(put) for now, put in zip(made.inputs(), (others.q, others.k, others.v)))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_the_inputs_read_back_are_what_the_backend_left(worker, name):
    def prepare(problem, q, k, v):
        {"q": q, "k": k, "v": v}[name][0, 0, 0, 0] += 1
        return lambda: q

    made = worker(Toy(prepare=prepare))
    made.prepare(PROBLEM, INPUTS)
    pairs = zip("qkv", made.inputs(), (INPUTS.q, INPUTS.k, INPUTS.v))
    assert [key for key, now, put in pairs if not now.equal(put)] == [name]


@pytest.mark.parametrize("spoil", [lambda q: q.resize_(0), lambda q: q.requires_grad_()], ids=["resized", "grad"])
def test_inputs_that_cannot_be_renewed_are_the_backends_failure(worker, spoil):
    made = worker(Toy(prepare=lambda problem, q, k, v: lambda: spoil(q).new_zeros(4)))
    made.prepare(PROBLEM, INPUTS)
    made.output()
    status, reason = failure(made.renew, make_inputs(PROBLEM, 1))
    assert status is Status.RUNTIME_ERROR
    assert reason.startswith("renewing the inputs: RuntimeError: ")


def test_prepare_comes_before_any_call_and_release_ends_it(worker):
    made = worker(Toy())
    for ready in (False, True):
        if ready:
            made.prepare(PROBLEM, INPUTS)
            made.output()
            made.release()
        for function in (made.output, lambda: made.time_calls(1, **HOT), lambda: made.host_us(1)):
            with pytest.raises(RuntimeError, match=r"prepare\(\) comes before"):
                function()
        with pytest.raises(RuntimeError, match=r"prepare\(\) comes before"):
            made.inputs()


def test_a_prepare_that_fails_leaves_no_callable_of_the_last_problem(worker):
    calls = iter([lambda: INPUTS.q])
    made = worker(Toy(prepare=lambda *_: next(calls)))
    made.prepare(PROBLEM, INPUTS)
    assert failure(made.prepare, PROBLEM, INPUTS)[0] is Status.RUNTIME_ERROR
    with pytest.raises(RuntimeError, match="comes before"):
        made.output()


# Time


def loop(*_):
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            time.sleep(0.001)
        except Exception:  # a backend that swallows what it can
            continue


def test_a_backend_that_takes_too_long_is_stopped_wherever_it_is(worker, prepared):
    whole = worker(Toy(unsupported=loop, prepare=loop, parallel_units=loop), 0.05)
    called = prepared(loop, 0.05)
    for where, function, arguments in (
        ("unsupported()", whole.unsupported, (PROBLEM,)),
        ("parallel_units()", whole.parallel_units, (PROBLEM,)),
        ("prepare()", whole.prepare, (PROBLEM, INPUTS)),
        ("the call", called.output, ()),
        ("a timed call", lambda: called.time_calls(1, **HOT), ()),
        ("a call", called.host_us, (1,)),
    ):
        whole.begin()
        called.begin()
        assert failure(function, *arguments) == (Status.TIMEOUT, f"the limit of 0.05 s ran out at {where}")


def test_the_timeout_is_for_a_phase_in_all_and_each_phase_has_the_whole(prepared):
    def nap():
        time.sleep(0.2)
        return INPUTS.q.clone()

    made = prepared(nap, 0.7)
    made.time_calls(2, **HOT)
    assert failure(made.time_calls, 2, **HOT)[0] is Status.TIMEOUT
    assert failure(made.output)[0] is Status.TIMEOUT
    made.begin()
    assert made.output().equal(INPUTS.q)


@pytest.mark.parametrize(
    "call", [lambda: INPUTS.q.clone(), thrower(ValueError("x")), loop], ids=["fine", "raises", "hangs"]
)
def test_the_alarm_and_its_handler_are_as_before_afterwards(prepared, call):
    def mine(*_):
        raise AssertionError("the alarm rang after the call")

    made = prepared(call, 0.05)
    before = signal.signal(signal.SIGALRM, mine)
    try:
        with contextlib.suppress(CaseFailed):
            made.output()
        assert signal.getsignal(signal.SIGALRM) is mine
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_outside_the_main_thread_a_worker_works_without_an_alarm(prepared):
    made, outputs = prepared(lambda: INPUTS.q), []
    thread = threading.Thread(target=lambda: outputs.append(made.output()))
    thread.start()
    thread.join()
    assert outputs[0].equal(INPUTS.q)


def test_times_come_one_a_call(prepared):
    calls = []
    made = prepared(lambda: calls.append(1) or time.sleep(0.001))
    assert [len(made.time_calls(3, **HOT).timing.times_us), len(calls)] == [3, 3]
    assert min(made.host_us(2)) >= 1000
    assert len(calls) == 5


# Timed calls


def test_every_timed_call_sees_the_inputs_of_its_patch_and_the_prepared_ones_come_back(worker):
    seen, versions = [], []

    def prepare(problem, q, k, v):
        def call():
            seen.append(tuple(tensor.clone() for tensor in (q, k, v)))
            versions.append([tensor._version for tensor in (q, k, v)])
            return torch.zeros(problem.out_shape)

        return call

    made = worker(Toy(prepare=prepare))
    made.prepare(PROBLEM, INPUTS)
    made.time_calls(20, cold=False, seed=7, look_at=[])
    for call, tensors in enumerate(seen):
        expected = make_inputs(PROBLEM, 0)
        Patched(expected.q, expected.k, expected.v).lay(Patch.of(PROBLEM, 7, call))
        assert all(now.equal(put) for now, put in zip(tensors, (expected.q, expected.k, expected.v)))
    assert len({tuple(torch.cat([t.flatten() for t in tensors]).tolist()) for tensors in seen}) > 15
    assert versions == [versions[0]] * 20
    assert all(now.equal(put) for now, put in zip(made.inputs(), (INPUTS.q, INPUTS.k, INPUTS.v)))


def test_the_inputs_come_back_after_a_timed_call_that_raises(worker):
    made = worker(Toy(prepare=lambda *_: thrower(ValueError("no"))))
    made.prepare(PROBLEM, INPUTS)
    assert failure(made.time_calls, 3, **HOT)[0] is Status.RUNTIME_ERROR
    assert all(now.equal(put) for now, put in zip(made.inputs(), (INPUTS.q, INPUTS.k, INPUTS.v)))


def test_what_the_calls_looked_at_return_is_copied_at_once(prepared):
    kept, calls = torch.zeros(PROBLEM.out_shape), []

    def call():
        calls.append(1)
        return kept.fill_(len(calls))

    timed = prepared(call).time_calls(6, cold=False, seed=1, look_at=[1, 4])
    assert [output.unique().tolist() for output in timed.outputs] == [[2.0], [5.0]]
    assert timed.elapsed_s * 1e6 >= sum(timed.timing.times_us)


def test_a_returned_tensor_is_nan_when_the_next_call_begins(prepared):
    kept, found = torch.zeros(PROBLEM.out_shape), []

    def call():
        found.append(bool(kept.isnan().all()))
        return kept.zero_() if len(found) < 3 else kept

    made = prepared(call)
    timed = made.time_calls(4, cold=False, seed=1, look_at=[3])
    assert found == [False, True, True, True]
    assert timed.outputs[0].isnan().all()


@pytest.mark.parametrize("twin", [False, True])
def test_an_output_in_an_inputs_memory_is_refused(worker, twin):
    made = worker(Toy(prepare=lambda problem, q, k, v: lambda: k[:, :, :4]))
    made.prepare(PROBLEM, INPUTS)
    made.prepare_twin(PROBLEM, INPUTS)
    assert failure(made.output, twin=twin) == (Status.INCORRECT, "the output lies in the memory of its input k")
    assert failure(made.time_calls, 1, cold=False, seed=1, look_at=[0])[0] is Status.INCORRECT


def test_a_twin_is_prepared_beside_the_first_and_let_go_alone(worker):
    made = worker(Toy(prepare=lambda problem, q, k, v: lambda: q.clone()))
    others = make_inputs(PROBLEM, 1)
    made.prepare(PROBLEM, INPUTS)
    made.prepare_twin(PROBLEM, others)
    assert made.output(twin=True).equal(others.q)
    assert made.output().equal(INPUTS.q)
    made.release_twin()
    assert made.output().equal(INPUTS.q)
    with pytest.raises(RuntimeError, match="comes before any call of the twin"):
        made.output(twin=True)


@pytest.mark.parametrize("where", ["unsupported", "prepare", "parallel_units"])
def test_a_clock_that_was_changed_is_tampered_wherever_it_happens(worker, monkeypatch, where):
    monkeypatch.setattr(time, "perf_counter", time.perf_counter)  # so that it is put back

    def change(*_):
        time.perf_counter = lambda: 0.0

    made = worker(Toy(**{where: change}))
    asked = {
        "unsupported": lambda: made.unsupported(PROBLEM),
        "prepare": lambda: made.prepare(PROBLEM, INPUTS),
        "parallel_units": lambda: made.parallel_units(PROBLEM),
    }
    status, reason = failure(asked[where]) if where != "prepare" else failure(made.prepare, PROBLEM, INPUTS)
    assert (status, reason) in (
        (Status.TAMPERED, "it changed time.perf_counter"),
        (Status.RUNTIME_ERROR, "prepare(): TypeError: it returned a NoneType, nothing to call"),
    )
    assert failure(made.begin) == (Status.TAMPERED, "it changed time.perf_counter")


@pytest.mark.parametrize("shape", [(1, 1, 2048, 128), (3, 1, 7, 70_000), (2, 5, 1, 1), (1, 40_000), (0, 4), ()])
def test_nothing_between_timed_calls_is_large_enough_to_wake_torchs_threads(shape):
    tensor = torch.zeros(shape)
    pieces = list(_pieces(tensor))
    assert max(piece.numel() for piece in pieces) <= ONE_THREAD_VALUES < 32768
    for piece in pieces:
        piece += 1
    assert (tensor == 1).all()
    assert _copy(tensor).equal(tensor)
    assert _copy(tensor).data_ptr() != tensor.data_ptr() or not tensor.numel()
