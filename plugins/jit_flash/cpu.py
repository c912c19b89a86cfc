"""Owns jit_flash on a CPU: compiles kernels/cpu/flash_attention.cpp and calls it. Knows nothing of its insides."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from importlib.resources import as_file, files
from typing import TYPE_CHECKING

from attnbench import jit
from attnbench.backend import Backend
from attnbench.problem import DeviceKind, Problem

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEAD_DIM = 256
"""MAX_DIM in the kernel."""
TILE = 64
"""TILE in the kernel: the queries that one thread takes at a time."""


class FlashArgs(ctypes.Structure):
    """flash_args in the kernel, which says what the fields mean."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "workspace")),
        *((f"{name}_stride", ctypes.c_int64 * 3) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "heads_q", "heads_kv", "seqlen_q", "seqlen_k")),
        *((name, ctypes.c_int64) for name in ("head_dim", "head_dim_v", "window")),
        ("softmax_scale", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("dtype", "causal", "threads")),
    )


class JitFlashCpu(Backend):
    """Forward attention in fp32 arithmetic on fp32, fp16 and bf16 tensors whose last dimension is contiguous."""

    name = "jit_flash"
    device: DeviceKind = "cpu"
    summary = "JIT-compiled C++ flash attention (tiled online softmax)"

    @property
    def sources(self) -> Sequence[str]:  # type: ignore[override]
        return [str(files("attnbench_kernels") / "cpu")]

    def unavailable(self) -> str | None:
        return jit.missing(jit.cpp_toolchain)

    def unsupported(self, problem: Problem) -> str | None:
        if problem.direction != "fwd":
            return f"direction {problem.direction}: the kernel only runs forward"
        for name in ("head_dim", "head_dim_v"):
            if getattr(problem, name) > MAX_HEAD_DIM:
                return f"{name} {getattr(problem, name)} is above {MAX_HEAD_DIM}"
        return None

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        """Compile the kernel, fill its arguments, allocate output and workspace.

        The output is contiguous and the same tensor at each call. Raises ValueError where a tensor is not what the
        problem says or its last dimension is not contiguous, or the kernel refuses the problem, and CompileError.
        """
        import torch

        dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        dtype = dtypes[problem.resolve(self.device).dtype]
        tensors = {"q": q, "k": k, "v": v, "out": torch.empty(problem.out_shape, dtype=dtype)}
        for name, tensor in tensors.items():
            # The kernel only gets addresses: a tensor smaller than the problem would be read past its end.
            if tensor.shape != getattr(problem, f"{name}_shape") or tensor.dtype != dtype:
                raise ValueError(f"{name} is {tuple(tensor.shape)} of {tensor.dtype}, not what {problem.case_id} has")
            if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
                raise ValueError(f"the last dimension of {name} must be contiguous: its stride is {tensor.stride(-1)}")

        args = FlashArgs(
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
            dtype=list(dtypes.values()).index(dtype),
            causal=problem.causal,
            threads=torch.get_num_threads(),
        )
        for name, tensor in tensors.items():
            setattr(args, name, tensor.data_ptr())
            setattr(args, f"{name}_stride", tensor.stride()[:3])

        with as_file(files("attnbench_kernels") / "cpu" / "flash_attention.cpp") as source:
            library = jit.compile(source, flags=("-pthread",)).load()
        library.flash_attention_workspace.restype = ctypes.c_int64
        workspace_bytes = library.flash_attention_workspace(ctypes.byref(args))
        if workspace_bytes < 0:
            raise ValueError(f"the kernel refuses {problem.case_id}")
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8)
        args.workspace = workspace.data_ptr()

        kernel, pointer, out = library.flash_attention, ctypes.byref(args), tensors["out"]
        owners = (q, k, v, workspace)  # args holds their addresses, which keep nothing alive

        def attend(_owners: tuple[Tensor, ...] = owners) -> Tensor:
            if status := kernel(pointer):
                raise RuntimeError(f"the kernel refuses its arguments: flash_status {status}")
            return out

        return attend

    def parallel_units(self, problem: Problem) -> int:
        import torch

        tiles = -(-problem.seqlen_q // TILE) * problem.heads_q * problem.batch
        return min(torch.get_num_threads(), tiles)
