"""jit_flash and pto_demo_flash on an NPU, as far as no NPU is needed: a stand-in for bisheng makes their libraries.

What it emits has the kernels' entry points and computes on a CPU. The kernel itself is compiled by no test.
"""

from __future__ import annotations

import ctypes
import dataclasses
import inspect
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

from attnbench import jit
from attnbench.devices import DeviceInfo
from attnbench.problem import Problem
from attnbench_plugins import pto_demo_flash
from attnbench_plugins.jit_flash import npu
from attnbench_plugins.jit_flash.npu import JitFlashNpu, Work, choose
from attnbench_plugins.pto_demo_flash import PtoDemoFlash, buffer_shapes

KERNEL = ROOT / "kernels" / "ascend" / "flash_pto.cpp"
STAND_IN = Path(__file__).parent / "fake_cann" / "bisheng.py"
Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Stream(ctypes.Structure):
    """A stream as fake_cann/kernels.cpp has it, that runs what it is given at once."""

    _fields_ = (
        ("now_us", ctypes.c_double),
        ("launch", ctypes.CFUNCTYPE(None, ctypes.c_void_p, Task, ctypes.c_void_p, ctypes.c_double)),
    )

    def __init__(self) -> None:
        self.tasks = 0
        super().__init__(0.0, type(self)._fields_[1][1](self._launch))

    def _launch(self, _stream: int, task: Callable[[int], None], argument: int, us: float) -> None:
        self.tasks += 1
        self.now_us += us
        task(argument)


class Cann:
    """A toolkit with a stand-in compiler, a PTO library, and a torch.npu whose tensors are the CPU's."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.home, self.library, self._log, self._patch = folder / "cann", folder / "pto", folder / "log", patch
        (self.library / "include" / "pto").mkdir(parents=True)
        (self.library / "include" / "pto" / "pto-inst.hpp").write_text("// the library's instructions\n")
        (self.library / "version.cmake").write_text('set_cann_package(pto-isa VERSION "9.1.0")\n')
        kernel = self.library / pto_demo_flash.KERNEL
        kernel.parent.mkdir(parents=True)
        kernel.write_text('#include "fa_performance_kernel.h"\n')
        headers = self.library / "kernels" / "manual" / "a2a3" / "flash_atten"
        headers.mkdir(parents=True)
        (headers / "fa_performance_kernel.h").write_text("// the kernel's sizes\n")
        (self.home / "bin").mkdir(parents=True)
        (self.home / "version.cfg").write_text("[8.5.0]\n")
        self.fail("none")
        patch.setenv("ASCEND_HOME_PATH", str(self.home))
        patch.setenv("PTO_LIB_PATH", str(self.library))
        patch.delenv("NPU_ARCH", raising=False)
        patch.setenv("ATTNBENCH_CACHE_DIR", str(folder / "cache"))
        self.stream, self.waits = Stream(), 0
        patch.setattr(
            torch, "npu", SimpleNamespace(current_stream=self._current, synchronize=self._wait), raising=False
        )
        patch.setattr(npu, "TORCH_DEVICE", "cpu")
        self.device("Ascend910B2", 24)

    def device(self, name: str, cores: int | None) -> None:
        info = DeviceInfo(kind="npu", name=name, cores=cores)
        found = SimpleNamespace(unavailable=lambda: None, info=lambda: info)
        self._patch.setattr("attnbench.devices.device", lambda kind: found)

    def fail(self, fault: str) -> None:
        """What is wrong with what the compiler makes from now on."""
        compiler = self.home / "bin" / "bisheng"
        compiler.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STAND_IN}" "{self._log}" {fault} "$@"\n')
        compiler.chmod(0o700)

    @property
    def compilations(self) -> list[list[str]]:
        return [json.loads(line) for line in self._log.read_text().splitlines()] if self._log.exists() else []

    def _current(self) -> SimpleNamespace:
        return SimpleNamespace(npu_stream=ctypes.addressof(self.stream))

    def _wait(self) -> None:
        self.waits += 1


@pytest.fixture
def cann(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cann:
    return Cann(tmp_path, monkeypatch)


def problem(seqlen_q: int = 128, seqlen_k: int = 512, **fields: object) -> Problem:
    return Problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, dtype="fp16", **fields)  # type: ignore[arg-type]


def tensors(of: Problem, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(shape, generator=drawn).half() for shape in (of.q_shape, of.k_shape, of.v_shape))
    return q, k, v


def exact(of: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    group = of.heads_q // of.heads_kv
    k, v = (tensor.double().repeat_interleave(group, 1) for tensor in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * of.softmax_scale
    if of.causal:
        hidden = torch.ones(of.seqlen_q, of.seqlen_k, dtype=torch.bool).triu(1 + of.seqlen_k - of.seqlen_q)
        scores = scores.masked_fill(hidden, -math.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v


def error(backend: JitFlashNpu | PtoDemoFlash, of: Problem) -> float:
    q, k, v = tensors(of)
    attend = backend.prepare(of, q, k, v)
    q.copy_(tensors(of, seed=1)[0])  # what it is given at the call counts
    return float((attend() - exact(of, q, k, v)).abs().max())


# What is compiled


def test_the_compiler_gets_these_arguments(cann: Cann) -> None:
    of = problem(seqlen_q=2048, seqlen_k=8192)
    npu._library(of.head_dim, choose(of, 24).keys, False)
    (arguments,) = cann.compilations
    folder = Path(npu.files("attnbench_kernels")) / "ascend"  # type: ignore[attr-defined]
    assert arguments == [
        *("-O2", "-std=c++17", "-fPIC", "-shared", "-xcce", "--npu-arch=dav-2201"),
        *("-DMEMORY_BASE", "-Wno-ignored-attributes"),
        f"-I{cann.library}/include",
        *(f"-I{cann.home}/{name}" for name in ("include", "pkg_inc", "pkg_inc/runtime", "pkg_inc/profiling")),
        *(f"-I{folder}", "source/flash_pto.cpp", "-o", f"library{jit.Toolchain.suffix}"),
        *("-DHEAD_DIM=128", "-DKEYS=256", "-DOUT_FP32=0"),
    ]


def test_the_compiler_may_take_five_minutes() -> None:
    assert inspect.signature(jit.compile).parameters["timeout_s"].default == 300


def test_the_librarys_own_kernel_is_compiled_where_it_lies(cann: Cann) -> None:
    pto_demo_flash._library()
    (arguments,) = cann.compilations
    assert f"-I{cann.library}/kernels/manual/a2a3/flash_atten" in arguments
    assert f"-I{cann.library}/demos/torch_jit/flash_atten" in arguments
    assert "--npu-arch=dav-2201" in arguments
    assert "source/fa_kernel.cpp" in arguments


@pytest.mark.parametrize(("name", "setting", "arch"), [("Ascend950", "", "3510"), ("Ascend910B2", "dav-3510", "3510")])
def test_the_architecture_is_the_devices_or_the_settings(
    cann: Cann, monkeypatch: pytest.MonkeyPatch, name: str, setting: str, arch: str
) -> None:
    cann.device(name, 24)
    monkeypatch.setenv("NPU_ARCH", setting)
    pto_demo_flash._library()
    assert f"--npu-arch=dav-{arch}" in cann.compilations[0]


def test_a_library_is_compiled_once_and_anew_when_something_changes(cann: Cann) -> None:
    def compilations() -> int:
        npu._library(128, 256, False)
        return len(cann.compilations)

    assert [compilations(), compilations()] == [1, 1]
    (cann.home / "version.cfg").write_text("[9.0.0]\n")
    assert [compilations(), compilations()] == [2, 2]
    (cann.library / "version.cmake").write_text('set_cann_package(pto-isa VERSION "9.2.0")\n')
    assert [compilations(), compilations()] == [3, 3]
    (cann.library / "include" / "pto" / "pto-inst.hpp").write_text("// other instructions\n")
    assert [compilations(), compilations()] == [4, 4]
    npu._library(64, 256, False)
    assert len(cann.compilations) == 5


def test_what_the_compiler_says_is_shown(cann: Cann) -> None:
    cann.fail("does_not_compile")
    of = problem()
    with pytest.raises(jit.CompileError, match=r"flash_pto\.cpp:1:1: error: this core has no such instruction") as info:
        JitFlashNpu().prepare(of, *tensors(of))
    assert "and more about it" in info.value.log


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("ASCEND_HOME_PATH", ["neither ASCEND_HOME_PATH nor ASCEND_TOOLKIT_HOME is set", "bisheng is not on PATH"]),
        ("PTO_LIB_PATH", ["PTO's headers are not there: set PTO_LIB_PATH to a checkout"]),
    ],
)
def test_each_missing_piece_is_named(
    cann: Cann, monkeypatch: pytest.MonkeyPatch, missing: str, words: list[str]
) -> None:
    for backend in (JitFlashNpu(), PtoDemoFlash()):
        assert backend.unavailable() is None
    monkeypatch.delenv(missing)
    monkeypatch.delenv("ASCEND_TOOLKIT_HOME", raising=False)
    gone = SimpleNamespace(unavailable=lambda: "torch_npu is not installed")
    monkeypatch.setattr("attnbench.devices.device", lambda kind: gone)
    for backend in (JitFlashNpu(), PtoDemoFlash()):
        reason = backend.unavailable() or ""
        assert all(part in reason for part in ["torch_npu is not installed", *words])
        assert reason.count("PTO_LIB_PATH") <= 1


def test_headers_of_canns_own_are_not_the_librarys_kernel(cann: Cann, monkeypatch: pytest.MonkeyPatch) -> None:
    (cann.home / "include" / "pto").mkdir(parents=True)
    monkeypatch.delenv("PTO_LIB_PATH")
    assert JitFlashNpu().unavailable() is None
    assert PtoDemoFlash().unavailable() == (
        "PTO_LIB_PATH is not set: it must name a checkout of the PTO library, which has the kernel"
    )


def test_a_library_without_the_kernel_and_another_architecture_are_named(
    cann: Cann, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cann.library / pto_demo_flash.KERNEL).unlink()
    assert pto_demo_flash.KERNEL in (PtoDemoFlash().unavailable() or "")
    assert JitFlashNpu().unavailable() is None
    monkeypatch.setenv("NPU_ARCH", "dav-3510")
    assert "unset NPU_ARCH=dav-3510" in (JitFlashNpu().unavailable() or "")


@pytest.mark.parametrize("name", ["Ascend310P3", "Ascend910ProB"])
def test_nothing_is_compiled_for_an_npu_whose_architecture_is_not_known(
    cann: Cann, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    cann.device(name, 8)
    reason = f"that of {name} is not known: set NPU_ARCH if it is one of them"
    assert JitFlashNpu().unavailable() == f"the kernel is for dav-2201 (Ascend 910B and 910C), and {reason}"
    assert PtoDemoFlash().unavailable() == f"the library is for dav-2201 and dav-3510, and {reason}"
    monkeypatch.setenv("NPU_ARCH", "dav-2201")
    assert JitFlashNpu().unavailable() is None
    assert PtoDemoFlash().unavailable() is None


@pytest.mark.parametrize(("arch", "memory"), [("dav-2201", "MEMORY"), ("dav-3510", "REGISTER")])
def test_the_library_is_told_which_base_its_tiles_have(cann: Cann, arch: str, memory: str) -> None:
    bases = [flag for flag in jit.pto_toolchain(arch).flags if flag.endswith("_BASE")]
    assert bases == [f"-D{memory}_BASE"]


def test_a_toolkit_that_is_not_where_it_should_be_is_named(cann: Cann, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCEND_HOME_PATH", "/nope")
    reason = JitFlashNpu().unavailable() or ""
    assert "the toolkit is not in /nope, which the environment names" in reason
    assert "source its set_env.sh" in reason


@pytest.mark.parametrize("name", ["Ascend950PR_9579", "Ascend910_9579"])
def test_an_ascend_950_is_left_to_the_librarys_own_kernel(
    cann: Cann, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    cann.device(name, 28)
    assert JitFlashNpu().unavailable() == (
        "the kernel is for dav-2201 (Ascend 910B and 910C), not for dav-3510: "
        "pto_demo_flash compiles the PTO library's own"
    )
    assert PtoDemoFlash().unavailable() is None
    monkeypatch.setenv("NPU_ARCH", "dav-2201")
    assert JitFlashNpu().unavailable() is None


# What is launched


@pytest.mark.parametrize(
    "of",
    [
        problem(),
        problem(seqlen_q=256, seqlen_k=384, head_dim=64),
        problem(seqlen_q=256, seqlen_k=512, causal=True),
        problem(seqlen_q=256, seqlen_k=128, causal=True),
        problem(batch=2, heads_q=4, heads_kv=2, causal=True, softmax_scale=0.3),
    ],
    ids=lambda of: of.case_id,
)
def test_pointers_and_sizes_reach_the_kernel(cann: Cann, of: Problem) -> None:
    assert error(JitFlashNpu(), of) < 2e-3
    assert cann.waits == 1


def test_the_output_may_be_fp32(cann: Cann) -> None:
    of = problem()
    q, k, v = tensors(of)
    out = JitFlashNpu().prepare(of, q, k, v, fp32_out=True)()
    assert out.dtype == torch.float32
    assert float((out - exact(of, q, k, v)).abs().max()) < 1e-6


def test_the_workspace_is_what_the_library_asks_for(cann: Cann, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: (sizes.append((a[0], k["dtype"])), empty(*a, **k))[1])
    of = problem(seqlen_k=8192)
    JitFlashNpu().prepare(of, *tensors(of))
    assert sizes == [(of.out_shape, torch.float16), (24 * 1000, torch.uint8)]


@pytest.mark.parametrize("backend", [JitFlashNpu(), PtoDemoFlash()], ids=lambda backend: backend.name)
def test_the_stream_is_asked_for_in_every_call(cann: Cann, backend: JitFlashNpu | PtoDemoFlash) -> None:
    of = problem()
    attend = backend.prepare(of, *tensors(of))
    assert cann.stream.tasks == 1
    streams = [Stream() for _ in range(3)]
    for stream in [*streams, streams[0]]:
        cann.stream = stream
        attend()
    assert [stream.tasks for stream in streams] == [2, 1, 1]


def test_a_status_is_an_error(cann: Cann) -> None:
    cann.fail("status")
    of = problem()
    with pytest.raises(RuntimeError, match="status 507899"):
        JitFlashNpu().prepare(of, *tensors(of))


@pytest.mark.parametrize("backend", [JitFlashNpu(), PtoDemoFlash()], ids=lambda backend: backend.name)
def test_what_the_device_refuses_is_told_by_prepare(
    cann: Cann, backend: JitFlashNpu | PtoDemoFlash, monkeypatch: pytest.MonkeyPatch
) -> None:
    def synchronize() -> None:
        raise RuntimeError("aicore exception")

    monkeypatch.setattr(torch.npu, "synchronize", synchronize)  # type: ignore[attr-defined]
    of = problem()
    with pytest.raises(RuntimeError, match="aicore exception"):
        backend.prepare(of, *tensors(of))


@pytest.mark.parametrize("fault", ["no_op", "dropped_tail", "unnormalised"])
@pytest.mark.parametrize("backend", [JitFlashNpu(), PtoDemoFlash()], ids=lambda backend: backend.name)
def test_a_stand_in_that_computes_wrongly_is_far_off(
    cann: Cann, backend: JitFlashNpu | PtoDemoFlash, fault: str
) -> None:
    """So that a run of it shows that the suite catches it."""
    cann.fail(fault)
    assert not error(backend, problem()) < 0.02


# What is refused


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"direction": "bwd"}, "only runs forward"),
        ({"window": 64}, "no sliding window"),
        ({"dtype": "bf16"}, "fp16, not bf16"),
        ({"dtype": "fp32"}, "fp16, not fp32"),
        ({"head_dim": 96}, "head sizes 64 and 128"),
        ({"head_dim_v": 64}, "head sizes 64 and 128"),
        ({"seqlen_q": 100}, "seqlen_q 100 is no multiple of 128"),
        ({"seqlen_k": 192}, "seqlen_k 192 is no multiple of 128"),
        ({"seqlen_k": 1 << 21}, "seqlen_k 2097152 is no multiple of 128 up to 1048576"),
        ({"softmax_scale": 11.0}, "softmax_scale 11 is not between"),
        ({"softmax_scale": 1e-30}, "softmax_scale 1e-30 is not between"),
        ({"batch": 1 << 16, "heads_q": 1 << 15, "heads_kv": 1}, "2³¹ heads"),
    ],
)
def test_what_the_kernel_cannot_do_is_unsupported(fields: dict[str, object], words: str) -> None:
    assert JitFlashNpu().unsupported(problem()) is None
    assert words in (JitFlashNpu().unsupported(dataclasses.replace(problem(), **fields)) or "")  # type: ignore[arg-type]


def test_auto_is_fp16() -> None:
    for backend in (JitFlashNpu(), PtoDemoFlash()):
        assert backend.unsupported(dataclasses.replace(problem(), dtype="auto")) is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"batch": 2}, "one head"),
        ({"heads_q": 2, "heads_kv": 1}, "one head"),
        ({"head_dim": 64, "head_dim_v": 64}, "head size 128"),
        ({"seqlen_q": 64}, "seqlen_q must be a multiple of 128 up to 3072"),
        ({"seqlen_q": 3200}, "seqlen_q must be a multiple of 128 up to 3072"),
        ({"seqlen_k": 384}, "seqlen_k must be a multiple of 256, at least 512"),
        ({"seqlen_k": 256}, "seqlen_k must be a multiple of 256, at least 512"),
        ({"causal": True}, "as many queries as keys"),
        ({"softmax_scale": 0.1}, "its scale is 1/√128"),
        ({"dtype": "bf16"}, "fp16 only"),
        ({"window": 8}, "without a window"),
        ({"direction": "bwd"}, "forward only"),
    ],
)
def test_what_the_librarys_kernel_does_not_check_is_unsupported(fields: dict[str, object], words: str) -> None:
    assert PtoDemoFlash().unsupported(problem()) is None
    assert PtoDemoFlash().unsupported(problem(512, 512, causal=True)) is None
    assert words in (PtoDemoFlash().unsupported(dataclasses.replace(problem(), **fields)) or "")  # type: ignore[arg-type]


def test_prepare_refuses_what_is_unsupported(cann: Cann) -> None:
    of = problem(window=64)
    with pytest.raises(ValueError, match="no sliding window"):
        JitFlashNpu().prepare(of, *tensors(of))
    assert cann.compilations == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda k: k[:, :, :256], "k is (1, 1, 256, 128) of torch.float16, not what"),
        (lambda k: k.float(), "of torch.float32, not what"),
        (lambda k: k.transpose(2, 3).contiguous().transpose(2, 3), "k must be contiguous"),
        (lambda k: torch.cat([k.flatten(), k.flatten()])[1 : 1 + k.numel()].view(k.shape), "multiple of 32 bytes"),
        (lambda k: torch._neg_view(k), "negated view"),
    ],
    ids=["shape", "dtype", "strides", "address", "negated"],
)
def test_a_tensor_that_the_kernel_would_misread_is_refused(
    cann: Cann, change: Callable[[torch.Tensor], torch.Tensor], words: str
) -> None:
    of = problem()
    q, k, v = tensors(of)
    for backend in (JitFlashNpu(), PtoDemoFlash()):
        with pytest.raises(ValueError, match=re.escape(words)):
            backend.prepare(of, q, change(k), v)


def test_a_tensor_elsewhere_is_refused(cann: Cann, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npu, "TORCH_DEVICE", "npu")
    of = problem()
    with pytest.raises(ValueError, match="q is on cpu, not on an NPU"):
        JitFlashNpu().prepare(of, *tensors(of))


# How work is cut


@pytest.mark.parametrize(
    ("of", "cores", "work"),
    [
        (problem(128, 1024), 24, Work(128, 8, 8)),
        (problem(128, 8192), 24, Work(128, 64, 24)),
        (problem(2048, 8192), 24, Work(256, 512, 24)),
        (problem(128, 384), 24, Work(128, 3, 3)),
        (problem(2048, 8192), 20, Work(256, 512, 20)),
        (problem(256, 256, causal=True), 1, Work(128, 3, 1)),
        (problem(256, 128, causal=True, heads_q=3), 24, Work(128, 6, 6)),
        (problem(2048, 8192, heads_q=8, batch=4), 64, Work(256, 16384, 32)),
    ],
    ids=lambda value: getattr(value, "case_id", str(value)),
)
def test_the_keys_are_split_over_idle_cores(of: Problem, cores: int, work: Work) -> None:
    assert choose(of, cores) == work


def test_causal_units_are_those_that_some_query_sees() -> None:
    of = problem(512, 1024, causal=True)
    seen = sum(
        any(key <= row + of.seqlen_k - of.seqlen_q for row in range(tile * 128, tile * 128 + 128))
        for tile in range(4)
        for key in range(0, 1024, 256)
    )
    assert Work.of(of, 256, 24).units == seen


def test_a_problem_occupies_no_more_cores_than_there_are_known_to_be(cann: Cann) -> None:
    of = problem(2048, 8192)
    assert JitFlashNpu().parallel_units(of) == 24
    cann.device("Ascend of the future", None)
    assert JitFlashNpu().parallel_units(of) == npu.LEAST_CORES
    assert PtoDemoFlash().parallel_units(of) == 16
    cann.device("Ascend910B3", 20)
    assert PtoDemoFlash().parallel_units(problem(3072, 8192)) == 20


def test_the_plugin_and_the_kernel_agree() -> None:
    source = KERNEL.read_text()
    assert f"constexpr int ROWS = {npu.ROWS}, D = HEAD_DIM" in source
    assert f"constexpr int MAX_BLOCKS = {npu.MAX_BLOCKS};" in source
    hidden, smallest = (float(re.search(rf"{name} = (\S+)f;", source)[1]) for name in ("HIDDEN", "SMALLEST"))  # type: ignore[index]
    largest_fp32 = float(torch.finfo(torch.float32).max)
    assert -hidden * npu.MAX_SCALE < largest_fp32
    assert math.exp((hidden - smallest) * npu.MIN_SCALE) == 0
    parameters = re.search(r'extern "C" int flash_launch\((.*?)\)', source, re.DOTALL)
    assert parameters is not None
    types = [parameter.split()[:-1] for parameter in parameters[1].split(",")]
    assert types == [*[["void*"]] * 6, *[["int"]] * 7, ["float"]]


def test_the_librarys_kernel_works_in_these_buffers() -> None:
    """As its demo allocates them: nb = s0 / 128 blocks, 8 slots each."""
    assert buffer_shapes(384) == {
        "qk_fifo": ((24, 128, 256), "float32"),
        "p_fifo": ((24, 128, 256), "float16"),
        "exp_max_fifo": ((24, 128), "float32"),
        "pv_fifo": ((24, 128, 128), "float32"),
        "global_sum": ((3, 384), "float32"),
        "exp_max": ((3, 384), "float32"),
        "o_parts": ((3, 384, 128), "float32"),
    }


@pytest.mark.parametrize(
    "of", [problem(), problem(384, 512), problem(512, 512, causal=True)], ids=lambda of: of.case_id
)
def test_the_librarys_kernel_gets_its_arguments(cann: Cann, of: Problem) -> None:
    assert error(PtoDemoFlash(), of) < 2e-3
    assert cann.waits == 1
