"""Owns what every backend must do, as tests that its author runs under pytest. Knows no plugin, no clock, no process.

    from attnbench.testing import BackendConformance
    from my_flash import MyFlash

    class TestMyFlash(BackendConformance):
        backend = MyFlash()

A test is skipped, with the backend's own words, where it is unavailable or says that it does not support the problem.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn
from unittest import SkipTest

import torch
from torch import Tensor

from attnbench import devices, patches, spot
from attnbench.backend import Backend, faults
from attnbench.devices import Device
from attnbench.problem import DTYPES, Dtype, Problem
from attnbench.reference import DISTRIBUTIONS, Distribution, Inputs, Reference, Unjudgeable, make_inputs, torch_dtype

SEED = 20240229
LATE_S = 0.05
"""How long an output is watched after its call, for what a thread or a stream still writes into it."""
BUSY_GEMMS = 20
"""What another stream is kept busy with, of 4096³ in fp32 each: some 50 ms on an H100."""
TILE = 128
"""Lengths that a kernel refuses are tried again rounded up to whole tiles of so many."""


class BackendConformance:
    """Tests of one backend. Subclass it with a name that pytest collects, and set `backend`."""

    backend: Backend

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Every test that takes a dtype is run for each."""
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", DTYPES)

    # Protocol: what attnbench asks before it runs anything

    def test_is_a_backend(self) -> None:
        if found := faults(self.backend):
            _fail("; ".join(found))

    def test_says_whether_it_is_available(self) -> None:
        reason = self.backend.unavailable()
        if reason is not None and not (type(reason) is str and reason.strip()):
            _fail(f"unavailable() returned {reason!r}, neither a reason nor None")

    def test_supports_something(self) -> None:
        self._require_available()
        refusals = [self._refusal(problem) for problem in _plain_problems()]
        if all(refusals):
            _fail(f"it supports no plain forward problem in any dtype; the first: {refusals[0]}")

    def test_refuses_with_a_reason(self) -> None:
        self._require_available()
        for problem in _many_problems():
            reason = self.backend.unsupported(problem)
            if reason is not None and not (type(reason) is str and reason.strip()):
                _fail(f"unsupported({problem.case_id}) returned {reason!r}, neither a reason nor None")

    def test_parallel_units_is_a_number_of_cores(self) -> None:
        problem = self._some_problem()
        units = getattr(self.backend, "parallel_units", lambda _: None)(problem)
        if units is None:
            raise SkipTest("parallel_units() returned None: it does not know")
        cores = self._device.info().cores
        if type(units) is not int or not 1 <= units <= (cores or units):
            _fail(f"parallel_units({problem.case_id}) returned {units!r}, not a number from 1 to {cores or 'any'}")

    # Numerics: right on every kind of problem, within twice the error of plain PyTorch

    def test_square(self, dtype: Dtype) -> None:
        self._require_right(self._nearest(dtype, 64, 64))

    def test_more_keys_than_queries(self, dtype: Dtype) -> None:
        self._require_right(self._nearest(dtype, 48, 160))

    def test_more_queries_than_keys(self, dtype: Dtype) -> None:
        self._require_right(self._nearest(dtype, 160, 48))

    def test_many_tiles(self, dtype: Dtype) -> None:
        self._require_right(self._nearest(dtype, 300, 520, head_dim=64))

    def test_many_keys(self, dtype: Dtype) -> None:
        self._require_right(self._nearest(dtype, 16, 4096))

    def test_batch_and_heads(self, dtype: Dtype) -> None:
        self._require_right(self._nearest(dtype, 40, 56, batch=3, heads_q=4))

    def test_causal_square(self, dtype: Dtype) -> None:
        self._require_right(self._nearest(dtype, 72, 72, causal=True))

    def test_causal_more_keys_is_aligned_bottom_right(self, dtype: Dtype) -> None:
        self._require_right(self._nearest(dtype, 40, 152, causal=True))

    def test_causal_more_queries_gives_zeros_where_no_key_is_seen(self, dtype: Dtype) -> None:
        self._require_right(self._nearest(dtype, 152, 40, causal=True))

    def test_window(self, dtype: Dtype) -> None:
        self._require_right(self._nearest(dtype, 80, 144, causal=True, window=24))

    def test_grouped_queries(self, dtype: Dtype) -> None:
        self._require_right(self._nearest(dtype, 56, 88, batch=2, heads_q=8, heads_kv=2))

    def test_multi_query(self, dtype: Dtype) -> None:
        self._require_right(self._nearest(dtype, 56, 88, batch=2, heads_q=4, heads_kv=1))

    def test_odd_lengths(self, dtype: Dtype) -> None:
        self._require_right(_problem(dtype, 17, 33), _problem(dtype, 33, 17))

    def test_head_dim_40(self, dtype: Dtype) -> None:
        self._require_right(_problem(dtype, 56, 72, head_dim=40))

    def test_head_dim_256(self, dtype: Dtype) -> None:
        self._require_right(_problem(dtype, 72, 136, head_dim=256))

    def test_values_of_another_head_dim(self, dtype: Dtype) -> None:
        self._require_right(_problem(dtype, 56, 72, head_dim=64, head_dim_v=32))

    def test_length_1(self, dtype: Dtype) -> None:
        self._require_right(_problem(dtype, 1, 1), _problem(dtype, 1, 96), _problem(dtype, 24, 1))

    def test_softmax_scale(self, dtype: Dtype) -> None:
        self._require_right(self._nearest(dtype, 56, 72, softmax_scale=0.25))

    def test_large_logits(self, dtype: Dtype) -> None:
        self._require_right(self._nearest(dtype, 64, 128), distribution="large_logits")

    def test_outliers(self, dtype: Dtype) -> None:
        self._require_right(self._nearest(dtype, 64, 128), distribution="outliers")

    # Contract: what the callable that `prepare` returns owes its caller

    def test_output_is_a_plain_tensor_of_the_problems_shape_and_dtype(self, dtype: Dtype) -> None:
        problem = self._nearest(dtype, 24, 56, heads_q=2)
        with self._prepared(problem, _inputs(problem)) as prepared:
            output = prepared.call()
            self._device.synchronize()
            if type(output) is not Tensor:
                _fail(f"the output is a {type(output).__name__}, not a plain torch.Tensor")
            found = (tuple(output.shape), output.dtype, output.device.type, output.layout)
            wanted = (problem.out_shape, torch_dtype(problem), self.backend.device, torch.strided)
            for what, is_, should in zip(("shape", "dtype", "device", "layout"), found, wanted):
                if is_ != should:
                    _fail(f"the output's {what} is {is_}, not {should}")

    def test_output_has_memory_of_its_own(self, dtype: Dtype) -> None:
        problem = self._nearest(dtype, 48, 48)
        with self._prepared(problem, _inputs(problem)) as prepared:
            output = prepared.call()
            self._device.synchronize()
            _require_tensor(output)
            if any(stride == 0 and size > 1 for stride, size in zip(output.stride(), output.shape)):
                _fail(f"values of the output share memory: its strides are {output.stride()}")
            mine = output.untyped_storage().data_ptr()
            for name, tensor in zip("qkv", prepared.tensors):
                storage = tensor.untyped_storage()
                if storage.data_ptr() <= mine < storage.data_ptr() + storage.nbytes():
                    _fail(f"the output lies in the memory of its input {name}")

    def test_inputs_are_left_as_they_were(self, dtype: Dtype) -> None:
        problem = self._nearest(dtype, 32, 72, heads_q=2)
        inputs = _inputs(problem)
        with self._prepared(problem, inputs) as prepared:
            prepared.output()
            for name, now, before in zip("qkv", prepared.tensors, (inputs.q, inputs.k, inputs.v)):
                if not now.cpu().equal(before):
                    _fail(f"it overwrote its input {name}")

    def test_repeated_calls_are_right(self, dtype: Dtype) -> None:
        problem = self._nearest(dtype, 32, 80)
        inputs = _inputs(problem)
        reference = _reference(problem, inputs)
        with self._prepared(problem, inputs) as prepared:
            for number in range(1, 5):
                _require_passed(reference, prepared.output(), f"call {number}: ")

    def test_two_prepared_problems_side_by_side(self, dtype: Dtype) -> None:
        problem = self._nearest(dtype, 40, 64)
        first, second = _inputs(problem), _inputs(problem, seed=SEED + 1)
        with self._prepared(problem, first) as one, self._prepared(problem, second) as two:
            for prepared, inputs, which in ((two, second, "second"), (one, first, "first"), (two, second, "second")):
                _require_passed(_reference(problem, inputs), prepared.output(), f"the {which} of two prepared: ")

    def test_another_stream(self, dtype: Dtype) -> None:
        problem = self._nearest(dtype, 64, 96)
        if self.backend.device == "cpu":
            raise SkipTest("a CPU has no streams")
        inputs, others = _inputs(problem), _inputs(problem, seed=SEED + 1)
        with self._prepared(problem, inputs) as prepared:
            prepared.output()
            api: Any = getattr(torch, self.backend.device)
            stream = api.Stream()
            new = [tensor.to(self.backend.device) for tensor in (others.q, others.k, others.v)]
            busy = torch.ones(4096, 4096, device=self.backend.device)
            self._device.synchronize()
            with api.stream(stream):
                # The new inputs are there after a while, for who waits on this stream; on another, the old ones are.
                for _ in range(BUSY_GEMMS):
                    torch.matmul(busy, busy)
                for tensor, value in zip(prepared.tensors, new):
                    tensor.data.copy_(value)
                output = prepared.call()
                _require_tensor(output)
                copy = output.clone()
            stream.synchronize()
            _require_passed(_reference(problem, others), copy.cpu(), "on a stream of its own: ")

    # Honesty: the work is done at each call, on what the inputs hold then

    def test_reads_its_inputs_at_each_call(self, dtype: Dtype) -> None:
        problem = self._nearest(dtype, 40, 72, heads_q=2)
        inputs, others = _inputs(problem), _inputs(problem, seed=SEED + 1)
        with self._prepared(problem, inputs) as prepared:
            prepared.output()
            for name, tensor in zip("qkv", prepared.tensors):
                new = getattr(others, name)
                tensor.data.copy_(new)  # .data: without telling the tensor's version counter
                inputs = dataclasses.replace(inputs, **{name: new})
                _require_passed(_reference(problem, inputs), prepared.output(), f"after new values in {name}: ")

    def test_reads_single_rows_at_each_call(self, dtype: Dtype) -> None:
        problem = self._nearest(dtype, 64, 128)
        inputs = _inputs(problem)
        budget = _reference(problem, inputs).err_budget
        with self._prepared(problem, inputs) as prepared:
            laid = patches.Patched(*prepared.tensors)
            for number in range(4):
                patch = patches.Patch.of(problem, SEED, number)
                laid.lay(patch)
                fault = spot.fault(problem, inputs, prepared.output(), budget, SEED + number, patch)
                if fault:
                    _fail(f"after one query, key and value changed: {fault}")

    def test_output_is_there_when_the_call_is_over(self, dtype: Dtype) -> None:
        problem = self._nearest(dtype, 56, 80)
        inputs = _inputs(problem)
        with self._prepared(problem, inputs) as prepared:
            output = prepared.call()
            self._device.synchronize()
            _require_tensor(output)
            output.data.fill_(torch.nan)
            self._device.synchronize()
            output = prepared.call()
            self._device.synchronize()
            _require_tensor(output)
            at_once = output.to("cpu", copy=True)
            time.sleep(LATE_S)
            self._device.synchronize()
            _require_passed(_reference(problem, inputs), at_once, "when the call was over: ")
            if not torch.equal(at_once, output.cpu()):
                _fail(f"the output went on changing for {LATE_S:g} s after the call")

    # What the tests stand on

    @property
    def _device(self) -> Device:
        return devices.device(self.backend.device)

    def _refusal(self, problem: Problem) -> str | None:
        return self.backend.unsupported(problem)

    def _nearest(self, dtype: Dtype, seqlen_q: int, seqlen_k: int, **fields: Any) -> Problem:
        """The problem asked for or, where the backend refuses it, the first of its like that kernels are made for.

        That is with lengths of whole tiles, then those of the plain problems. Where it refuses all of them it is the
        one asked for, whose refusal is then the reason to skip.
        """
        self._require_available()
        whole = [-(-length // TILE) * TILE for length in (seqlen_q, seqlen_k)]
        plain = [(p.seqlen_q, p.seqlen_k, p.head_dim) for p in _plain_problems() if p.dtype == dtype]
        asked = _problem(dtype, seqlen_q, seqlen_k, **fields)
        for length_q, length_k, head_dim in [(*whole, 64), (*whole, 128), *plain]:
            if self._refusal(asked) is None:
                break
            other = _problem(dtype, length_q, length_k, **{**fields, "head_dim": head_dim})
            if self._refusal(other) is None:
                return other
        return asked

    def _some_problem(self) -> Problem:
        self._require_available()
        problems = list(_plain_problems())
        reasons = [self._refusal(problem) for problem in problems]
        for problem, reason in zip(problems, reasons):
            if reason is None:
                return problem
        raise SkipTest(reasons[0] or "no reason given")

    def _require_available(self) -> None:
        if reason := self._device.unavailable() or self.backend.unavailable():
            raise SkipTest(reason)

    @contextlib.contextmanager
    def _prepared(self, problem: Problem, inputs: Inputs) -> Iterator[_Prepared]:
        """The backend's callable on `inputs`; skips where it cannot be had."""
        self._require_available()
        if reason := self._refusal(problem):
            raise SkipTest(reason)
        yield _Prepared(self.backend, self._device, problem, inputs)

    def _require_right(self, *problems: Problem, distribution: Distribution = "normal") -> None:
        """Judge each problem; skips where the backend supports none of them."""
        self._require_available()
        refusals = [self._refusal(problem) for problem in problems]
        if all(refusals):
            raise SkipTest(refusals[0] or "no reason given")
        for problem, refusal in zip(problems, refusals):
            if refusal is None:
                inputs = _inputs(problem, distribution=distribution)
                with self._prepared(problem, inputs) as prepared:
                    _require_passed(_reference(problem, inputs), prepared.output(), "")


class _Prepared:
    """q, k and v of a problem on the device, and the callable that the backend made of them."""

    def __init__(self, backend: Backend, device: Device, problem: Problem, inputs: Inputs) -> None:
        self._device = device
        q, k, v = (tensor.to(backend.device, copy=True) for tensor in (inputs.q, inputs.k, inputs.v))
        self.tensors = (q, k, v)
        self.call: Callable[[], Tensor] = backend.prepare(problem, q, k, v)
        device.synchronize()
        if not callable(self.call):
            _fail(f"prepare() returned a {type(self.call).__name__}, nothing to call")

    def output(self) -> object:
        """What one call gives, copied to the CPU where it is a plain tensor."""
        output = self.call()
        self._device.synchronize()
        return output.to("cpu", copy=True) if type(output) is Tensor else output


def _problem(dtype: Dtype, seqlen_q: int, seqlen_k: int, **fields: Any) -> Problem:
    return Problem(dtype=dtype, seqlen_q=seqlen_q, seqlen_k=seqlen_k, **{"head_dim": 64, **fields})


def _plain_problems() -> Iterator[Problem]:
    """Forward problems without a mask, in shapes and dtypes of which a backend must support at least one."""
    for dtype in DTYPES:
        for head_dim in (128, 64, 32, 256):
            for length in (128, 1024, 4096):
                yield _problem(dtype, length, length, head_dim=head_dim)


def _many_problems() -> Iterator[Problem]:
    """Problems of many kinds, common and rare, none of which is run."""
    yield from _plain_problems()
    shapes: tuple[dict[str, Any], ...] = (
        {"causal": True},
        {"window": 16},
        {"causal": True, "window": 16},
        {"heads_q": 8, "heads_kv": 2},
        {"head_dim": 40},
        {"head_dim": 512},
        {"head_dim": 192, "head_dim_v": 128},
        {"softmax_scale": 0.1},
        {"direction": "bwd"},
        {"direction": "fwd_bwd"},
        {"batch": 64, "heads_q": 64},
    )
    for dtype in DTYPES:
        for fields in shapes:
            for seqlen_q, seqlen_k in ((1, 1), (17, 33), (1, 1 << 17), (4096, 4096), (4096, 17)):
                yield _problem(dtype, seqlen_q, seqlen_k, **fields)


def _inputs(problem: Problem, *, seed: int = SEED, distribution: Distribution = "normal") -> Inputs:
    assert distribution in DISTRIBUTIONS
    return make_inputs(problem, seed, distribution)


def _reference(problem: Problem, inputs: Inputs) -> Reference:
    try:
        return Reference.of(problem, inputs, SEED)
    except Unjudgeable as error:
        raise SkipTest(f"{problem.case_id} cannot be judged: {error}") from error


def _require_passed(reference: Reference, output: object, when: str) -> None:
    check = reference.judge(output)
    if not check.passed:
        _fail(f"{when}{reference.problem.case_id}: {check.fault}")


def _require_tensor(output: object) -> None:
    if type(output) is not Tensor:
        _fail(f"the output is a {type(output).__name__}, not a plain torch.Tensor")


def _fail(words: str) -> NoReturn:
    raise AssertionError(words)
