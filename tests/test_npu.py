"""The NPU on a stand-in for torch_npu: how calls are timed, what operators are given, what is caught, a whole run."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, Answer, attnbench, python
from test_jit_flash_npu import Cann

from attnbench import Problem
from attnbench_plugins.npu_fused_attention import NpuFusedAttention
from attnbench_plugins.npu_fusion_attention import NpuFusionAttention
from attnbench_plugins.npu_incre_flash_attention import NpuIncreFlashAttention
from attnbench_plugins.npu_prompt_flash_attention import NpuPromptFlashAttention
from attnbench_plugins.pto_flash_attention import PtoFlashAttention

FAKE = ROOT / "tests" / "fake_npu"
TRAPS = FAKE / "traps.py"
BACKENDS = (
    *(NpuFusedAttention(), NpuFusionAttention(), NpuPromptFlashAttention(), NpuIncreFlashAttention()),
    PtoFlashAttention(),
)
INFERENCE = (BACKENDS[0], *BACKENDS[2:4])
OUTSIDE = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "TASK_QUEUE_ENABLE", "TORCH_DEVICE_BACKEND_AUTOLOAD")


def environment(site: Path | None = None, **changes: str) -> dict[str, str]:
    """This process's, with the stand-in on PYTHONPATH."""
    kept = {name: value for name, value in os.environ.items() if name not in OUTSIDE and not name.startswith("FAKE_")}
    paths = [str(path) for path in (site, FAKE) if path]
    return kept | {"PYTHONPATH": os.pathsep.join(paths)} | changes


SERVER = """
import json, os, sys, traceback
for line in sys.stdin:
    request = json.loads(line)
    before, space = dict(os.environ), {}
    os.environ.update(request["env"])
    try:
        exec(request["code"], space)
        answer = {"result": space["result"]}
    except Exception:
        answer = {"error": traceback.format_exc()}
    os.environ.clear()
    os.environ.update(before)
    print(json.dumps(answer), flush=True)
"""

PRELUDE = """
import torch
import torch_npu
from torch_npu.machine import MACHINE, Handle, Task, on
from attnbench.devices.npu import NpuDevice
from attnbench.problem import Problem
from attnbench.reference import Reference, make_inputs

def kernel(us, written=4, also=lambda: None):
    '''A call that writes so many of its four values, and takes that long.'''
    out = torch.empty(4, dtype=torch.float16)
    def call():
        also()
        MACHINE.enqueue(lambda: out[:written].fill_(1.0), us)
        return device_out
    device_out = on(out, "npu")
    return call

def told(timing):
    return [timing.method, [round(us, 6) for us in timing.times_us], timing.calls_a_change, timing.fallback]

def fault(backend, problem):
    inputs = make_inputs(problem, 0)
    q, k, v = (tensor.to("npu", copy=True) for tensor in (inputs.q, inputs.k, inputs.v))
    out = backend.prepare(problem, q, k, v)()
    assert type(out) is torch.Tensor and out.device.type == "npu"
    return Reference.of(problem, inputs, 0).judge(out.cpu()).fault

def idle():
    return MACHINE.current is MACHINE.default and not MACHINE.capturing
"""

OnNpu = Callable[..., Any]


@pytest.fixture(scope="module")
def on_npu() -> Iterator[OnNpu]:
    """Runs code where torch_npu is the stand-in, all in one process: gives what it binds to `result`."""
    command = [sys.executable, "-c", SERVER]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
    assert server.stdin is not None
    assert server.stdout is not None

    def run(code: str, **env: str) -> Any:
        print(json.dumps({"code": PRELUDE + textwrap.dedent(code), "env": env}), file=server.stdin, flush=True)
        answer = json.loads(server.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer["result"]

    yield run
    server.stdin.close()
    assert server.wait(timeout=60) == 0


def problem(seqlen_q: int, seqlen_k: int, **fields: Any) -> Problem:
    return Problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, **({"dtype": "fp16", "head_dim": 64} | fields))


# --- how calls are timed ----------------------------------------------------------------------------------------------


def test_a_call_is_captured_once_and_its_replays_are_timed_in_a_row(on_npu: OnNpu) -> None:
    found = on_npu("""
        captures, count = [], torch.npu.NPUGraph.capture_begin
        class Counting(torch.npu.NPUGraph):
            def capture_begin(self):
                captures.append(1)
                super().capture_begin()
        before, torch.npu.NPUGraph = torch.npu.NPUGraph, Counting
        device, calls = NpuDevice(), []
        torch.npu.NPUGraph = before
        call = kernel(20.0, also=lambda: calls.append(1))
        result = [told(device.time_calls(call, 30, cold=False)), told(device.time_calls(call, 25, cold=False))]
        result += [len(captures), len(calls), idle()]
    """)
    assert found == [["npu_graph", [20.0] * 3, 10, ""], ["npu_graph", [20.0] * 3, 9, ""], 1, 4, True]


def test_inputs_change_before_each_row_of_replays_and_outputs_are_of_them_all(on_npu: OnNpu) -> None:
    found = on_npu("""
        device, seen = NpuDevice(), []
        inputs = torch.zeros(4, dtype=torch.float16, device="npu")
        class Exercise:
            def before(self, index):
                inputs.fill_(index + 1)
            def after(self, index, output, calls=1):
                seen.append([index, calls, output.clone().tolist()])
        def call():
            return inputs * 1
        call()
        timing = device.time_calls(call, 120, cold=False, exercise=Exercise())
        result = [seen[:2], len(seen), told(timing)[:2]]
    """)
    assert found == [[[0, 20, [1.0] * 4], [20, 20, [21.0] * 4]], 6, ["npu_graph", [2.0] * 6]]


def test_a_cold_call_is_flushed_outside_its_events_and_replayed_alone(on_npu: OnNpu) -> None:
    found = on_npu("""
        device, flushed = NpuDevice(), []
        device.FLUSH_BYTES = 1024
        device.flush_cache()
        flush = device.flush_cache
        device.flush_cache = lambda: (flushed.append(1), flush())
        result = [told(device.time_calls(kernel(20.0), 3, cold=True)), len(flushed), device._flush_buffer.numel()]
    """)
    assert found == [["npu_graph", [20.0] * 3, 1, ""], 3, 1024]


def test_events_can_be_asked_for_and_are_recorded_before_anything_synchronises(on_npu: OnNpu) -> None:
    code = """
        done, wait, record = [], MACHINE.wait, torch.npu.Event.record
        MACHINE.wait = lambda what: (done.append(what), wait(what))
        torch.npu.Event.record = lambda *event: (done.append("record"), record(*event))
        result = [told(NpuDevice().time_calls(kernel(20.0), 10, cold=False)), done]
        MACHINE.wait, torch.npu.Event.record = wait, record
    """
    told, done = on_npu(code, ATTNBENCH_NPU_TIMING="events")
    assert told == ["device_events", [20.0] * 10, 8, ""]
    # The timer's own wait, and one of each reading of a time, which by then waits for nothing.
    assert done == ["record"] * 20 + ["synchronize"] * 11


def test_another_setting_is_refused(on_npu: OnNpu) -> None:
    code = """
        try:
            NpuDevice()
        except Exception as error:
            result = str(error)
    """
    assert on_npu(code, ATTNBENCH_NPU_TIMING="clock") == "ATTNBENCH_NPU_TIMING must be graph or events, not 'clock'"


FALLEN = "a call of it cannot be captured as an NPUGraph: "


@pytest.mark.parametrize(
    ("call", "env", "words"),
    [
        ("kernel(20.0, also=torch.npu.synchronize)", {}, FALLEN + "RuntimeError: synchronize is not permitted"),
        ("kernel(20.0)", {"TASK_QUEUE_ENABLE": "2"}, FALLEN + "RuntimeError: Do not support TASK_QUEUE_ENABLE = 2"),
        ("past_the_capture", {}, FALLEN + "a replay does not write all of its output"),
        ("broken_when_captured", {}, FALLEN + "ValueError: not now"),
    ],
)
def test_what_cannot_be_captured_is_timed_by_events_with_the_reason(
    on_npu: OnNpu, call: str, env: dict[str, str], words: str
) -> None:
    code = f"""
        out = torch.zeros(4, dtype=torch.float16)
        def past_the_capture():
            address = torch.npu.current_stream().npu_stream
            out.fill_(1.0)
            Handle.from_address(address).now_us += 20.0
            return on(out, "npu")
        def broken_when_captured():
            if MACHINE.current.capture is not None:
                raise ValueError("not now")
            return kernel(20.0)()
        result = [*told(NpuDevice().time_calls({call}, 3, cold=False)), idle()]
    """
    method, times, change, reason, idle = on_npu(code, **env)
    assert (method, times, change, idle) == ("device_events", [20.0] * 3, 8, True)
    assert reason.startswith(words)


def test_without_npugraph_calls_are_timed_by_events(on_npu: OnNpu) -> None:
    found = on_npu("""
        graph = torch.npu.NPUGraph
        del torch.npu.NPUGraph
        device = NpuDevice()
        torch.npu.NPUGraph = graph
        result = told(device.time_calls(kernel(20.0), 2, cold=False))
    """)
    assert found == ["device_events", [20.0] * 2, 8, "this torch_npu has no NPUGraph"]


def test_what_an_eager_call_raises_and_an_interrupt_in_a_capture_are_no_reason_to_fall_back(on_npu: OnNpu) -> None:
    found = on_npu("""
        def raising():
            raise ValueError("no")
        def leaving():
            if MACHINE.current.capture is not None:
                raise SystemExit
            return kernel(1.0)()
        result = []
        for call in (raising, leaving):
            try:
                NpuDevice().time_calls(call, 2, cold=False)
            except BaseException as error:
                result.append([type(error).__name__, idle()])
    """)
    assert found == [["ValueError", True], ["SystemExit", True]]


def test_a_graph_is_given_back_when_its_call_is_forgotten(on_npu: OnNpu) -> None:
    found = on_npu("""
        device, call = NpuDevice(), kernel(5.0)
        device.time_calls(call, 2, cold=False)
        captured = device._kept[id(call)][1]
        device.forget(call)
        device.forget(call)
        result = [captured._graph._tasks, captured._output, len(device._kept)]
    """)
    assert found == [None, None, 0]


@pytest.mark.parametrize("name", ["NPUGraph.replay", "NPUGraph.capture_end", "Event.elapsed_time", "synchronize"])
def test_what_times_an_npu_is_sealed(on_npu: OnNpu, name: str) -> None:
    owner, _, method = name.rpartition(".")
    found = on_npu(f"""
        from attnbench.seal import Seal
        seal = Seal(NpuDevice().timing_functions())
        owner = torch.npu{"." + owner if owner else ""}
        intact, before = seal.broken(), owner.{method}
        owner.{method} = lambda *_: 0.0
        result = [intact, seal.broken()]
        owner.{method} = before
    """)
    assert found[0] == ""
    assert found[1].startswith("it changed ")
    assert found[1].endswith(f".{name.rpartition('.')[2]}")


def test_what_a_library_launches_overtakes_the_queue_unless_the_stream_was_asked_for(on_npu: OnNpu) -> None:
    """The stand-in itself: what the traps below count on."""
    code = """
        values = torch.zeros(2, device="npu")
        address = torch.npu.current_stream().npu_stream
        seen = []
        kernel = Task(lambda _: seen.append(on(values, "cpu").tolist()))
        values.fill_(3.0)
        Handle.from_address(address).launch(address, kernel, None, 1.0)
        address = torch.npu.current_stream().npu_stream
        Handle.from_address(address).launch(address, kernel, None, 1.0)
        result = seen
    """
    assert on_npu(code) == [[0.0, 0.0], [3.0, 3.0]]
    assert on_npu(code, TASK_QUEUE_ENABLE="0") == [[3.0, 3.0], [3.0, 3.0]]
    assert on_npu(code, ASCEND_LAUNCH_BLOCKING="1") == [[3.0, 3.0], [3.0, 3.0]]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("fused(causal, mask(1024, 1024))", "a mask of 2048"),
        ("fused(causal, mask(3, 2048, 2048))", "a mask of 2048"),
        ("fused(causal, None)", "takes a mask"),
        ("fused(causal, mask(2048, 2048).half())", "dtype of the mask"),
        ("fused(causal, mask(2048, 2048).cpu())", "on the device"),
        ("fused(causal, mask(2048, 2048).T)", "contiguous"),
        ("fusion(mask(2048, 2048).to(torch.int8))", "dtype of the mask"),
        ("fused({}, None, batch=129, head_dim=24)", "unaligned head size"),
        ("fused({}, None, dtype=torch.float32)", "dtype"),
        ("fused({}, None, device='cpu')", "same device"),
        ("fused({'num_heads': 4}, None)", "heads"),
        ("fused({'inner_precise': 4}, None)", "inner_precise"),
        ("torch.npu.Event().elapsed_time(torch.npu.Event())", "Both events must be recorded"),
    ],
)
def test_the_stand_in_refuses_what_the_pages_refuse(on_npu: OnNpu, call: str, words: str) -> None:
    found = on_npu(f"""
        causal = {{"sparse_mode": 3}}
        def mask(*shape):
            return torch.ones(*shape, dtype=torch.bool, device="npu")
        def qkv(batch=1, head_dim=64, dtype=torch.float16, device="npu"):
            return [torch.zeros(batch, 2, 4, head_dim, dtype=dtype, device=device) for _ in range(3)]
        def fused(options, atten_mask, **how):
            options = {{"num_heads": 2, "input_layout": "BNSD", "atten_mask": atten_mask}} | options
            return torch_npu.npu_fused_infer_attention_score(*qkv(**how), **options)
        def fusion(atten_mask):
            return torch_npu.npu_fusion_attention(*qkv(), 2, "BNSD", atten_mask=atten_mask, sparse_mode=3)
        result = "nothing"
        try:
            {call}
        except RuntimeError as error:
            result = str(error)
    """)
    assert words in found


# --- what is there ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({}, None),
        ({"FAKE_NPU": "absent"}, "torch_npu sees no NPU: check npu-smi info and ASCEND_RT_VISIBLE_DEVICES"),
        (
            {"FAKE_NPU": "no_cann", "ASCEND_HOME_PATH": "/"},
            "torch_npu does not import: ImportError: libhccl.so: cannot open shared object file: No such file or "
            "directory: source CANN's set_env.sh anew, or repair CANN (/); until then `import torch` fails too, unless "
            "TORCH_DEVICE_BACKEND_AUTOLOAD=0 is set",
        ),
    ],
)
def test_every_backend_says_what_is_missing(env: dict[str, str], words: str | None) -> None:
    code = """
        import json
        from attnbench_plugins import npu_fused_attention, npu_fusion_attention, npu_incre_flash_attention
        from attnbench_plugins import npu_prompt_flash_attention, pto_flash_attention, gemm_ref
        found = [gemm_ref.GemmRef("npu").unavailable()]
        for module in (npu_fused_attention, npu_fusion_attention, npu_incre_flash_attention,
                       npu_prompt_flash_attention, pto_flash_attention):
            found += [backend.unavailable() for backend in module.attnbench_backends()]
        print(json.dumps(found))
    """
    assert json.loads(python(code, env=environment(**env)).out) == [words] * 6


def test_an_operator_that_an_older_torch_npu_lacks_is_named(on_npu: OnNpu) -> None:
    found = on_npu("""
        from attnbench_plugins.npu_fused_attention import NpuFusedAttention
        operator = torch_npu.npu_fused_infer_attention_score
        del torch_npu.npu_fused_infer_attention_score
        result = NpuFusedAttention().unavailable()
        torch_npu.npu_fused_infer_attention_score = operator
    """)
    assert found == "this torch_npu has no npu_fused_infer_attention_score: install one that attnbench[npu] asks for"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no_operator", "module 'pto_kernels' has no attribute 'pto_flash_attention': pip install -U pto-kernels"),
        (
            "other_torch",
            "pto_kernels does not import: pto_kernels_ops.so: undefined symbol: _ZN3c10: its wheels are built for one "
            "version of torch-npu each",
        ),
    ],
)
def test_pto_kernels_that_do_not_fit_say_so(fault: str, words: str) -> None:
    code = "from attnbench_plugins.pto_flash_attention import *; print(PtoFlashAttention().unavailable())"
    assert python(code, env=environment(FAKE_NPU_FAULT=fault)).out.strip() == words


# --- what is supported ------------------------------------------------------------------------------------------------

REFUSED = [
    *((b, problem(1, 512, direction="bwd"), "forward only") for b in BACKENDS),
    *((b, problem(1, 512, window=4, head_dim=128), "no sliding window") for b in BACKENDS),
    *((b, problem(1, 512, head_dim=32, head_dim_v=64), "one head size for q, k and v") for b in BACKENDS[:4]),
    *((b, problem(1, 512, dtype="fp32"), "fp16 and bf16 only") for b in INFERENCE),
    *((b, problem(1, 512, head_dim=100), "head sizes that are multiples of 8 up to 512") for b in INFERENCE),
    *((b, problem(1, 512, head_dim=520), "head sizes that are multiples of 8 up to 512") for b in INFERENCE),
    (BACKENDS[1], problem(1, 512, head_dim=776), "head sizes that are multiples of 8 up to 768"),
    *((b, problem(1, 512, heads_q=257, heads_kv=257), "up to 256 heads") for b in BACKENDS[:4]),
    *((b, problem(1, 512, heads_q=65, heads_kv=1), "up to 64 query heads to a key head") for b in INFERENCE),
    *((b, problem(1, 8, batch=65536), "batches up to 65535") for b in INFERENCE),
    *((b, problem(1, 262145), "up to 262144 keys") for b in (BACKENDS[0], BACKENDS[3])),
    *(
        (b, problem(*lengths), "up to 20971520 keys and queries")
        for b in (BACKENDS[0], BACKENDS[2])
        for lengths in ((2, 20971521), (20971521, 2))
    ),
    (BACKENDS[1], problem(8, 1048577), "up to 1048576 keys and queries"),
    (BACKENDS[2], problem(9, 8, causal=True), "no mask that hides all keys from a query"),
    *(
        (b, problem(9, 8, head_dim=24, batch=129), "batches up to 128 of head sizes that are no multiples of 16")
        for b in (BACKENDS[0], BACKENDS[2])
    ),
    (BACKENDS[3], problem(2, 512), "one query a head, as in decoding"),
    (BACKENDS[4], problem(128, 512, head_dim=128, dtype="bf16"), "fp16 only"),
    (BACKENDS[4], problem(128, 512), "head size 128 only"),
    *(
        (BACKENDS[4], problem(*lengths, head_dim=128), "query lengths that are multiples of 128, key lengths of 512")
        for lengths in ((64, 512), (128, 256))
    ),
    (
        BACKENDS[4],
        problem(128, 512, head_dim=128, causal=True),
        "causal aligned top-left, so only for as many queries as keys",
    ),
    (BACKENDS[4], problem(128, 512, head_dim=128, softmax_scale=1.0), "no softmax scale but 1/√128"),
]


@pytest.mark.parametrize(("backend", "case", "reason"), REFUSED, ids=lambda value: getattr(value, "name", None))
def test_what_is_refused_has_its_reason(backend: Any, case: Problem, reason: str) -> None:
    assert backend.unsupported(case) == reason


# At the limits: what one query more, or another operator, would refuse.
ALLOWED = [
    *((b, problem(1, 262144)) for b in (BACKENDS[0], BACKENDS[3])),
    (BACKENDS[2], problem(1, 262145)),
    *((b, problem(1, 8, head_dim=24, batch=129)) for b in (BACKENDS[0], BACKENDS[3])),
    *((b, problem(9, 8, head_dim=24, batch=128)) for b in (BACKENDS[0], BACKENDS[2])),
]


@pytest.mark.parametrize(("backend", "case"), ALLOWED, ids=lambda value: getattr(value, "name", None))
def test_what_is_within_the_limits_is_supported(backend: Any, case: Problem) -> None:
    assert backend.unsupported(case) is None


SUPPORTED = {
    "npu_fused_attention": [
        problem(24, 40),
        problem(24, 40, causal=True, heads_q=4, heads_kv=2, batch=2),
        problem(40, 24, causal=True, dtype="bf16"),
        problem(1, 40, causal=True, heads_q=4, softmax_scale=0.3),
    ],
    "npu_fusion_attention": [
        problem(24, 40, dtype="fp32"),
        problem(24, 40, causal=True, heads_q=4, heads_kv=2),
        problem(40, 24, causal=True),
        problem(1, 40, causal=True),
    ],
    "npu_prompt_flash_attention": [
        problem(24, 40),
        problem(24, 40, causal=True, heads_q=4, heads_kv=2, dtype="bf16"),
        problem(1, 40, causal=True, softmax_scale=0.3),
    ],
    "npu_incre_flash_attention": [problem(1, 40, heads_q=8, heads_kv=2), problem(1, 40, causal=True, dtype="bf16")],
    "pto_flash_attention": [
        problem(128, 512, head_dim=128, heads_q=2, heads_kv=1),
        problem(512, 512, head_dim=128, causal=True),
    ],
}


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_what_is_supported_is_right_with_what_the_operator_is_given(on_npu: OnNpu, backend: Any) -> None:
    cases = SUPPORTED[backend.name]
    assert [backend.unsupported(case) for case in cases] == [None] * len(cases)
    code = f"""
        from {type(backend).__module__} import {type(backend).__name__} as Backend
        result = [fault(Backend(), Problem.from_json(case)) for case in {[case.to_json() for case in cases]}]
    """
    assert on_npu(code) == [""] * len(cases)


CONTRACT = {
    *("is_a_backend", "says_whether_it_is_available", "refuses_with_a_reason", "causal_square", "another_stream"),
    *("output_has_memory_of_its_own", "inputs_are_left_as_they_were", "two_prepared_problems_side_by_side"),
    *("reads_its_inputs_at_each_call", "reads_single_rows_at_each_call", "output_is_there_when_the_call_is_over"),
}


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_every_backend_passes_the_conformance_kits_contract_and_honesty(on_npu: OnNpu, backend: Any) -> None:
    code = f"""
        from {type(backend).__module__} import {type(backend).__name__} as Backend
        from attnbench.testing import BackendConformance, conformance
        from attnbench.testing.conform import _run, every_test
        conformance.BUSY_GEMMS = 0  # a host takes minutes for what keeps another stream of a device busy
        kit = BackendConformance()
        kit.backend = Backend()
        names = {CONTRACT}
        assert names <= {{name for name, _ in every_test()}}
        found = [(name, of, _run(kit, name, of)) for name, of in every_test() if of in ("", "fp16") and name in names]
        result = [sum(how["outcome"] == "passed" for _, _, how in found)]
        result.append([[name, of, how["words"]] for name, of, how in found if how["outcome"] == "failed"])
    """
    passed, failed = on_npu(code)
    assert failed == []
    # The kit's shapes are too small for pto_kernels, and of more queries than decoding has.
    assert passed >= (2 if backend in BACKENDS[3:] else len(CONTRACT))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_tensors_that_are_not_contiguous_are_refused(on_npu: OnNpu, backend: Any) -> None:
    case = SUPPORTED[backend.name][0].to_json()
    code = f"""
        from {type(backend).__module__} import {type(backend).__name__} as Backend
        problem, result = Problem.from_json({case}), []
        for which in range(3):
            qkv = [torch.zeros(4, 4, 4, 4, dtype=torch.float16, device="npu") for _ in range(3)]
            qkv[which] = qkv[which].transpose(1, 2)
            try:
                Backend().prepare(problem, *qkv)
            except ValueError as error:
                result.append(str(error))
    """
    assert on_npu(code) == ["q, k and v must be contiguous, and one of shape (4, 4, 4, 4) is not"] * 3


@pytest.mark.parametrize(("lengths", "batch", "heads", "cores"), [((128, 512), 1, 1, 1), ((1024, 512), 2, 2, 20)])
def test_pto_kernels_cores_are_its_query_tiles_up_to_the_devices(
    on_npu: OnNpu, lengths: tuple[int, int], batch: int, heads: int, cores: int
) -> None:
    case = problem(*lengths, head_dim=128, batch=batch, heads_q=heads).to_json()
    code = f"""
        from attnbench_plugins.pto_flash_attention import PtoFlashAttention
        result = PtoFlashAttention().parallel_units(Problem.from_json({case}))
    """
    assert on_npu(code, FAKE_NPU_NAME="Ascend910B3") == cores


def test_a_part_of_an_npu_has_the_cores_and_the_peak_of_its_part(on_npu: OnNpu) -> None:
    """More blocks than cores would wait for each other for ever at the barrier of jit_flash's kernel."""
    code = """
        from attnbench_plugins.jit_flash.npu import cores
        info = NpuDevice().info()
        result = [info.name, info.cores, info.peak_tflops.get("fp16"), cores()]
    """
    assert on_npu(code) == ["Ascend910B2", 24, 353.9, 24]
    assert on_npu(code, FAKE_NPU_CORES="6") == ["Ascend910B2", 6, 88.5, 6]
    assert on_npu(code, FAKE_NPU_CORES="0") == ["Ascend910B2", 24, 353.9, 24]
    assert on_npu(code, FAKE_NPU_NAME="Ascend of the future", FAKE_NPU_CORES="32") == [
        *("Ascend of the future", 32, None, 32)
    ]


# --- what is caught ---------------------------------------------------------------------------------------------------

WRONG_CASES = {
    "noop": problem(24, 40),
    "drop_tail": problem(24, 40),
    "unnormalised": problem(24, 40),
    "top_left": problem(24, 40, causal=True),
}


@pytest.mark.parametrize("fault", WRONG_CASES)
def test_a_faulty_operator_is_judged_wrong(on_npu: OnNpu, fault: str) -> None:
    code = f"""
        from attnbench_plugins.npu_fused_attention import NpuFusedAttention
        result = fault(NpuFusedAttention(), Problem.from_json({WRONG_CASES[fault].to_json()}))
    """
    assert on_npu(code) == ""
    assert on_npu(code, FAKE_NPU_FAULT=fault) != ""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Where torch_npu is installed, as pip would have it: with a version, and with torch's entry point for it."""
    info = tmp_path / "site" / "torch_npu-2.13.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-npu\nVersion: 2.13.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return info.parent


def command(*words: object, cwd: Path, **env: str) -> Answer:
    return attnbench(*words, cwd=cwd, env=environment(cwd / "site", **env), timeout=300)


QUICK = ("--protocol", "fixed", "--warmup", "1", "--iters", "12")


def test_each_trap_of_the_operators_is_incorrect(site: Path, tmp_path: Path) -> None:
    names = ("DefaultScale", "NextTokensWithoutMask", "SparseModeWithoutMask", "TopLeft", "InvertedMask")
    chosen = ",".join(["npu_fused_attention", *(f"{TRAPS}:{name}" for name in names)])
    shape = ("--seqlen-q", 24, "--seqlen-k", 40, "--head-dim", 64, "--causal", "true")
    answer = command("check", "--device", "npu", "--backends", chosen, *shape, "--json", cwd=tmp_path)
    found = {entry["backend"]: entry["status"] for entry in json.loads(answer.out)}
    assert found.pop("npu_fused_attention") == "PASSED"
    assert list(found.values()) == ["INCORRECT"] * len(names), answer.err
    assert answer.code == 1


def test_a_stream_that_was_fetched_once_is_incorrect_and_one_of_each_call_is_not(site: Path, tmp_path: Path) -> None:
    chosen = f"{TRAPS}:StreamFetchedOnce,{TRAPS}:StreamOfEachCall"
    shape = ("--seqlen-q", 24, "--seqlen-k", 40, "--head-dim", 64)
    answer = command("run", "--device", "npu", "--backends", chosen, *shape, *QUICK, "--out", "r", cwd=tmp_path)
    rows = {row["kernel"]: row for row in csv.DictReader((tmp_path / "r" / "results.csv").read_text().splitlines())}
    assert rows["stream_fetched_once"]["status"] == "INCORRECT", answer.err
    assert (rows["stream_of_each_call"]["status"], rows["stream_of_each_call"]["timing_method"]) == (
        "PASSED",
        "npu_graph",
    )
    assert float(rows["stream_of_each_call"]["time_us"]) == 10.0
    assert answer.code == 1


def test_an_operator_that_does_nothing_is_incorrect_and_one_that_takes_as_long_whatever_it_does_is_told_of(
    site: Path, tmp_path: Path
) -> None:
    words = ("--device", "npu", "--backends", "npu_fused_attention", "--seqlen-q", "16,64", "--seqlen-k", "64,256")
    idle = command("check", *words, "--json", cwd=tmp_path, FAKE_NPU_FAULT="noop")
    assert {entry["status"] for entry in json.loads(idle.out)} == {"INCORRECT"}
    flat = command("run", *words, *QUICK, "--out", "flat", cwd=tmp_path, FAKE_NPU_FAULT="flat")
    assert flat.code == 0, flat.err
    assert (
        "launch-bound? npu_fused_attention stays at about 12.4 µs over 16× more work (16×64 to 64×256)"
        in (tmp_path / "flat" / "report.md").read_text()
    )


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_a_run_on_the_npu_goes_down_to_the_published_table(site: Path, tmp_path: Path) -> None:
    words = ("--seqlen-q", "128,256", "--seqlen-k", "512", *QUICK, "--out", "r")
    chosen = "npu_fused_attention,npu_prompt,npu_fusion,pto_flash"
    answer = command("run", "--backends", chosen, *words, cwd=tmp_path, TASK_QUEUE_ENABLE="1")
    assert answer.code == 0, answer.err
    lines = (tmp_path / "r" / "results.csv").read_text().splitlines()
    assert lines[0].startswith("sq,sk,head_size,kernel,time_us,tflops,flops_total,")
    rows = list(csv.DictReader(lines))
    assert {(row["status"], row["device"], row["device_name"]) for row in rows} == {("PASSED", "npu", "Ascend910B2")}
    operator_us = {"128": 5 + 4 * 128 * 128 * 512 / 150e6, "256": 5 + 4 * 256 * 128 * 512 / 150e6}
    for row in rows:
        expected = 22.0 if row["kernel"] == "pto_flash_attention" else operator_us[row["sq"]]
        assert float(row["time_us"]) == pytest.approx(expected, rel=1e-5)
        by_events = row["kernel"] == "npu_fusion_attention"
        assert row["timing_method"] == ("device_events" if by_events else "npu_graph")
        if row["kernel"] == "pto_flash_attention":
            assert row["used_cores"] == {"128": "1", "256": "2"}[row["sq"]]
    report = (tmp_path / "r" / "report.md").read_text()
    assert "| Fused µs | pto_flash_attention µs |" in " ".join(report.split())
    assert "timed otherwise: npu_fusion_attention on 2 problems by events around eager calls" in report
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert record["environment"]["variables"]["TASK_QUEUE_ENABLE"] == "1"
    assert "inner_precise 0" in record["summaries"]["npu_fused_attention"]
    assert record["environment"]["variables"]["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
    assert record["environment"]["libraries"]["torch-npu"] == "2.13.0"
    assert (record["device"]["name"], record["device"]["peak_tflops"]["fp16"]) == ("Ascend910B2", 353.9)
    bare = ["sq,sk,head_size,kernel,time_us,tflops,flops_total", *(",".join(line.split(",")[:7]) for line in lines[1:])]
    (tmp_path / "published.csv").write_text("\n".join(bare) + "\n")
    again = command("report", "published.csv", cwd=tmp_path)
    assert again.code == 0, again.err
    assert "vs npu_fused_attention · b1-h1-d128-fp16 · Ascend 910B2" in again.out


def toolkit(folder: Path, fault: str) -> dict[str, str]:
    """Variables that name a CANN and a PTO library whose compiler is a stand-in with that fault."""
    with pytest.MonkeyPatch.context() as patch:
        cann = Cann(folder, patch)
        cann.fail(fault)
    cache = str(folder / "cache")
    return {"ASCEND_HOME_PATH": str(cann.home), "PTO_LIB_PATH": str(cann.library), "ATTNBENCH_CACHE_DIR": cache}


def test_jit_flash_runs_beside_the_fused_baseline(site: Path, tmp_path: Path) -> None:
    words = ("--backends", "jit_flash,npu_fused", "--seqlen-q", "128,256", "--seqlen-k", "512", *QUICK, "--out", "r")
    answer = command("run", *words, cwd=tmp_path, **toolkit(tmp_path, "none"))
    assert answer.code == 0, answer.err
    rows = list(csv.DictReader((tmp_path / "r" / "results.csv").read_text().splitlines()))
    assert [(row["kernel"], row["status"]) for row in rows] == [
        ("jit_flash", "PASSED"),
        ("npu_fused_attention", "PASSED"),
    ] * 2
    assert [row["used_cores"] for row in rows if row["kernel"] == "jit_flash"] == ["4", "8"]  # units of 128 keys
    assert all(float(row["host_us"]) > 0 for row in rows)
    record = json.loads((tmp_path / "r" / "run.json").read_text())["environment"]
    assert record["defaults_of_unset_variables"]["TASK_QUEUE_ENABLE"] == "1"
    assert "TASK_QUEUE_ENABLE" not in record["variables"]
    head = "| S0 | S1 | Fused µs | JIT µs | Speedup | JIT TFLOP/s | Normalized JIT TFLOP/s |"
    assert " ".join(answer.out.split()).count(head) == 1


@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        ("no_op", "INCORRECT", ""),
        ("dropped_tail", "INCORRECT", ""),
        ("unnormalised", "INCORRECT", ""),
        ("does_not_compile", "COMPILE_ERROR", ":1:1: error: this core has no such instruction"),
        ("status", "RUNTIME_ERROR", "the kernel was not launched: status 507899"),
    ],
)
def test_a_compiled_kernel_that_is_wrong_gets_no_number(
    site: Path, tmp_path: Path, fault: str, status: str, words: str
) -> None:
    chosen = "jit_flash" if fault == "status" else "jit_flash,pto_demo_flash"  # the library's own gives no status
    options = ("--device", "npu", "--backends", chosen, "--seqlen-q", 128, "--seqlen-k", 512, "--json")
    answer = command("check", *options, cwd=tmp_path, **toolkit(tmp_path, fault))
    found = json.loads(answer.out)
    assert {entry["backend"]: entry["status"] for entry in found} == dict.fromkeys(chosen.split(","), status)
    assert all(words in entry["reason"] for entry in found), answer.out
    assert answer.code == 1


def test_a_compiled_kernel_that_takes_as_long_whatever_it_does_is_told_of(site: Path, tmp_path: Path) -> None:
    words = ("--backends", "jit_flash", "--seqlen-q", "128,256", "--seqlen-k", "128,512", *QUICK, "--out", "r")
    answer = command("run", *words, cwd=tmp_path, **toolkit(tmp_path, "flat"))
    assert answer.code == 0, answer.err
    report = (tmp_path / "r" / "report.md").read_text()
    assert "launch-bound? jit_flash stays at about 12.4 µs over 8× more work (128×128 to 256×512)" in report


def test_every_backend_on_an_npu_is_listed_as_not_yet_run_on_hardware(tmp_path: Path) -> None:
    """Whether this machine has an NPU or not."""
    for answer in (
        attnbench("list", "--device", "npu", cwd=tmp_path),
        command("list", "--device", "npu", cwd=tmp_path),
    ):
        head, _, *lines = answer.out.splitlines()
        assert head.split() == ["backend", "device", "available", "from", "library", "summary", "why", "not"]
        assert {line.split()[0] for line in lines} >= {"npu_fused_attention", "jit_flash", "triton_flash"}
        assert [line for line in lines if "(not yet run on hardware)" not in line] == []


def test_the_three_commands_that_verify_the_rest_are_the_same_everywhere_and_run(site: Path, tmp_path: Path) -> None:
    found = [
        re.findall(r"^ *attnbench ((?:list|check|run) --device npu\b.*?)(?: +#.*)?$", (ROOT / page).read_text(), re.M)
        for page in ("README.md", "docs/npu.md")
    ]
    assert found[0] == found[1]
    assert [words.split()[0] for words in found[0]] == ["list", "check", "run"]
    more = {"list": [], "check": ["--help"], "run": ["--dry-run"]}
    for words in map(str.split, found[0]):
        answer = command(*words, *more[words[0]], cwd=tmp_path)
        assert (answer.code, bool(answer.out)) == (0, True), answer.err


def test_list_works_and_tells_why_where_torch_npu_cannot_be_imported(site: Path, tmp_path: Path) -> None:
    answer = command("list", "--json", cwd=tmp_path, FAKE_NPU="no_cann")
    found = {(entry["name"], entry["device"]): entry["reason"] for entry in json.loads(answer.out)}
    assert (answer.code, found["gemm_ref", "cpu"]) == (0, None)
    reason = found["npu_fused_attention", "npu"]
    assert "libhccl.so: cannot open shared object file" in reason
    assert "neither ASCEND_HOME_PATH nor ASCEND_TOOLKIT_HOME is set" in reason
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in reason
    autoloaded = python("import torch", env=environment(site, FAKE_NPU="no_cann"))
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in autoloaded.err, "so it is without attnbench"


@pytest.mark.parametrize("words", [("list",), ("list", "--device", "cpu"), ("env",)], ids=" ".join)
def test_an_autoload_that_was_asked_for_and_fails_is_one_error(
    words: tuple[str, ...], site: Path, tmp_path: Path
) -> None:
    answer = command(*words, cwd=tmp_path, FAKE_NPU="no_cann", TORCH_DEVICE_BACKEND_AUTOLOAD="1")
    assert (answer.code, answer.out) == (2, "")
    assert answer.problem.startswith(
        "error: under TORCH_DEVICE_BACKEND_AUTOLOAD=1 torch cannot be imported: ImportError: libhccl.so: cannot open"
    )
    assert "hint: unset it" in answer.err
