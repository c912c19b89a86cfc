"""Hand-made results, fake plugins and process calls that several test files share."""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, NamedTuple

from attnbench.devices import DeviceInfo
from attnbench.problem import Problem
from attnbench.result import Check, Measurement, Result, Status

ROOT = Path(__file__).resolve().parents[1]
ASCEND_CSV = ROOT / "reports" / "ascend-910b2" / "results.csv"
SCRIPT = Path(sys.executable).parent / "attnbench"
ON_CPU = [
    "flex_attention",
    "gemm_ref",
    "ggml",
    "jax_xla",
    "jit_flash",
    "onnxruntime",
    "openvino",
    "sdpa",
    "sdpa_math",
    "sdpa_upcast",
]
OFF_CPU = [
    "cudnn_frontend",
    "flash_attn",
    "flash_attn_3",
    "flash_attn_4",
    "flash_attn_npu",
    "flashinfer_fa2",
    "flashinfer_fa3",
    "hf_kernels",
    "jax_cudnn",
    "jax_pallas",
    "npu_fused_attention",
    "npu_fusion_attention",
    "npu_incre_flash_attention",
    "npu_prompt_flash_attention",
    "pto_demo_flash",
    "pto_flash_attention",
    "sageattention",
    "sdpa_cudnn",
    "sdpa_efficient",
    "sdpa_flash",
    "tilelang_flash",
    "transformer_engine",
    "triton_flash",
    "xformers",
]
BUILT_IN = sorted([*ON_CPU, *OFF_CPU])
"""attnbench's own entry points, in the order in which they are listed; some of ON_CPU are on other devices too."""

TINY = ("--seqlen-q", "16", "--seqlen-k", "32", "--head-dim", "32")
QUICK = ("--protocol", "fixed", "--warmup", "1", "--iters", "4")

DEVICE = DeviceInfo(kind="npu", name="Test NPU", cores=24, peak_tflops={"fp16": 100.0})

HOSTILE = (
    "pipe|bar",
    "two\nlines\r\nmore",
    "<script>alert(1)</script>",
    "\\input{/etc/passwd}",
    "[x](javascript:alert(1))",
    "\x1b[31mred\x1b[0m\x1b]0;title\x07\x9b1m",
    "[bold]x[/bold]",
    '=cmd|"/C calc"!A1',
    "{html}{{T}}[[File:x]]!i.png!",
    "a\u202eb\u2028c\x00d",
)


class Answer(NamedTuple):
    """What a command did."""

    code: object
    out: str
    err: str

    @property
    def problem(self) -> str:
        """The line that says what went wrong; fails the test unless there is one, a hint at most, and no traceback."""
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        return lines[0]


def attnbench(*words: object, timeout: float = 60, **options: Any) -> Answer:
    """attnbench's console script in a process of its own."""
    done = subprocess.run(
        [str(SCRIPT), *map(str, words)], capture_output=True, text=True, encoding="utf-8", timeout=timeout, **options
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def python(code: str, *words: object, **options: Any) -> Answer:
    """A script in a Python process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60, **options)
    return Answer(done.returncode, done.stdout, done.stderr)


def passed(backend: str = "jit_flash", *blocks: tuple[float, ...], **fields: Any) -> Result:
    """A PASSED result of 128×1024×128 fp16 on the npu, 20 µs in two blocks, but for what is given."""
    shape = {"seqlen_q": 128, "seqlen_k": 1024, "dtype": "fp16"} | fields.pop("problem", {})
    timing = {
        "statistic": "median",
        "timing_method": "device_events",
        "cache": "hot",
        "host_us": 5.0,
        "clock_mhz": 1800.0,
    }
    timing |= fields.pop("timing", {})
    check = Check(max_abs_err=1e-4, err_budget=4e-4, classic_ok=True, inputs="normal", rows_checked=128, rows_total=128)
    defaults: dict[str, Any] = {"device": "npu", "used_cores": 1}
    return Result(
        problem=Problem(**shape),
        backend=backend,
        status=Status.PASSED,
        check=check,
        measurement=Measurement(blocks=blocks or ((19.0, 20.0), (20.0, 21.0)), **timing),
        **(defaults | fields),
    )


def failed(
    backend: str = "jit_flash", status: Status = Status.RUNTIME_ERROR, reason: str = "it broke", **shape: Any
) -> Result:
    """A result without a number."""
    problem = Problem(**({"seqlen_q": 128, "seqlen_k": 1024, "dtype": "fp16"} | shape))
    return Result(problem=problem, backend=backend, device="npu", status=status, reason=reason)


def header(device: DeviceInfo = DEVICE) -> dict[str, Any]:
    """The part of run.json that reading a run back needs."""
    facts = {"kind": device.kind, "name": device.name, "cores": device.cores, "peak_tflops": dict(device.peak_tflops)}
    return {"schema_version": 1, "device": facts}


class BareVenv:
    """A venv with attnbench from a wheel, away from the checkout and from all settings."""

    def __init__(self, folder: Path) -> None:
        self._bin = folder / "venv" / "bin"
        names = ("PYTHON", "ATTNBENCH", "VIRTUAL")
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(names)}
        self.env |= {
            "ATTNBENCH_CONFIG": os.devnull,
            "ATTNBENCH_CACHE_DIR": str(folder / "cache"),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        self.env |= {"PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "PATH": f"{self._bin}:{os.environ['PATH']}"}
        self.steps: list[tuple[str, float]] = []
        """What was run, and the seconds that it took."""
        # `python -m build` makes the sdist first and the wheel from what is in it.
        self.run(sys.executable, "-m", "build", "--outdir", folder / "dist", ROOT, cwd=folder)
        (wheel,) = (folder / "dist").glob("*.whl")
        self.steps.clear()
        self.run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
        self.run("python", "-m", "pip", "install", "-q", wheel, cwd=folder)

    def run(self, *command: object, cwd: Path, code: int = 0) -> Answer:
        """A command, of those in the venv first. Fails the test where it ends with another code than expected."""
        start_s = time.monotonic()
        words = [str(word) for word in command]
        program = words[0] if "/" in words[0] else str(self._bin / words[0])
        done = subprocess.run([program, *words[1:]], cwd=cwd, env=self.env, capture_output=True, text=True, timeout=900)
        self.steps.append((" ".join([Path(words[0]).name, *words[1:]]), time.monotonic() - start_s))
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return Answer(done.returncode, done.stdout, done.stderr)


PLUGIN_HEAD = """
import attnbench

class Toy:
    device = "cpu"

    def __init__(self, name, device="cpu"):
        self.name, self.device = name, device

    def unavailable(self):
        return None

    def unsupported(self, problem):
        return None

    def prepare(self, problem, q, k, v):
        from torch.nn.functional import scaled_dot_product_attention as attend
        return lambda: attend(q, k, v, scale=problem.softmax_scale)
"""
_modules = itertools.count()


class PluginFolder:
    """A folder of installed fake distributions. Every module gets a name of its own, so that no cache matters."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, body: str, entry: str = "toy", distribution: str = "toy-dist", version: str = "1.5") -> str:
        """Install a module that begins with PLUGIN_HEAD as an entry point, and return its name."""
        module = f"fake_plugin_{os.getpid()}_{next(_modules)}"
        (self.path / f"{module}.py").write_text(PLUGIN_HEAD + textwrap.dedent(body), encoding="utf-8")
        info = self.path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        if not info.exists():
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
            (info / "entry_points.txt").write_text("[attnbench.backends]\n")
        with open(info / "entry_points.txt", "a") as file:
            file.write(f"{entry} = {module}\n")
        importlib.invalidate_caches()
        return module

    def backends(self, items: str, **where: str) -> str:
        """Install a plugin whose hook returns the Python expression `items`."""
        return self.add(f"@attnbench.hookimpl\ndef attnbench_backends():\n    return {items}\n", **where)
