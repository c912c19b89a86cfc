"""Owns the order of things: block by block through all problems, until each has enough. Knows no vendor and no format.

Every block is taken by fresh workers, which go through the whole suite: so a fresh process costs one start a backend
and block, not one a case.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from typing import Protocol as TypingProtocol

from attnbench import ledger
from attnbench.blocks import How, Progress
from attnbench.ledger import Ledger
from attnbench.plan import Entry, Plan
from attnbench.problem import Problem
from attnbench.protocol import Protocol, Watch
from attnbench.registry import BackendInfo
from attnbench.result import Result, Status
from attnbench.turn import AnyWorker, Bench, Turn
from attnbench.worker import CaseFailed

DEFAULT_TIMEOUT_S = 120.0


class Observer(TypingProtocol):
    """Who wants to know how far a run is. Nothing is told while a backend is timed."""

    def started(self, problem: Problem, index: int, total: int, block: int) -> None:
        """Problem `index` of `total` whose block `block`, from 0, is taken."""
        ...

    def ended(self, results: Sequence[Result]) -> None:
        """A problem is over, on all its backends."""
        ...


class Recorder(TypingProtocol):
    """Who keeps what a run gives, at once and for good."""

    def add(self, results: Sequence[Result]) -> None: ...

    def add_block(self, progress: Progress, how: How) -> None:
        """The last of the problem's blocks is new."""
        ...


class Run:
    """One run of a plan."""

    def __init__(
        self,
        plan: Plan,
        protocol: Protocol | None,
        recorder: Recorder,
        observer: Observer,
        *,
        start: Callable[[BackendInfo], AnyWorker],
        watch: Watch,
        seed: int = 0,
        baseline: str | None = None,
        implausible: Callable[[Result], str] = lambda _: "",
        before: Mapping[str, Progress] | None = None,
        books: Ledger | None = None,
    ) -> None:
        """`start` gives the worker of a backend, in this process or in one of its own.

        Without a protocol correctness alone is checked, on every distribution of inputs. Whether a problem has blocks
        enough is a matter of the ratios to `baseline`. `implausible` says why a result cannot be. `before` is what an
        earlier run of the plan got to, by case_id.
        """
        self._plan = plan
        self._recorder = recorder
        self._observer = observer
        self._start = start
        self._baseline = baseline
        self._implausible = implausible
        self._books = books or Ledger()
        self._bench = Bench(protocol=protocol, seed=seed, watch=watch, books=self._books, device=plan.device)
        self._progress = [(before or {}).get(p.case_id) or Progress(problem=p) for p in plan.suite.problems]

    def run(self) -> None:
        """Go through the problems until none needs another block."""
        for progress in self._progress:  # those that an earlier run got to
            self._finish_if_enough(progress)
        while waiting := [progress for progress in self._progress if self._entries(progress)]:
            number = min(len(progress.blocks) for progress in waiting)
            self._pass([progress for progress in waiting if len(progress.blocks) == number], number)

    @property
    def _how(self) -> How:
        protocol, device = self._bench.protocol, self._plan.device
        assert protocol is not None
        return How(device.kind, protocol.statistic, protocol.cache)

    def _entries(self, progress: Progress) -> list[Entry]:
        """The backends that are not done with a problem."""
        return [entry for entry in self._plan.entries if entry.name not in progress.results]

    def _pass(self, due: Sequence[Progress], number: int) -> None:
        """One block of every problem that is due, all by the same fresh workers."""
        names = {entry.name for progress in due for entry in self._entries(progress)}
        workers: dict[str, AnyWorker] = {}
        try:
            with self._books.spend(ledger.START):
                for entry in self._plan.entries:
                    if entry.backend is not None and entry.name in names:
                        workers[entry.name] = self._start(entry.backend)
                for worker in workers.values():  # nothing is timed while another process is still starting
                    worker.ready()
                for worker in workers.values():
                    worker.pause()
            for index, progress in enumerate(due):
                self._observer.started(progress.problem, index, len(due), number)
                turn = Turn(self._bench, progress, workers, lambda *how: self._fail(progress, *how))  # noqa: B023
                block = turn.take(self._entries(progress))
                if block is not None:
                    progress.blocks.append(block)
                    self._recorder.add_block(progress, self._how)
                    self._refuse_implausible(progress)
                self._finish_if_enough(progress)
        finally:
            with self._books.spend(ledger.START):
                for worker in workers.values():
                    worker.close()

    def _finish_if_enough(self, progress: Progress) -> None:
        """Make results of a problem that was checked, where only that was asked for, or that has blocks enough."""
        protocol = self._bench.protocol
        if protocol is None:
            for name, verdict in list(progress.verdicts.items()):
                passed = {"check": verdict.check, "used_cores": verdict.used_cores}
                self._keep(progress, self._result(progress, name, Status.PASSED, **passed))
        elif progress.verdicts and progress.blocks and protocol.enough(progress.blocks, self._baseline):
            for result in progress.timed(self._how):
                self._keep(progress, result)

    def _refuse_implausible(self, progress: Progress) -> None:
        for result in progress.timed(self._how):
            if fault := self._implausible(result):
                self._fail(progress, result.backend, CaseFailed(Status.IMPLAUSIBLE, fault, result.check))

    def _fail(self, progress: Progress, backend: str, failure: CaseFailed) -> None:
        check = failure.check
        if check is None and failure.status is Status.INCORRECT and backend in progress.verdicts:
            # It passed its first check; the budget there still says what was allowed.
            check = dataclasses.replace(progress.verdicts[backend].check, max_abs_err=None, fault=failure.reason)
        self._keep(progress, self._result(progress, backend, failure.status, reason=failure.reason, check=check))

    def _result(self, progress: Progress, backend: str, status: Status, **fields: Any) -> Result:
        """A result without a measurement."""
        device = self._plan.device.kind
        return Result(problem=progress.problem, backend=backend, device=device, status=status, **fields)

    def _keep(self, progress: Progress, result: Result) -> None:
        progress.verdicts.pop(result.backend, None)
        progress.results[result.backend] = result
        self._recorder.add([result])
        if not self._entries(progress):
            self._observer.ended([progress.results[entry.name] for entry in self._plan.entries])
