"""Owns one block of one problem: prepare, check, time side by side, judge what was timed. Knows no record."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from attnbench import ledger, spot
from attnbench.blocks import Block, Lap, Progress, Verdict
from attnbench.devices import Device, Timing
from attnbench.environment import one_line
from attnbench.errors import in_a_line
from attnbench.isolation import IsolatedWorker
from attnbench.ledger import Ledger
from attnbench.patches import Patch
from attnbench.plan import Entry
from attnbench.problem import Problem
from attnbench.protocol import Protocol, Watch, take_block
from attnbench.reference import DISTRIBUTIONS, Distribution, Inputs, Reference, Unjudgeable, derive_seed, make_inputs
from attnbench.result import HOST_CLOCK, Check, Status
from attnbench.wire import OUTPUTS
from attnbench.worker import REASON_LENGTH, CaseFailed, Worker

AnyWorker = Worker | IsolatedWorker

FIRST_INPUTS: Distribution = "normal"
"""What is timed: data as most users have it."""
SMALL_PAIRS = 1 << 20
"""Below so many (query, key) pairs other inputs get an error budget of their own; above, draws differ little."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is the same for all turns of a run."""

    protocol: Protocol | None
    """None where correctness alone is checked."""
    seed: int
    watch: Watch
    books: Ledger
    device: Device


Fail = Callable[[str, CaseFailed], None]
"""Told that a backend is done with the problem, and how it ended."""


class Turn:
    """One block of one problem on all backends that are not done with it."""

    def __init__(self, bench: Bench, progress: Progress, workers: Mapping[str, AnyWorker], fail: Fail) -> None:
        self._bench = bench
        self._progress = progress
        self._problem = progress.problem
        self._workers = workers
        self._fail = fail
        self._drawn: dict[tuple[int, Distribution], Inputs] = {}
        self._references: dict[tuple[int, Distribution], Reference] = {}

    def take(self, entries: Sequence[Entry]) -> Block | None:
        """Admit the backends of `entries` and, under a protocol, time them; None where none is left or timed."""
        lanes: dict[str, _Lane] = {}
        for entry in entries:
            with self._failing(entry.name):
                self._admit(entry)
                lanes[entry.name] = self._lane(entry.name)
        protocol = self._bench.protocol
        block = self._time(lanes, protocol) if lanes and protocol is not None else None
        for worker in self._workers.values():
            worker.release()
        return block

    @contextlib.contextmanager
    def _failing(self, backend: str) -> Iterator[None]:
        """A backend's failure ends its case here."""
        try:
            yield
        except CaseFailed as failure:
            self._fail(backend, failure)

    def _admit(self, entry: Entry) -> None:
        """Prepare and check one backend. Raises CaseFailed where it ends here."""
        if entry.backend is None:
            raise CaseFailed(entry.status or Status.UNAVAILABLE, one_line(entry.reason))
        if self._problem.direction != "fwd":
            raise CaseFailed(Status.UNSUPPORTED, "attnbench judges the forward direction alone")
        worker = self._workers[entry.name]
        worker.begin()
        if entry.name not in self._progress.verdicts:
            self._progress.verdicts[entry.name] = self._first_verdict(worker)
        else:
            self._prepare(worker, self._inputs(self._bench.seed))  # what it gives is judged while it is timed
        worker.pause()

    def _first_verdict(self, worker: AnyWorker) -> Verdict:
        """The whole check: every row, and two preparations side by side."""
        reason = worker.unsupported(self._problem)
        if reason is not None:
            raise CaseFailed(Status.UNSUPPORTED, one_line(reason))
        worst = max(self._checks(worker), key=lambda check: check.severity)
        if not worst.passed:
            raise CaseFailed(Status.INCORRECT, worst.fault, worst)
        self._check_twin(worker)
        return Verdict(check=worst, used_cores=worker.parallel_units(self._problem))

    def _checks(self, worker: AnyWorker) -> Iterator[Check]:
        """The verdict on the inputs that will be timed and, where nothing is timed, on all the others."""
        others = [] if self._bench.protocol else [name for name in DISTRIBUTIONS if name != FIRST_INPUTS]
        inputs, reference = self._reference(FIRST_INPUTS)
        self._prepare(worker, inputs)
        yield self._judge(worker, inputs, reference)
        for distribution in others:
            inputs, reference = self._reference(distribution)
            worker.renew(inputs)
            yield self._judge(worker, inputs, reference)

    def _judge(self, worker: AnyWorker, inputs: Inputs, reference: Reference) -> Check:
        with _judging(self._bench.books):
            check = reference.judge(worker.output())
            changed = _changed(worker, inputs)
            return reference.fault(changed) if changed else check

    def _check_twin(self, worker: AnyWorker) -> None:
        """Prepared once more on other inputs, both must be right: nothing is shared between the two."""
        inputs, reference = self._reference(FIRST_INPUTS)
        others, budget = self._other_inputs(reference.err_budget)
        if self._bench.protocol is None:  # the last distribution checked is in there
            worker.renew(inputs)
        with self._bench.books.spend(ledger.PREPARE):
            worker.prepare_twin(self._problem, others)
        with _judging(self._bench.books):
            for twin, expected in ((True, others), (False, inputs)):
                fault = spot.fault(self._problem, expected, worker.output(twin=twin), budget, _unforeseen())
                if fault:
                    raise CaseFailed(Status.INCORRECT, f"prepared twice, side by side: {fault}")
            worker.release_twin()

    def _lane(self, backend: str) -> _Lane:
        blocks, budget = self._progress.blocks, self._progress.verdicts[backend].check.err_budget
        before = blocks[-1].laps.get(backend) if blocks else None
        inputs = self._inputs(self._bench.seed)
        return _Lane(self._bench, self._problem, inputs, budget, self._workers[backend], before)

    def _time(self, lanes: dict[str, _Lane], protocol: Protocol) -> Block | None:
        for name in list(lanes):
            try:
                self._workers[name].begin()
            except CaseFailed as failure:
                del lanes[name]
                self._fail(name, failure)
        for worker in self._workers.values():  # also of those that have nothing to be timed here
            worker.pause()
        number = len(self._progress.blocks)
        with self._bench.books.spend(ledger.WAITING):
            block = take_block(
                lanes,
                protocol,
                number,
                seed=derive_seed(self._bench.seed, self._problem.case_id, "order", number),
                watch=self._bench.watch,
                expected=CaseFailed,
                failed=self._fail,
                known_us=self._known_us(protocol),
            )
        for lane in lanes.values():
            self._bench.books.move(lane.timed_s, ledger.WAITING, ledger.TIMED)
        if block is None:
            return None
        right = [name for name in block.laps if self._is_still_right(name)]
        if not right:
            return None
        return dataclasses.replace(block, laps={name: block.laps[name] for name in right})

    def _known_us(self, protocol: Protocol) -> dict[str, float]:
        """What a call took in the last block, where that says how many fit into a round and nothing else is asked."""
        blocks = self._progress.blocks
        if not blocks or protocol.cache == "cold" or self._bench.device.timing_method != HOST_CLOCK:
            return {}
        return {name: blocks[-1].time_us(name) for name in blocks[-1].laps}

    def _is_still_right(self, backend: str) -> bool:
        """Judge once more, on other inputs in the same tensors; what was only right at first gets no number."""
        worker = self._workers[backend]
        with self._failing(backend):
            with _judging(self._bench.books):
                if changed := _changed(worker, self._inputs(self._bench.seed)):
                    raise CaseFailed(Status.INCORRECT, f"while it was timed, {changed}")
            inputs, budget = self._other_inputs(self._progress.verdicts[backend].check.err_budget)
            worker.renew(inputs)
            with _judging(self._bench.books):
                fault = spot.fault(self._problem, inputs, worker.output(), budget, _unforeseen())
                if fault:
                    raise CaseFailed(Status.INCORRECT, f"after timing, on new inputs: {fault}")
            worker.pause()
            return True
        return False

    def _prepare(self, worker: AnyWorker, inputs: Inputs) -> None:
        with self._bench.books.spend(ledger.PREPARE):
            worker.prepare(self._problem, inputs)

    def _inputs(self, seed: int, distribution: Distribution = FIRST_INPUTS) -> Inputs:
        key = (seed, distribution)
        if key not in self._drawn:
            with self._bench.books.spend(ledger.ORACLE):
                try:
                    self._drawn[key] = make_inputs(self._problem, seed, distribution)
                except (Unjudgeable, MemoryError, RuntimeError) as error:
                    raise _skipped(error) from error
        return self._drawn[key]

    def _reference(self, distribution: Distribution) -> tuple[Inputs, Reference]:
        """Inputs and oracle, computed once for all backends."""
        return self._reference_of(self._bench.seed, distribution)

    def _reference_of(self, seed: int, distribution: Distribution) -> tuple[Inputs, Reference]:
        inputs = self._inputs(seed, distribution)
        key = (seed, distribution)
        if key not in self._references:
            with self._bench.books.spend(ledger.ORACLE):
                try:
                    self._references[key] = Reference.of(self._problem, inputs, seed, _unforeseen())
                except (Unjudgeable, MemoryError, RuntimeError) as error:
                    raise _skipped(error) from error
        return inputs, self._references[key]

    def _other_inputs(self, err_budget: float) -> tuple[Inputs, float]:
        """Inputs that this block has not shown the backend yet, and what error they may have."""
        seed = derive_seed(self._bench.seed, "other", len(self._progress.blocks))
        if self._problem.visible_pairs >= SMALL_PAIRS:
            return self._inputs(seed), err_budget
        try:
            inputs, reference = self._reference_of(seed, FIRST_INPUTS)
        except CaseFailed:  # these ones happen to be hard; the first ones were not
            return self._inputs(seed), err_budget
        return inputs, max(err_budget, reference.err_budget)


class _Lane:
    """A prepared backend as the protocol times it: what it returns meanwhile is judged at once."""

    def __init__(
        self,
        bench: Bench,
        problem: Problem,
        inputs: Inputs,
        err_budget: float,
        worker: AnyWorker,
        before: Lap | None,
    ) -> None:
        """`before` is of the last block, if there was one."""
        self._method = before.timing_method if before else None
        self._fallback = before.fallback if before else ""
        self._bench = bench
        self._problem = problem
        self._inputs = inputs
        self._err_budget = err_budget
        self._worker = worker
        self.timed_s = 0.0

    def warm_up(self, seconds: float) -> float:
        return self._worker.warm_up(seconds, _unforeseen())

    def time_calls(self, count: int, *, cold: bool) -> Timing:
        """Raises CaseFailed: INCORRECT where one of the calls looked at gave something wrong, or RUNTIME_ERROR where
        they could not be timed as those before were, which no measurement could hold."""
        seed = _unforeseen()
        look_at = sorted(random.SystemRandom().sample(range(count), min(OUTPUTS, count)))
        timed = self._worker.time_calls(count, cold=cold, seed=seed, look_at=look_at)
        timing = timed.timing
        self.timed_s += timing.total_us(count) / 1e6
        why = one_line(timing.fallback)[:REASON_LENGTH]
        if self._method not in (None, timing.method):
            changed = f"timed by {timing.method}, and before by {self._method}"
            why = why or self._fallback  # why one of the two is not the device's own
            raise CaseFailed(Status.RUNTIME_ERROR, f"{changed}: {why}" if why else changed)
        self._method, self._fallback = timing.method, why
        with _judging(self._bench.books):
            for call, output in zip(look_at, timed.outputs):
                patch = Patch.of(self._problem, seed, call - call % timing.calls_a_change)
                fault = spot.fault(self._problem, self._inputs, output, self._err_budget, _unforeseen(), patch)
                if fault:
                    raise CaseFailed(Status.INCORRECT, f"a timed call: {fault}")
        return dataclasses.replace(timing, fallback=why)

    def host_us(self, count: int) -> list[float]:
        """None where a call is over when it returns."""
        return [] if self._bench.device.timing_method == HOST_CLOCK else self._worker.host_us(count)

    def pause(self) -> None:
        self._worker.pause()


@contextlib.contextmanager
def _judging(books: Ledger) -> Iterator[None]:
    """Count what is done as checking; where attnbench itself has no memory for it, the case cannot be judged."""
    with books.spend(ledger.CHECK):
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            raise _skipped(error) from error


def _skipped(error: Exception) -> CaseFailed:
    """attnbench's own part could not be done: no judgement, or no memory for it, which torch calls a RuntimeError."""
    if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
        raise error
    words = str(error) if isinstance(error, Unjudgeable) else in_a_line(error)
    return CaseFailed(Status.SKIPPED, f"it cannot be judged: {words}")


def _unforeseen() -> int:
    """A seed that no backend can know: which calls and rows are looked at, and how inputs change."""
    return secrets.randbits(63)


def _changed(worker: AnyWorker, inputs: Inputs) -> str:
    """That the backend overwrote inputs, in words; empty where it did not."""
    pairs = zip("qkv", worker.inputs(), (inputs.q, inputs.k, inputs.v))
    changed = [name for name, now, put in pairs if not now.equal(put)]
    return f"it overwrote its input {' and '.join(changed)}" if changed else ""
