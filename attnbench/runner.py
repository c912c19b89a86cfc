"""Owns the order of things: check, time side by side, judge again, record. Knows no vendor, no format and no table."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol as TypingProtocol

from attnbench import protocol as timing
from attnbench.environment import one_line
from attnbench.isolation import IsolatedWorker
from attnbench.plan import Entry, Plan
from attnbench.problem import Problem
from attnbench.protocol import Protocol
from attnbench.reference import DISTRIBUTIONS, Distribution, Inputs, Reference, Unjudgeable, derive_seed, make_inputs
from attnbench.registry import BackendInfo
from attnbench.result import Check, Measurement, Result, Status
from attnbench.worker import CaseFailed, Worker

AnyWorker = Worker | IsolatedWorker

DEFAULT_TIMEOUT_S = 120.0
FIRST_INPUTS: Distribution = "normal"
"""What is timed: data as most users have it."""


class Observer(TypingProtocol):
    """Who wants to know how far a run is. Nothing is told while a backend is timed."""

    def started(self, problem: Problem, index: int, total: int) -> None: ...

    def ended(self, results: Sequence[Result]) -> None: ...


@dataclass
class _Case:
    """One admitted backend on the problem in hand."""

    entry: Entry
    worker: AnyWorker
    check: Check
    used_cores: int | None


def run(
    plan: Plan,
    protocol: Protocol | None,
    record: Callable[[Sequence[Result]], None],
    observer: Observer,
    *,
    seed: int = 0,
    start: Callable[[BackendInfo], AnyWorker],
    done: Collection[tuple[str, str]] = (),
) -> None:
    """Run the plan problem by problem; `record` gets each result as soon as it is final.

    `start` gives the worker of a backend, in this process or in one of its own. Without a protocol correctness alone
    is checked, on every distribution of inputs. Cases in `done`, keyed as `Result.key`, are left out.
    """
    workers = {entry.name: start(entry.backend) for entry in plan.entries if entry.backend is not None}
    try:
        _run(plan, protocol, record, observer, seed, workers, done)
    finally:
        for worker in workers.values():
            worker.close()


def _run(
    plan: Plan,
    protocol: Protocol | None,
    record: Callable[[Sequence[Result]], None],
    observer: Observer,
    seed: int,
    workers: Mapping[str, AnyWorker],
    done: Collection[tuple[str, str]],
) -> None:
    problems = plan.suite.problems
    for index, problem in enumerate(problems):
        entries = [entry for entry in plan.entries if (problem.case_id, entry.name) not in done]
        if not entries:
            continue
        observer.started(problem, index, len(problems))
        results = _Round(plan, problem, entries, workers, protocol, seed, record).run()
        observer.ended(results)


class _Round:
    """One problem on all its backends."""

    def __init__(
        self,
        plan: Plan,
        problem: Problem,
        entries: Sequence[Entry],
        workers: Mapping[str, AnyWorker],
        protocol: Protocol | None,
        seed: int,
        record: Callable[[Sequence[Result]], None],
    ) -> None:
        self._plan = plan
        self._record = record
        self._problem = problem
        self._entries = entries
        self._workers = workers
        self._protocol = protocol
        self._seed = seed
        self._results: dict[str, Result] = {}
        self._references: dict[tuple[int, Distribution], tuple[Inputs, Reference]] = {}

    def run(self) -> list[Result]:
        cases = [case for entry in self._entries if (case := self._admit(entry)) is not None]
        measurements: dict[str, Measurement] = {}
        if self._protocol is not None and cases:
            measurements = self._time(cases, self._protocol)
            cases = [case for case in cases if case.entry.name in measurements and self._still_right(case)]
        for case in cases:
            self._end(case.entry, Status.PASSED, case=case, measurement=measurements.get(case.entry.name))
        for worker in self._workers.values():
            worker.release()
        return [self._results[entry.name] for entry in self._entries]

    def _admit(self, entry: Entry) -> _Case | None:
        """Prepare and check one backend; None where it ended here."""
        if entry.backend is None:
            self._end(entry, entry.status or Status.UNAVAILABLE, one_line(entry.reason))
            return None
        if self._problem.direction != "fwd":
            self._end(entry, Status.UNSUPPORTED, "attnbench judges the forward direction alone")
            return None
        try:
            worker = self._workers[entry.name]
            worker.begin()
            reason = worker.unsupported(self._problem)
            if reason is not None:
                self._end(entry, Status.UNSUPPORTED, one_line(reason))
                return None
            checks = list(self._checks(worker))
            worst = max(checks, key=lambda check: check.severity)
            if not worst.passed:
                self._end(entry, Status.INCORRECT, worst.fault, check=worst)
                return None
            return _Case(entry, worker, worst, worker.parallel_units(self._problem))
        except CaseFailed as failure:
            self._end(entry, failure.status, failure.reason)
            return None

    def _checks(self, worker: AnyWorker) -> Iterator[Check]:
        """The verdict on the inputs that will be timed and, where nothing is timed, on all the others."""
        others = [] if self._protocol else [name for name in DISTRIBUTIONS if name != FIRST_INPUTS]
        inputs, reference = self._reference(self._seed, FIRST_INPUTS)
        worker.prepare(self._problem, inputs)
        yield self._judge(worker, inputs, reference)
        for distribution in others:
            inputs, reference = self._reference(self._seed, distribution)
            worker.renew(inputs)
            yield self._judge(worker, inputs, reference)

    def _judge(self, worker: AnyWorker, inputs: Inputs, reference: Reference) -> Check:
        check = reference.judge(worker.output())
        pairs = zip("qkv", worker.inputs(), (inputs.q, inputs.k, inputs.v))
        changed = [name for name, now, put in pairs if not now.equal(put)]
        return reference.fault(f"it overwrote its input {' and '.join(changed)}") if changed else check

    def _reference(self, seed: int, distribution: Distribution) -> tuple[Inputs, Reference]:
        """Inputs and oracle, computed once for all backends."""
        key = (seed, distribution)
        if key not in self._references:
            try:
                inputs = make_inputs(self._problem, seed, distribution)
                self._references[key] = (inputs, Reference.of(self._problem, inputs, seed))
            except Unjudgeable as error:
                raise CaseFailed(Status.SKIPPED, f"it cannot be judged: {error}") from error
        return self._references[key]

    def _time(self, cases: Sequence[_Case], protocol: Protocol) -> dict[str, Measurement]:
        by_name: dict[str, _Case] = {}
        for case in cases:
            try:
                case.worker.begin()
                by_name[case.entry.name] = case
            except CaseFailed as failure:
                self._end(case.entry, failure.status, failure.reason)

        def failed(name: str, error: CaseFailed) -> None:
            self._end(by_name[name].entry, error.status, error.reason)

        return timing.measure(
            {name: case.worker for name, case in by_name.items()},
            protocol,
            seed=derive_seed(self._seed, self._problem.case_id, "order"),
            timing_method=self._plan.device.timing_method,
            clock_mhz=lambda: self._plan.device.reading().clock_mhz,
            expected=CaseFailed,
            failed=failed,
        )

    def _still_right(self, case: _Case) -> bool:
        """Judge once more, on other inputs in the same tensors; what was only right at first gets no number."""
        inputs, reference = self._reference(derive_seed(self._seed, "after timing"), FIRST_INPUTS)
        try:
            case.worker.renew(inputs)
            check = self._judge(case.worker, inputs, reference)
        except CaseFailed as failure:
            self._end(case.entry, failure.status, failure.reason)
            return False
        if not check.passed:
            self._end(case.entry, Status.INCORRECT, f"after timing, on new inputs: {check.fault}", check=check)
        return check.passed

    def _end(
        self,
        entry: Entry,
        status: Status,
        reason: str = "",
        *,
        check: Check | None = None,
        case: _Case | None = None,
        measurement: Measurement | None = None,
    ) -> None:
        self._results[entry.name] = result = Result(
            problem=self._problem,
            backend=entry.name,
            device=self._plan.device.kind,
            status=status,
            reason=reason,
            check=case.check if case else check,
            measurement=measurement,
            used_cores=case.used_cores if case else None,
        )
        self._record([result])
