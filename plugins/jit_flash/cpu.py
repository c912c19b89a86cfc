"""Owns jit_flash on a CPU: compiles kernels/cpu/flash_attention.cpp for this CPU's instruction sets and calls it.

Knows nothing of the kernel's insides.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import as_file, files
from typing import TYPE_CHECKING

from attnbench import jit, settings
from attnbench.backend import Backend
from attnbench.problem import DeviceKind, Problem

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEAD_DIM = 256
"""MAX_DIM in the kernel."""
MIN_SCALE, MAX_SCALE = 1e-38, 2e38
"""Times log2(e), which is how the kernel uses it, it is a normal float between these."""


@dataclass(frozen=True)
class Isa:
    """Instruction sets that the kernel has a path for, as its flash_attention_isa calls them."""

    name: str
    needs: tuple[str, ...]
    """What the CPU must report for it."""
    flags: tuple[str, ...]
    """For the compiler, to leave out what better paths would use."""
    chosen_with: tuple[str, ...] = ()
    """What the CPU must report besides for it to be taken unasked."""


_AVX512 = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
ISAS = (
    Isa("amx_bf16", (*_AVX512, "avx512_bf16", "amx_tile", "amx_bf16"), ()),
    # sse4a is AMD's: Intel's CPUs multiply pairs of bf16 at half the rate of fp32.
    Isa("avx512_bf16", (*_AVX512, "avx512_bf16"), ("-mno-amx-bf16",), ("sse4a",)),
    Isa("avx512", _AVX512, ("-mno-amx-bf16", "-mno-avx512bf16")),
    Isa("avx2", ("avx2", "fma", "f16c"), ("-mno-avx512f",)),
    Isa("neon", ("asimd",), ()),
    Isa("portable", (), ("-march=x86-64",) if platform.machine() == "x86_64" else ()),
)
"""Best first."""


class FlashArgs(ctypes.Structure):
    """flash_args in the kernel, which says what the fields mean."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "workspace", "lse")),
        *((f"{name}_stride", ctypes.c_int64 * 3) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "heads_q", "heads_kv", "seqlen_q", "seqlen_k")),
        *((name, ctypes.c_int64) for name in ("head_dim", "head_dim_v", "window")),
        ("softmax_scale", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("dtype", "causal", "threads")),
    )


class JitFlashCpu(Backend):
    """Forward attention on fp32, fp16 and bf16 tensors whose last dimension is contiguous.

    fp32 and fp16 are computed in fp32, bf16 too unless the CPU multiplies bf16 itself (AMX, AVX512-BF16). It runs on as
    many threads as torch had at `prepare`. ATTNBENCH_CPU_ISA, the name of one of ISAS, forces a lesser path.
    """

    name = "jit_flash"
    device: DeviceKind = "cpu"

    @property
    def summary(self) -> str:  # type: ignore[override]
        isa, _ = _isa()
        return f"JIT-compiled C++ flash attention ({isa.name})"

    @property
    def sources(self) -> Sequence[str]:  # type: ignore[override]
        return [str(files("attnbench_kernels") / "cpu")]

    def unavailable(self) -> str | None:
        _, problem = _isa()
        return problem or jit.missing(jit.cpp_toolchain)

    def unsupported(self, problem: Problem) -> str | None:
        if problem.direction != "fwd":
            return f"direction {problem.direction}: the kernel only runs forward"
        for name in ("head_dim", "head_dim_v"):
            if getattr(problem, name) > MAX_HEAD_DIM:
                return f"{name} {getattr(problem, name)} is above {MAX_HEAD_DIM}"
        if not MIN_SCALE <= problem.softmax_scale <= MAX_SCALE:
            return f"softmax_scale {problem.softmax_scale:g} is beyond what fp32 holds"
        return None

    def prepare(
        self, problem: Problem, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None = None
    ) -> Callable[[], Tensor]:
        """Compile the kernel, fill its arguments, allocate output and workspace.

        The output is contiguous and the same tensor at each call. A contiguous `lse` of (batch, heads_q, seqlen_q) in
        fp32 gets log Σ exp(softmax_scale · q · k) of each query, and -inf where it sees no key. Raises ValueError where
        a tensor is not what the problem says or its last dimension is not contiguous, or the kernel refuses the
        problem, and CompileError.
        """
        import torch

        dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        dtype = dtypes[problem.resolve(self.device).dtype]
        tensors = {"q": q, "k": k, "v": v, "out": torch.empty(problem.out_shape, dtype=dtype)}
        for name, tensor in tensors.items():
            # The kernel only gets addresses: a tensor smaller than the problem would be read past its end.
            if tensor.shape != getattr(problem, f"{name}_shape") or tensor.dtype != dtype:
                raise ValueError(f"{name} is {tuple(tensor.shape)} of {tensor.dtype}, not what {problem.case_id} has")
            if tensor.device.type != "cpu":
                raise ValueError(f"{name} is on {tensor.device}, not on the CPU")
            if tensor.is_neg():  # a view whose numbers are not those in memory
                raise ValueError(f"{name} is a negated view: resolve_neg() it")
            if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
                raise ValueError(f"the last dimension of {name} must be contiguous: its stride is {tensor.stride(-1)}")
        if lse is not None and not (
            lse.shape == problem.out_shape[:3]
            and lse.dtype == torch.float32
            and lse.is_contiguous()
            and lse.device.type == "cpu"
        ):
            raise ValueError(f"lse must be contiguous, of {problem.out_shape[:3]} in torch.float32, on the CPU")

        args = _arguments(problem, list(dtypes).index(problem.resolve(self.device).dtype))
        for name, tensor in tensors.items():
            setattr(args, name, tensor.data_ptr())
            setattr(args, f"{name}_stride", tensor.stride()[:3])
        if lse is not None:
            args.lse = lse.data_ptr()

        library = _library()
        workspace_bytes = library.flash_attention_workspace(ctypes.byref(args))
        if workspace_bytes < 0:
            raise ValueError(f"the kernel refuses {problem.case_id}")
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8)
        args.workspace = workspace.data_ptr()

        kernel, pointer, out = library.flash_attention, ctypes.byref(args), tensors["out"]
        owners = (q, k, v, workspace, lse)  # args holds their addresses, which keep nothing alive

        def attend(_owners: tuple[Tensor | None, ...] = owners) -> Tensor:
            if status := kernel(pointer):
                raise RuntimeError(f"the kernel refuses its arguments: flash_status {status}")
            return out

        return attend

    def parallel_units(self, problem: Problem) -> int:
        """The threads that share the work: fewer than torch's where there is too little of it."""
        return int(_library().flash_attention_threads(ctypes.byref(_arguments(problem, 0))))


def _arguments(problem: Problem, dtype: int) -> FlashArgs:
    """What the kernel has to know of a problem but for the tensors."""
    import torch

    return FlashArgs(
        batch=problem.batch,
        heads_q=problem.heads_q,
        heads_kv=problem.heads_kv,
        seqlen_q=problem.seqlen_q,
        seqlen_k=problem.seqlen_k,
        head_dim=problem.head_dim,
        head_dim_v=problem.head_dim_v,
        # A window this wide hides nothing; a wider one could overflow in the kernel.
        window=0 if problem.window is None else min(problem.window, problem.seqlen_q + problem.seqlen_k),
        softmax_scale=problem.softmax_scale,
        dtype=dtype,
        causal=problem.causal,
        threads=torch.get_num_threads(),
    )


def _isa() -> tuple[Isa, str | None]:
    """The path to take, and why it cannot be taken: None unless ATTNBENCH_CPU_ISA asks for what is not there."""
    features = set(jit.cpu_features().split())
    if "amx_tile" in features and not _tiles_granted():
        features.remove("amx_tile")
    best = next(isa for isa in ISAS if features.issuperset(isa.needs + isa.chosen_with))
    forced = settings.cpu_isa()
    if forced is None:
        return best, None
    for isa in ISAS:
        if isa.name == forced:
            missing = [need for need in isa.needs if need not in features]
            if not missing and best.name == "neon" and isa != best:
                missing = ["x86-64 instructions"]
            return isa, f"this CPU has no {missing[0]}: unset ATTNBENCH_CPU_ISA={forced}" if missing else None
    return best, f"ATTNBENCH_CPU_ISA={forced} is not one of {', '.join(isa.name for isa in ISAS)}"


@lru_cache
def _tiles_granted() -> bool:
    """Whether Linux lets this process use AMX tiles; asking is what the kernel would do, too."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)


def _library() -> ctypes.CDLL:
    isa, _ = _isa()
    with as_file(files("attnbench_kernels") / "cpu") as folder:
        library = jit.compile(folder / "flash_attention.cpp", flags=("-pthread", *isa.flags)).load()
    library.flash_attention_isa.restype = ctypes.c_char_p
    library.flash_attention_workspace.restype = ctypes.c_int64
    made = library.flash_attention_isa().decode()
    if made != isa.name:
        hint = f"set ATTNBENCH_CPU_ISA={made}"
        raise jit.CompileError(f"the compiler made {made} of what was to be {isa.name}", hint=hint)
    return library
