"""attnbench.runner: how each kind of backend ends, that one's failure is nobody else's, and what is recorded when."""

from __future__ import annotations

import gc
import signal
import time
import weakref

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from attnbench import runner, turn
from attnbench.backend import Backend
from attnbench.blocks import Progress, Seen, Verdict
from attnbench.devices import DeviceInfo
from attnbench.devices.cpu import CpuDevice
from attnbench.errors import AttnbenchError
from attnbench.jit import CompileError
from attnbench.plan import Entry, Plan
from attnbench.problem import Problem, Suite
from attnbench.protocol import Protocol
from attnbench.reference import DISTRIBUTIONS
from attnbench.registry import BackendInfo, EntryPointRef
from attnbench.result import Check, Status
from attnbench.rows import row
from attnbench.seal import Seal
from attnbench.worker import Worker

SHAPE = {"seqlen_q": 8, "seqlen_k": 24, "head_dim": 16, "dtype": "fp32"}
PROBLEM = Problem(**SHAPE)
OTHER = Problem(**SHAPE | {"seqlen_q": 5, "causal": True})
DEVICE = DeviceInfo(kind="cpu", name="Test CPU", cores=8)
QUICK = Protocol(name="fixed", warmup=1, iters=4)
LEAST_CALLS = 1 + 5 + 3 + 4
"""Calls of a lane under QUICK: warm-up, host times, and of three rounds at least one call to warm up and four timed."""
BEFORE_TIMING = 2
"""The call that is judged first, and that beside the twin."""
NUMBERS = ("time_us", "tflops", "tflops_gemm", "mean_us", "median_us", "ci95_low_us", "host_us", "normalized_tflops")


def attend(problem, q, k, v):
    rows = torch.arange(problem.seqlen_q)[:, None] + problem.seqlen_k - problem.seqlen_q
    mask = torch.arange(problem.seqlen_k) <= rows if problem.causal else None
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=problem.softmax_scale)


class Right(Backend):
    """Correct, and the parent of everything that is not."""

    name, device = "right", "cpu"

    def prepare(self, problem, q, k, v):
        return lambda: attend(problem, q, k, v)

    def parallel_units(self, problem):
        return 1


class Wrong(Right):
    def prepare(self, problem, q, k, v):
        return lambda: torch.zeros(problem.out_shape)


class Stale(Right):
    """Right at first: it computes when it is prepared."""

    def prepare(self, problem, q, k, v):
        out = attend(problem, q, k, v)
        return lambda: out


class Overwrites(Right):
    def prepare(self, problem, q, k, v):
        def call():
            out = attend(problem, q, k, v)
            k.zero_()
            return out

        return call


class OverwritesLater(Right):
    """While it is timed, and by less than any error budget notices."""

    def prepare(self, problem, q, k, v):
        calls = []

        def call():
            calls.append(1)
            out = attend(problem, q, k, v)
            if 10 < len(calls) < 30:
                q[0, 0, 0, 0] *= 1 + 2**-22
                v[0, 0, 0, 0] *= 1 + 2**-22
            return out

        return call


class AnswersItsOwnQuestion(Right):
    """Gives the right answer to inputs that it made itself."""

    def prepare(self, problem, q, k, v):
        def call():
            q.zero_()
            return attend(problem, q, k, v)

        return call


class Subclass(Right):
    def prepare(self, problem, q, k, v):
        return lambda: torch.nn.Parameter(attend(problem, q, k, v))


class Meta(Right):
    def prepare(self, problem, q, k, v):
        return lambda: torch.empty(problem.out_shape, device="meta")


class Sparse(Right):
    def prepare(self, problem, q, k, v):
        return lambda: attend(problem, q, k, v).to_sparse()


class Declines(Right):
    def unsupported(self, problem):
        return "causal only" if not problem.causal else None


class DeclinesWithoutWords(Right):
    def unsupported(self, problem):
        return ""


class Nested(Right):
    def prepare(self, problem, q, k, v):
        return lambda: torch.nested.nested_tensor([q[0], q[0]])


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class NotCallable(Right):
    def prepare(self, problem, q, k, v):
        return attend(problem, q, k, v)


def hang(*_):
    end = time.monotonic() + 20
    while time.monotonic() < end:
        time.sleep(0.001)


def raising(where, error):
    """A backend that raises in one method: unsupported, prepare, parallel_units, call, or in a timed call alone."""

    class Raising(Right):
        def unsupported(self, problem):
            if where == "unsupported":
                raise error

        def parallel_units(self, problem):
            if where == "parallel_units":
                raise error
            return 1

        def prepare(self, problem, q, k, v):
            if where == "prepare":
                raise error
            calls = []

            def call():
                calls.append(1)
                if where == "call" or (where == "timing" and len(calls) > BEFORE_TIMING):
                    raise error
                return attend(problem, q, k, v)

            return call

    return Raising()


def slow(where):
    class Slow(Right):
        def prepare(self, problem, q, k, v):
            if where == "prepare":
                hang()
            calls = []

            def call():
                calls.append(1)
                if where == "call" or (where == "timing" and len(calls) > BEFORE_TIMING):
                    hang()
                return attend(problem, q, k, v)

            return call

    return Slow()


pytestmark = pytest.mark.usefixtures("one_thread")


class Calm:
    """A machine on which nothing happens."""

    def start(self): ...

    def stop(self):
        return Seen()


class Journal:
    """An observer and a record that write down what they are told."""

    def __init__(self):
        self.events, self.results = [], []

    def started(self, problem, index, total, block):
        self.events.append(("started", problem.case_id, index, total, block))

    def ended(self, results):
        self.events.append(("ended", [r.backend for r in results]))

    def add(self, results):
        self.events.append(("record", [r.backend for r in results]))
        self.results += results

    def add_block(self, progress, how):
        self.events.append(("block", sorted(progress.blocks[-1].laps)))


@pytest.fixture
def go():
    """Run backends, given by name, over problems; gives what was recorded."""

    def call(backends, problems=(PROBLEM,), protocol=QUICK, journal=None, entries=None, timeout_s=60.0, **options):
        infos = {
            name: BackendInfo(name, "cpu", "", "", True, None, EntryPointRef("toy", "1", name, name))
            for name in backends
        }
        entries = entries or [Entry(name, info) for name, info in infos.items()]
        plan = Plan(CpuDevice(), DEVICE, Suite("test", tuple(problems)), tuple(entries), None)
        journal = journal or Journal()
        seal = Seal()
        runner.Run(
            plan,
            protocol,
            journal,
            journal,
            start=lambda info: Worker(backends[info.name], CpuDevice(), timeout_s, seal),
            **{"watch": Calm(), **options},
        ).run()
        names = [entry.name for entry in entries]
        return sorted(journal.results, key=lambda r: (problems.index(r.problem), names.index(r.backend)))

    return call


# How each kind of backend ends


def test_a_correct_backend_passes_with_a_measurement_and_its_cores(go):
    (result,) = go({"right": Right()})
    assert (result.status, result.reason, result.used_cores) == (Status.PASSED, "", 1)
    assert result.check.passed
    assert result.check.inputs == "normal"
    assert len(result.measurement.samples) == 4
    assert (result.measurement.timing_method, result.measurement.statistic) == ("host_clock", "mean")
    assert row(result, DEVICE)["time_us"] == result.measurement.time_us


ENDS = [
    (Declines(), Status.UNSUPPORTED, "causal only"),
    (DeclinesWithoutWords(), Status.RUNTIME_ERROR, "unsupported(): TypeError: it returned a str, neither a reason nor"),
    (Nested(), Status.INCORRECT, "the output is a nested tensor, not a plain torch.Tensor"),
    (raising("prepare", GeneratorExit("out")), Status.RUNTIME_ERROR, "prepare(): GeneratorExit: out"),
    (raising("prepare", Unspeakable()), Status.RUNTIME_ERROR, "prepare(): Unspeakable: no message"),
    (raising("call", AttnbenchError("full", "empty it")), Status.RUNTIME_ERROR, "the call: full (empty it)"),
    (Wrong(), Status.INCORRECT, "max error "),
    (Subclass(), Status.INCORRECT, "the output is a Parameter, not a plain torch.Tensor"),
    (Meta(), Status.INCORRECT, "the output came back on meta"),
    (Sparse(), Status.INCORRECT, "the output's layout is torch.sparse_coo"),
    (Stale(), Status.INCORRECT, "a timed call: max error "),
    (Overwrites(), Status.INCORRECT, "it overwrote its input k"),
    (OverwritesLater(), Status.INCORRECT, "while it was timed, it overwrote its input q and v"),
    (AnswersItsOwnQuestion(), Status.INCORRECT, "it overwrote its input q"),
    (NotCallable(), Status.RUNTIME_ERROR, "prepare(): TypeError: it returned a Tensor, nothing to call"),
    (raising("unsupported", ValueError("no")), Status.RUNTIME_ERROR, "unsupported(): ValueError: no"),
    (raising("prepare", ValueError("no")), Status.RUNTIME_ERROR, "prepare(): ValueError: no"),
    (raising("call", ValueError("no")), Status.RUNTIME_ERROR, "the call: ValueError: no"),
    (raising("call", SystemExit(0)), Status.RUNTIME_ERROR, "the call: SystemExit: 0"),
    (raising("parallel_units", ValueError("no")), Status.RUNTIME_ERROR, "parallel_units(): ValueError: no"),
    (raising("timing", ValueError("no")), Status.RUNTIME_ERROR, "a timed call: ValueError: no"),
    (raising("prepare", CompileError("bad flag")), Status.COMPILE_ERROR, "prepare(): bad flag"),
    (raising("prepare", MemoryError()), Status.OOM, "prepare(): MemoryError"),
    (raising("timing", MemoryError()), Status.OOM, "a timed call: MemoryError"),
    (slow("prepare"), Status.TIMEOUT, "the limit of 1 s ran out at prepare()"),
    (slow("call"), Status.TIMEOUT, "the limit of 1 s ran out at the call"),
    (slow("timing"), Status.TIMEOUT, "the limit of 1 s ran out at a timed call"),
]


@pytest.mark.parametrize(("backend", "status", "words"), ENDS, ids=[f"{b.__class__.__name__}-{w}" for b, _, w in ENDS])
def test_how_a_backend_ends_and_that_the_others_pass_all_the_same(go, backend, status, words):
    timeout_s = 1.0 if status is Status.TIMEOUT else 60.0
    found = go({"first": Right(), "bad": backend, "last": Right()}, timeout_s=timeout_s)
    assert [r.backend for r in found] == ["first", "bad", "last"]
    assert [r.status for r in found] == [Status.PASSED, status, Status.PASSED]
    assert found[1].reason.startswith(words)
    assert found[1].measurement is None
    assert found[1].used_cores is None
    assert (found[1].check is not None) is (status is Status.INCORRECT)
    assert [column for column in NUMBERS if row(found[1], DEVICE)[column] is not None] == []
    assert {len(r.measurement.samples) for r in (found[0], found[2])} == {4}


def test_a_backend_that_is_not_available_gets_its_reason_and_is_never_loaded(go):
    entries = [Entry("elsewhere", None, Status.UNAVAILABLE, "it runs on npu"), None]
    info = BackendInfo("right", "cpu", "", "", True, None, EntryPointRef("toy", "1", "right", "right"))
    entries[1] = Entry("right", info)
    found = go({"right": Right()}, problems=(PROBLEM, OTHER), entries=entries)
    assert [(r.status, r.reason) for r in found] == [(Status.UNAVAILABLE, "it runs on npu"), (Status.PASSED, "")] * 2


@pytest.mark.parametrize("direction", ["bwd", "fwd_bwd"])
def test_only_the_forward_direction_is_judged(go, direction):
    (result,) = go({"right": Right()}, problems=[Problem(**SHAPE, direction=direction)])
    assert (result.status, result.reason) == (Status.UNSUPPORTED, "attnbench judges the forward direction alone")


def test_a_backend_that_fails_one_problem_runs_the_next(go):
    found = go({"picky": Declines()}, problems=(PROBLEM, OTHER))
    assert [r.status for r in found] == [Status.UNSUPPORTED, Status.PASSED]


@pytest.mark.parametrize("part", ["judge", "fault"])
def test_without_memory_to_judge_a_case_is_skipped_and_the_run_goes_on(go, monkeypatch, part):
    def full(*_, **__):
        raise MemoryError

    if part == "judge":
        monkeypatch.setattr(turn.Reference, "judge", full)
    else:
        monkeypatch.setattr(turn.spot, "fault", full)
    found = go({"right": Right()}, problems=(PROBLEM, OTHER))
    assert [r.status for r in found] == [Status.SKIPPED] * 2
    assert all(r.reason == "it cannot be judged: MemoryError: no message" for r in found)


def test_rows_to_check_are_drawn_anew_for_every_run(go, monkeypatch):
    seeds, of = [], turn.Reference.of

    def noted(problem, inputs, seed, rows_seed=None):
        seeds.append(rows_seed)
        return of(problem, inputs, seed, rows_seed)

    monkeypatch.setattr(turn.Reference, "of", noted)
    for _ in range(2):
        go({"right": Right()})
    assert None not in seeds
    assert len(set(seeds)) == len(seeds) >= 4


def test_the_home_folder_is_not_in_a_reason(go, monkeypatch):
    monkeypatch.setenv("HOME", "/home/jane")
    (result,) = go({"bad": raising("prepare", OSError("/home/jane/lib.so is missing"))})
    assert result.reason.startswith("prepare(): OSError: ~/lib.so is missing (test_runner.py, line ")


# Correctness alone


class WrongOn(Right):
    """Wrong where an input is as large as in one distribution alone."""

    def __init__(self, distribution):
        self.distribution = distribution

    def prepare(self, problem, q, k, v):
        def call():
            large_q, large_k = q.abs().max() > 8, k.abs().max() > 8
            now = "outliers" if large_k else "large_logits" if large_q else "normal"
            return attend(problem, q, k, v) * (2 if now == self.distribution else 1)

        return call


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_without_a_protocol_every_distribution_is_checked_and_the_worst_is_told(go, distribution):
    problem = Problem(**SHAPE | {"seqlen_k": 512})
    (right, wrong) = go({"right": Right(), "wrong": WrongOn(distribution)}, problems=[problem], protocol=None)
    assert right.status is Status.PASSED
    assert right.measurement is None
    assert right.used_cores == 1
    assert wrong.status is Status.INCORRECT
    assert wrong.check.inputs == distribution
    assert wrong.reason.endswith(f"({distribution} inputs)")


def test_without_a_protocol_a_stale_output_is_found_too(go):
    (result,) = go({"stale": Stale()}, protocol=None)
    assert result.status is Status.INCORRECT


def test_nothing_is_timed_that_is_wrong_and_the_calls_are_the_protocols(go):
    counts = {}

    def counting(parent, name):
        class Counting(parent):
            def prepare(self, problem, q, k, v):
                call = super().prepare(problem, q, k, v)
                counts.setdefault(name, 0)

                def counted():
                    counts[name] += 1
                    return call()

                return counted

        return Counting()

    go({"right": counting(Right, "right"), "wrong": counting(Wrong, "wrong")})
    # The first check, two calls side by side, the timing, and the check after it.
    assert counts["right"] >= 1 + 2 + LEAST_CALLS + 1
    assert counts["wrong"] == 1


# What is recorded when


def test_each_result_is_recorded_as_soon_as_it_is_final_a_wrong_one_before_any_is_timed(go):
    journal = Journal()
    go({"b": Right(), "a": Wrong(), "c": Right()}, problems=(PROBLEM, OTHER), journal=journal)
    names = ["b", "a", "c"]
    assert journal.events == [
        ("started", PROBLEM.case_id, 0, 2, 0),
        ("record", ["a"]),
        ("block", ["b", "c"]),
        *[("record", [name]) for name in ("b", "c")],
        ("ended", names),
        ("started", OTHER.case_id, 1, 2, 0),
        ("record", ["a"]),
        ("block", ["b", "c"]),
        *[("record", [name]) for name in ("b", "c")],
        ("ended", names),
    ]
    assert [r.problem for r in journal.results] == [PROBLEM] * 3 + [OTHER] * 3


FIVE_BLOCKS = Protocol(name="fixed", warmup=1, iters=100)


def test_a_block_goes_through_all_problems_with_fresh_workers_each(go):
    journal, prepared = Journal(), []

    class Watching(Right):
        def prepare(self, problem, q, k, v):
            prepared.append(problem)
            return super().prepare(problem, q, k, v)

    found = go({"a": Watching(), "b": Right()}, (PROBLEM, OTHER), FIVE_BLOCKS, journal)
    rounds = [event[1:] for event in journal.events if event[0] == "started"]
    assert rounds == [(p.case_id, i, 2, block) for block in range(5) for i, p in enumerate((PROBLEM, OTHER))]
    assert [len(r.measurement.blocks) for r in found] == [5] * 4
    assert {len(block) for r in found for block in r.measurement.blocks} == {20}
    # Once for its block and, in the first, once more beside itself.
    assert prepared == [PROBLEM, PROBLEM, OTHER, OTHER, *[PROBLEM, OTHER] * 4]
    kept = [event for event in journal.events if event[0] in ("block", "record")]
    block, records = ("block", ["a", "b"]), [("record", ["a"]), ("record", ["b"])]
    assert kept == [*[block] * 9, *records, block, *records]


class WrongInBlock(Right):
    """Wrong from its third preparation on, as the first block takes two."""

    def __init__(self):
        self.prepared = 0

    def prepare(self, problem, q, k, v):
        self.prepared += 1
        wrong = self.prepared > 2
        return lambda: attend(problem, q, k, v) * (2 if wrong else 1)


def test_a_backend_that_is_wrong_in_a_later_process_loses_all_its_blocks(go):
    found = go({"right": Right(), "wrong": WrongInBlock()}, protocol=FIVE_BLOCKS)
    assert [r.status for r in found] == [Status.PASSED, Status.INCORRECT]
    assert found[1].reason.startswith("a timed call: max error ")
    assert found[1].measurement is None
    assert len(found[0].measurement.blocks) == 5


class SharesState(Right):
    last = None

    def prepare(self, problem, q, k, v):
        SharesState.last = (q, k, v)
        return lambda: attend(problem, *SharesState.last)


@pytest.mark.parametrize("protocol", [QUICK, None], ids=["run", "check"])
def test_state_shared_between_two_preparations_is_found(go, protocol):
    (result,) = go({"shares": SharesState()}, protocol=protocol)
    assert result.status is Status.INCORRECT
    assert result.reason.startswith("prepared twice, side by side: max error ")


def test_what_cannot_be_is_implausible_and_has_no_number(go):
    (result, other) = go(
        {"a": Right(), "b": Right()}, implausible=lambda r: "faster than light" if r.backend == "a" else ""
    )
    assert (result.status, result.reason, result.measurement) == (Status.IMPLAUSIBLE, "faster than light", None)
    assert result.check is not None
    assert other.status is Status.PASSED


CHECK = Check(max_abs_err=0.0, err_budget=1e-6, classic_ok=True, inputs="normal", rows_checked=8, rows_total=8)
VERDICT = {"a": Verdict(check=CHECK, used_cores=1)}


class Stops(Exception):
    pass


def test_a_run_goes_on_from_the_blocks_and_results_of_an_earlier_one(go):
    class Stopping(Journal):
        def add_block(self, progress, how):
            super().add_block(progress, how)
            self.progress = progress
            if len(progress.blocks) == 3:
                raise Stops

    journal = Stopping()
    backends = {"a": Right(), "wrong": Wrong(), "b": Right()}
    with pytest.raises(Stops):
        go(backends, protocol=FIVE_BLOCKS, journal=journal)
    before = journal.progress
    first = [block.laps["a"].times_us for block in before.blocks]
    journal = Journal()
    found = go(backends, protocol=FIVE_BLOCKS, journal=journal, before={PROBLEM.case_id: before})
    assert [event for event in journal.events if event[0] == "started"] == [
        ("started", PROBLEM.case_id, 0, 1, 3),
        ("started", PROBLEM.case_id, 0, 1, 4),
    ]
    assert [(r.backend, r.status) for r in found] == [("a", Status.PASSED), ("b", Status.PASSED)]
    assert list(found[0].measurement.blocks[:3]) == first
    assert len(found[0].measurement.blocks) == 5


def test_a_problem_with_blocks_enough_is_finished_without_another(go):
    class Keeping(Journal):
        def add_block(self, progress, how):
            self.progress = progress

        def add(self, results):
            raise Stops

    journal = Keeping()
    with pytest.raises(Stops):
        go({"a": Right()}, journal=journal)
    before = Progress(problem=PROBLEM, verdicts=dict(VERDICT), blocks=list(journal.progress.blocks))
    journal = Journal()
    (result,) = go({"a": Right()}, journal=journal, before={PROBLEM.case_id: before})
    assert result.status is Status.PASSED
    assert [event[0] for event in journal.events] == ["record", "ended"]


@pytest.mark.parametrize("where", ["unsupported", "prepare", "call", "timing"])
def test_an_interrupt_passes_through_and_what_was_finished_stays(go, where):
    class Interrupted(Right):
        def unsupported(self, problem):
            return None

        def prepare(self, problem, q, k, v):
            return (raising(where, KeyboardInterrupt()) if problem == OTHER else Right()).prepare(problem, q, k, v)

    if where == "unsupported":
        Interrupted.unsupported = lambda self, problem: (
            raising(where, KeyboardInterrupt()).unsupported(problem) if problem == OTHER else None
        )
    journal = Journal()
    with pytest.raises(KeyboardInterrupt):
        go({"right": Right(), "stopped": Interrupted()}, problems=(PROBLEM, OTHER), journal=journal)
    assert [r.key for r in journal.results] == [(PROBLEM.case_id, "right"), (PROBLEM.case_id, "stopped")]
    assert gc.isenabled()


def test_the_seed_decides_the_inputs(go):
    seen = {}
    for seed in (0, 0, 1):

        class Watching(Right):
            def prepare(self, problem, q, k, v):
                seen.setdefault(seed, []).append(q.clone())  # noqa: B023
                return super().prepare(problem, q, k, v)

        go({"a": Watching(), "b": Watching()}, seed=seed)
    # Each backend prepares the inputs and, beside them, others.
    assert [q.equal(seen[0][index % 2]) for index, q in enumerate(seen[0])] == [True] * 8
    assert not seen[0][0].equal(seen[0][1])
    assert not seen[1][0].equal(seen[0][0])


def test_memory_is_let_go_after_each_problem(go):
    alive = []

    class Watching(Right):
        def prepare(self, problem, q, k, v):

            gc.collect()
            alive.append(sum(ref() is not None for ref in refs))
            refs.append(weakref.ref(q))
            return super().prepare(problem, q, k, v)

    refs = []
    go({"a": Watching(), "b": Watching()}, problems=(PROBLEM, OTHER, Problem(**SHAPE | {"seqlen_q": 3})))
    # A twin finds the first; b finds a's inputs of the same problem, and none of an earlier one.
    assert alive == [0, 1, 1, 2] * 3


# What is as before afterwards


def test_no_garbage_is_collected_while_timing_and_it_is_again_afterwards(go):
    enabled = []

    class Watching(Right):
        def prepare(self, problem, q, k, v):
            def call():
                enabled.append(gc.isenabled())
                return attend(problem, q, k, v)

            return call

    go({"a": Watching(), "bad": raising("timing", ValueError("x"))})
    assert len(enabled) >= 1 + LEAST_CALLS + 1
    # The check, and both of two prepared side by side; the last call is on new inputs.
    assert enabled == [True] * 3 + [False] * (len(enabled) - 4) + [True]
    assert gc.isenabled()


def test_the_alarm_is_as_before_afterwards(go):
    before = signal.getsignal(signal.SIGALRM)
    go({"a": Right(), "hangs": slow("call"), "bad": raising("call", ValueError("x"))}, timeout_s=1.0)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_reason_is_one_line_without_the_home_folder(go, monkeypatch):
    monkeypatch.setenv("HOME", "/home/jane")
    backend = Right()
    backend.unsupported = lambda problem: "needs\n /home/jane/sdk"
    (result,) = go({"a": backend})
    assert (result.status, result.reason) == (Status.UNSUPPORTED, "needs ~/sdk")
