"""attnbench.testing: attnbench's own backends pass the kit, and each of these wrong ones fails its own test alone."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import ROOT, attnbench
from torch import Tensor

from attnbench import hookspecs, registry
from attnbench.backend import Backend
from attnbench.discovery import discover
from attnbench.problem import Problem
from attnbench.registry import BackendInfo, EntryPointRef
from attnbench.testing import BackendConformance
from attnbench.testing.check import Outcome, check, table
from attnbench.testing.conform import _run, every_test
from attnbench_plugins import flex_attention, sdpa_math
from attnbench_plugins.flex_attention import FlexAttention
from attnbench_plugins.gemm_ref import GemmRef
from attnbench_plugins.ggml import Ggml
from attnbench_plugins.jax_xla import JaxXla
from attnbench_plugins.jit_flash.cpu import JitFlashCpu
from attnbench_plugins.onnxruntime import OnnxRuntime
from attnbench_plugins.openvino import OpenVino
from attnbench_plugins.sdpa import Sdpa
from attnbench_plugins.sdpa_upcast import SdpaUpcast


class TestGemmRef(BackendConformance):
    backend = GemmRef("cpu")


class TestSdpa(BackendConformance):
    backend = Sdpa("cpu")


class TestSdpaUpcast(BackendConformance):
    backend = SdpaUpcast()


class TestSdpaMath(BackendConformance):
    backend = next(backend for backend in sdpa_math.attnbench_backends() if backend.device == "cpu")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
class TestFlexAttention(BackendConformance):
    """Not compiled, which would take ten seconds a problem: test_gpu_peers.py has some that are."""

    backend = FlexAttention("cpu")

    @pytest.fixture(autouse=True)
    def _uncompiled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        compile_ = torch.compile

        def leave(function: Any, **how: Any) -> Any:
            return function if function.__module__ == flex_attention.__name__ else compile_(function, **how)

        monkeypatch.setattr(torch, "compile", leave)


class TestGgml(BackendConformance):
    backend = Ggml()


class TestJaxXla(BackendConformance):
    backend = JaxXla()


class TestJitFlash(BackendConformance):
    backend = JitFlashCpu()


class TestOnnxRuntime(BackendConformance):
    backend = OnnxRuntime()


class TestOpenVino(BackendConformance):
    backend = OpenVino()


class Right(Backend):
    """Right on everything forward, by torch in float32."""

    name = "right"
    device = "cpu"

    def unsupported(self, problem: Problem) -> str | None:
        return "forward only" if problem.direction != "fwd" else None

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        return lambda: self.attend(problem, q, k, v)

    def attend(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = problem.heads_q // problem.heads_kv
        scores = q.float() @ k.float().repeat_interleave(groups, 1).transpose(-1, -2) * problem.softmax_scale
        seen = torch.zeros(problem.seqlen_q, problem.seqlen_k, dtype=torch.bool)
        for row in range(problem.seqlen_q):
            low, high = problem.key_range(row)
            seen[row, low:high] = True
        weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1).nan_to_num(0.0)
        return (weights @ v.float().repeat_interleave(groups, 1)).to(q.dtype)


def wrong_where(condition: Callable[[Problem], bool]) -> type[Right]:
    class Wrong(Right):
        def attend(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = super().attend(problem, q, k, v)
            return out * 1.5 if condition(problem) else out

    return Wrong


def plain(problem: Problem) -> bool:
    """As most of the kit's problems are."""
    return (problem.batch, problem.heads_q, problem.head_dim, problem.head_dim_v, problem.causal) == (
        1,
        1,
        64,
        64,
        False,
    )


class NoName(Right):
    name = "No Name"


class EmptyReason(Right):
    def unavailable(self) -> str | None:
        return ""


class RefusesAll(Right):
    def unsupported(self, problem: Problem) -> str | None:
        return "not today"


class RefusesSilently(Right):
    def unsupported(self, problem: Problem) -> str | None:
        return "" if problem.head_dim == 512 else super().unsupported(problem)


class NoUnits(Right):
    def parallel_units(self, problem: Problem) -> int | None:
        return 0


class LargeLogits(Right):
    def attend(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = super().attend(problem, q, k, v)
        return out * 1.5 if q.float().std() > 8 else out


class Outliers(Right):
    def attend(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = super().attend(problem, q, k, v)
        return out * 1.5 if q.float().std() < 8 and q.abs().max() > 15 else out


class Transposed(Right):
    def attend(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = super().attend(problem, q, k, v)
        return out.transpose(1, 2) if (problem.seqlen_q, problem.seqlen_k) == (24, 56) else out


class Expanded(Right):
    def attend(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = super().attend(problem, q, k, v)
        return out[:, :, :1].expand(out.shape) if (problem.seqlen_q, problem.seqlen_k) == (48, 48) else out


class OverwritesQ(Right):
    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        def call() -> Tensor:
            out = self.attend(problem, q, k, v)
            if (problem.seqlen_q, problem.seqlen_k) == (32, 72):
                q.mul_(0.5)
            return out

        return call


class DecaysWithCalls(Right):
    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        calls = 0

        def call() -> Tensor:
            nonlocal calls
            calls += 1
            return self.attend(problem, q, k, v) * (1.5 if calls == 3 and problem.seqlen_k == 80 else 1.0)

        return call


class SharesState(Right):
    inputs: Any = None

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        self.inputs = (q, k, v)
        return lambda: self.attend(problem, *self.inputs)


class KeepsKeys(Right):
    """Lays K out in `prepare`, where single rows are right by chance: it reads K anew when its first row changed."""

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        kept = k.clone()
        stale = (problem.seqlen_q, problem.seqlen_k, problem.heads_q) == (40, 72, 2)
        return lambda: self.attend(problem, q, kept if stale else k, v)


class KeepsRows(Right):
    """Takes K anew only when much of it changed."""

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        kept = k.clone()

        def call() -> Tensor:
            if (k != kept).float().mean() > 0.5:
                kept.copy_(k)
            return self.attend(problem, q, kept, v)

        return call


class ComesLate(Right):
    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        import threading

        out = torch.zeros(problem.out_shape, dtype=q.dtype)

        def call() -> Tensor:
            found = self.attend(problem, q, k, v)
            if (problem.seqlen_q, problem.seqlen_k) != (56, 80):
                return found
            out.zero_()  # whatever an earlier timer wrote, it comes late again
            threading.Timer(0.02, lambda: out.copy_(found)).start()
            return out

        return call


WRONG: dict[str, Right] = {
    "is_a_backend": NoName(),
    "says_whether_it_is_available": EmptyReason(),
    "supports_something": RefusesAll(),
    "refuses_with_a_reason": RefusesSilently(),
    "parallel_units_is_a_number_of_cores": NoUnits(),
    "square": wrong_where(lambda p: plain(p) and p.seqlen_q == p.seqlen_k == 64)(),
    "more_keys_than_queries": wrong_where(lambda p: plain(p) and (p.seqlen_q, p.seqlen_k) == (48, 160))(),
    "more_queries_than_keys": wrong_where(lambda p: plain(p) and (p.seqlen_q, p.seqlen_k) == (160, 48))(),
    "many_tiles": wrong_where(lambda p: p.seqlen_q == 300)(),
    "many_keys": wrong_where(lambda p: p.seqlen_k > 2048)(),
    "batch_and_heads": wrong_where(lambda p: p.batch == 3)(),
    "causal_square": wrong_where(lambda p: p.causal and p.seqlen_q == p.seqlen_k)(),
    "causal_more_keys_is_aligned_bottom_right": wrong_where(
        lambda p: p.causal and p.window is None and p.seqlen_q < p.seqlen_k
    )(),
    "causal_more_queries_gives_zeros_where_no_key_is_seen": wrong_where(
        lambda p: p.causal and p.seqlen_q > p.seqlen_k
    )(),
    "window": wrong_where(lambda p: p.window is not None)(),
    "grouped_queries": wrong_where(lambda p: 1 < p.heads_kv < p.heads_q)(),
    "multi_query": wrong_where(lambda p: 1 == p.heads_kv < p.heads_q)(),
    "odd_lengths": wrong_where(lambda p: p.seqlen_q == 33)(),
    "head_dim_40": wrong_where(lambda p: p.head_dim == 40)(),
    "head_dim_256": wrong_where(lambda p: p.head_dim == 256)(),
    "values_of_another_head_dim": wrong_where(lambda p: p.head_dim != p.head_dim_v)(),
    "length_1": wrong_where(lambda p: p.seqlen_k == 1)(),
    "softmax_scale": wrong_where(lambda p: p.softmax_scale == 0.25)(),
    "large_logits": LargeLogits(),
    "outliers": Outliers(),
    "output_is_a_plain_tensor_of_the_problems_shape_and_dtype": Transposed(),
    "output_has_memory_of_its_own": Expanded(),
    "inputs_are_left_as_they_were": OverwritesQ(),
    "repeated_calls_are_right": DecaysWithCalls(),
    "two_prepared_problems_side_by_side": SharesState(),
    "reads_its_inputs_at_each_call": KeepsKeys(),
    "reads_single_rows_at_each_call": KeepsRows(),
    "output_is_there_when_the_call_is_over": ComesLate(),
}
ALSO = {"another_stream"}
"""A GPU alone can fail it."""


def outcomes(backend: Backend, *, dtype: str = "fp32") -> dict[str, str]:
    """How each test of the kit ends, those with a dtype in one of them."""
    kit = BackendConformance()
    kit.backend = backend
    return {name: _run(kit, name, of)["outcome"] for name, of in every_test() if of in ("", dtype)}


def test_every_test_of_the_kit_has_a_backend_that_is_wrong_in_its_way() -> None:
    assert {name for name, _ in every_test()} == WRONG.keys() | ALSO


def test_what_is_right_passes() -> None:
    assert {name for name, how in outcomes(Right()).items() if how != "passed"} == {
        "parallel_units_is_a_number_of_cores",  # it does not know
        "another_stream",
    }


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_backend_fails_the_test_named_for_it_and_no_other(name: str) -> None:
    found = outcomes(WRONG[name])
    assert {test for test, how in found.items() if how == "FAILED"} == {name}


class WrongStream(Right):
    """Computes on the default stream, whichever is current."""

    device = "cuda"

    def unsupported(self, problem: Problem) -> str | None:
        return super().unsupported(problem) or ("no masks" if problem.causal or problem.window else None)

    def attend(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = problem.heads_q // problem.heads_kv
        keys, values = (tensor.double().repeat_interleave(groups, 1) for tensor in (k, v))
        weights = torch.softmax(q.double() @ keys.transpose(-1, -2) * problem.softmax_scale, -1)
        return (weights @ values).to(q.dtype)

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.cuda.stream(torch.cuda.default_stream()):
                return self.attend(problem, q, k, v)

        return call


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has no streams, and torch sees no GPU")
def test_a_backend_on_the_wrong_stream_fails_the_test_named_for_it_and_no_other() -> None:
    program = "import json, test_conformance as t; print(json.dumps(t.outcomes(t.WrongStream())))"
    # In a process of its own, since no test sees the GPU.
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=env | {"PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert {test for test, how in found.items() if how == "FAILED"} == {"another_stream"}


class OneSizeAlone(Right):
    """As many kernels are: whole tiles, one head size. It gives zeros."""

    def unsupported(self, problem: Problem) -> str | None:
        whole = problem.seqlen_q % 128 == problem.seqlen_k % 128 == 0
        return super().unsupported(problem) or (None if whole and problem.head_dim == 128 else "128 alone")

    def attend(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.zeros(problem.out_shape, dtype=q.dtype)


def test_what_takes_few_shapes_is_tried_on_those() -> None:
    found = outcomes(OneSizeAlone())
    skipped = {name for name, how in found.items() if how == "skipped"}
    shapes = {"odd_lengths", "head_dim_40", "head_dim_256", "values_of_another_head_dim", "length_1"}
    assert skipped == shapes | {"another_stream", "parallel_units_is_a_number_of_cores"}
    passed = {name for name, how in found.items() if how == "passed"}
    # Of a zero its author can only say that it is a tensor, is there, and leaves its inputs alone.
    assert passed == {
        *("is_a_backend", "says_whether_it_is_available", "supports_something", "refuses_with_a_reason"),
        *("output_is_a_plain_tensor_of_the_problems_shape_and_dtype", "output_has_memory_of_its_own"),
        "inputs_are_left_as_they_were",
    }


def test_a_backend_that_is_not_available_is_asked_for_nothing_more() -> None:
    class Absent(Right):
        def unavailable(self) -> str | None:
            return "no such device"

        def unsupported(self, problem: Problem) -> str | None:
            raise RuntimeError("it asks its device")

    found = outcomes(Absent())
    assert {name for name, how in found.items() if how != "skipped"} == {
        "is_a_backend",
        "says_whether_it_is_available",
    }


def test_every_built_in_backend_of_a_cpu_is_under_the_kit_here() -> None:
    ours = [b for b in discover().backends if b.source.distribution == "attnbench"]
    classes = [kit.backend for kit in BackendConformance.__subclasses__() if kit.__module__ == __name__]
    assert {b.name for b in ours if b.device == "cpu"} == {b.name for b in classes}


def of_other_devices() -> list[Backend]:
    """All that this distribution brings for a GPU or an NPU, with nothing of this machine's cache of the Hub."""
    ours = importlib.metadata.distribution("attnbench").entry_points.select(group=hookspecs.ENTRY_POINT_GROUP)
    with mock.patch.dict(os.environ, {"KERNELS_CACHE": os.devnull}):
        return [b for entry in ours for b in entry.load().attnbench_backends() if b.device != "cpu"]


@pytest.mark.parametrize("backend", of_other_devices(), ids=lambda backend: f"{backend.name}-{backend.device}")
def test_a_built_in_of_another_device_is_a_backend_and_skips_with_its_reason(backend: Backend) -> None:
    """Where the device is there, so are its tests: `attnbench plugins check` runs them."""
    reason = backend.unavailable()
    if reason is None:
        pytest.skip(f"a {backend.device} is there")
    kit = BackendConformance()
    kit.backend = backend
    found = {name: _run(kit, name, of) for name, of in every_test() if of in ("", "fp16")}
    ran = {name for name, how in found.items() if how["outcome"] != "skipped"}
    assert ran == {"is_a_backend", "says_whether_it_is_available"}
    assert all(found[name]["outcome"] == "passed" for name in ran)
    assert all(how["words"] for name, how in found.items() if name not in ran)


def test_a_skip_gives_the_backends_own_reason() -> None:
    kit = BackendConformance()
    kit.backend = RefusesAll()
    assert _run(kit, "square", "fp32") == {"outcome": "skipped", "words": "not today", "trace": ""}


# In a process of its own

FILE = """
import os
import torch
from attnbench import Backend

class Mine(Backend):
    name = "mine"
    device = "cpu"

    def unsupported(self, problem):
        plain = problem.direction == "fwd" and not problem.causal and not problem.window
        return None if plain and problem.dtype == "fp32" and problem.heads_q == 1 else "plain fp32 alone"

    def prepare(self, problem, q, k, v):
        if problem.head_dim == 40:
            os._exit(7)
        if problem.softmax_scale == 0.25:
            raise ValueError("no such scale")
        return lambda: torch.softmax(q @ k.transpose(-1, -2) * problem.softmax_scale, -1) @ v
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_a_process_that_dies_fails_one_test_and_the_rest_go_on(mine: Path) -> None:
    source = EntryPointRef.of_file(f"{mine}:Mine")
    assert source is not None
    found = list(check(BackendInfo("mine", "cpu", "", "", True, None, source), 60.0))
    assert [(one.test, one.dtype) for one in found] == list(every_test())
    failed = {one.test: one for one in found if one.outcome == "FAILED"}
    assert failed.keys() == {"head_dim_40", "softmax_scale"}
    assert failed["head_dim_40"].words == "its process ended: exit code 7"
    assert failed["softmax_scale"].words == "ValueError: no such scale"
    assert failed["softmax_scale"].trace.endswith("ValueError: no such scale\n")
    assert {one.words for one in found if one.outcome == "skipped" and one.test == "square"} == {"plain fp32 alone"}


def test_a_process_that_always_dies_is_not_started_for_every_test(mine: Path) -> None:
    mine.write_text(FILE.replace("if problem.head_dim == 40:", "if True:"))
    source = EntryPointRef.of_file(f"{mine}:Mine")
    assert source is not None
    found = list(check(BackendInfo("mine", "cpu", "", "", True, None, source), 60.0))
    assert [(one.test, one.dtype) for one in found] == list(every_test())
    words = [one.words for one in found if one.outcome == "FAILED"]
    assert words[:3] == ["its process ended: exit code 7"] * 3
    assert set(words[3:]) == {"not tried: the last 3 tests ended its process"}


def test_a_table_has_a_row_a_test_and_says_why() -> None:
    rows = table(
        [
            Outcome("is_a_backend", "", "passed"),
            Outcome("square", "fp16", "skipped", "fp32 alone"),
            Outcome("square", "bf16", "skipped", "fp32 alone"),
            Outcome("square", "fp32", "FAILED", "max error 1"),
        ]
    )
    assert rows == [
        ["is a backend", "passed", ""],
        ["square", "skipped fp16, bf16; FAILED fp32", "fp32 alone; max error 1"],
    ]


def test_plugins_check_prints_the_table_and_exits_1_where_a_test_failed(mine: Path) -> None:
    answer = attnbench("plugins", "check", f"{mine}:Mine", cwd=mine.parent, timeout=120)
    assert answer.code == 1
    lines = {line.split("  ")[0]: line for line in answer.out.splitlines()}
    assert "FAILED fp32" in lines["head dim 40"]
    assert "its process ended: exit code 7" in lines["head dim 40"]
    assert "passed fp32" in lines["square"]
    assert 'raise ValueError("no such scale")' in answer.err


def test_plugins_check_of_what_is_not_available_says_why(mine: Path) -> None:
    mine.write_text(FILE + "\n    def unavailable(self):\n        return 'it needs a moon'\n")
    answer = attnbench("plugins", "check", f"{mine}:Mine", cwd=mine.parent)
    assert answer.code == 3
    assert answer.problem == "error: mine cannot be checked here: on cpu: it needs a moon"


def test_plugins_check_takes_a_prefix_of_one_backend_of_the_device() -> None:
    answer = attnbench("plugins", "check", "flash_attn_", "--device", "npu")
    assert answer.code == 3
    assert answer.problem.startswith("error: flash_attn_npu cannot be checked here: on npu: ")
    ambiguous = "error: backend 'flash_attn_' could be flash_attn_3, flash_attn_4, flash_attn_npu"
    assert attnbench("plugins", "check", "flash_attn_").problem == ambiguous


# A backend from a file


def test_the_backend_of_the_docs_passes_the_kit(tmp_path: Path) -> None:
    code = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "plugins.md").read_text(), re.MULTILINE | re.DOTALL)[
        0
    ]
    (tmp_path / "my_attention.py").write_text(code)
    source = EntryPointRef.of_file(f"{tmp_path}/my_attention.py:MyAttention")
    assert source is not None
    backend = registry.load(BackendInfo("my_attention", "cpu", "", "", True, None, source))
    found = outcomes(backend)
    assert "FAILED" not in found.values()
    assert found["square"] == found["reads_single_rows_at_each_call"] == "passed"


def test_a_backend_from_a_file_runs_beside_the_others(mine: Path) -> None:
    words = ("--seqlen-q", "16", "--seqlen-k", "32", "--protocol", "fixed", "--warmup", "1", "--iters", "4")
    answer = attnbench("run", "--backends", "mine.py:Mine,gemm_ref", *words, "--out", "r", cwd=mine.parent)
    assert answer.code == 0, answer.err
    assert "### mine vs gemm_ref" in answer.out or "mine µs" in answer.out
    assert "PASSED" in (mine.parent / "r" / "results.csv").read_text()
    assert str(mine.parent) not in (mine.parent / "r" / "run.json").read_text()


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        ("none.py:Mine", 2, "there is no file "),
        ("mine.py", 2, "no backend is called 'mine.py'"),
        ("mine.py:Yours", 4, "plugin Yours of mine.py failed to load: mine.py has no Yours; it has "),
        ("mine.py:torch", 4, "plugin torch of mine.py failed to load: module is no backend: "),
    ],
)
def test_a_file_that_brings_no_backend_is_told_in_a_line(mine: Path, words: str, code: int, problem: str) -> None:
    answer = attnbench("run", "--backends", words, cwd=mine.parent)
    assert answer.code == code
    assert problem in answer.problem


def test_a_files_own_folder_can_be_imported_and_stands_in_for_nothing(mine: Path) -> None:
    (mine.parent / "beside.py").write_text("SCALE = 1.0")
    (mine.parent / "torch.py").write_text("raise SystemExit('the folder came first')")
    mine.write_text(textwrap.dedent(FILE).replace("import torch\n", "import torch\nimport beside\n"))
    answer = attnbench("run", "--backends", "mine.py:Mine", "--dry-run", cwd=mine.parent, env=os.environ.copy())
    assert answer.code == 0, answer.err


def test_a_name_that_is_taken_is_refused(mine: Path) -> None:
    mine.write_text(FILE.replace('name = "mine"', 'name = "sdpa"'))
    answer = attnbench("run", "--backends", "mine.py:Mine", cwd=mine.parent)
    assert answer.code == 4
    assert answer.problem.endswith("backend sdpa on cpu is there already")


def test_a_file_that_raises_shows_where(mine: Path) -> None:
    mine.write_text("import attnbench\n\nx = undefined\n")
    answer = attnbench("run", "--backends", "mine.py:Mine", cwd=mine.parent)
    assert answer.code == 4
    assert 'mine.py", line 3, in <module>\n    x = undefined\n' in answer.err
    assert answer.err.splitlines()[-1] == (
        "error: plugin Mine of mine.py failed to load: NameError: name 'undefined' is not defined"
    )
