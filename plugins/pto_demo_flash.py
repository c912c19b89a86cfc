"""pto_demo_flash: the flash kernel that ships in the user's own PTO library, compiled there. Not yet run on hardware.

Knows that kernel's entry point and its limits, most of which it does not check itself; none of its code is here.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from attnbench import Backend, Problem, hookimpl, jit, settings
from attnbench.problem import DeviceKind
from attnbench_plugins.jit_flash.npu import arch, cores, current_stream, require, synchronize, unknown_arch

if TYPE_CHECKING:
    from torch import Tensor

KERNEL = "demos/torch_jit/flash_atten/fa_kernel.cpp"
HEADERS = ("kernels/manual/a2a3/flash_atten", "kernels/manual/common/flash_atten")
"""Where the kernel's own headers lie in one version or another."""
ROWS, TILE_KEYS, SLOTS = 128, 256, 8
HEAD_DIM = 128
MAX_SEQLEN_Q = 3072
"""Beyond 24 blocks it would read a buffer that its entry point does not give it."""


class PtoDemoFlash(Backend):
    """One head of fp16; a core for each 128 queries. Its output is fp32: the cast to fp16 is in the time."""

    name = "pto_demo_flash"
    device: DeviceKind = "npu"
    summary = "the PTO library's own flash kernel, with a cast (not yet run on hardware)"
    homepage = "https://github.com/hw-native-sys/pto-isa"

    def unavailable(self) -> str | None:
        from attnbench.devices import device

        toolchain = jit.missing(jit.pto_toolchain)
        missing = [device(self.device).unavailable(), toolchain]
        if missing[0] is None and arch() is None:
            missing.append(f"the library is for {jit.PTO_ARCH} and dav-3510, and {unknown_arch()}")
        library = settings.pto_lib_path()
        if library is None and "PTO_LIB_PATH" not in (toolchain or ""):  # CANN has the headers, but not the kernel
            missing.append("PTO_LIB_PATH is not set: it must name a checkout of the PTO library, which has the kernel")
        elif library is not None and not Path(library, KERNEL).is_file():
            missing.append(f"PTO_LIB_PATH has no {KERNEL}: check out a PTO library that has it")
        return "; ".join(filter(None, missing)) or None

    def unsupported(self, problem: Problem) -> str | None:
        dtype = problem.resolve(self.device).dtype
        if problem.direction != "fwd" or problem.window is not None:
            return "forward only, without a window"
        if dtype != "fp16":
            return f"fp16 only, not {dtype}"
        if problem.batch * problem.heads_q > 1:
            return "one batch element and one head"
        if problem.head_dim != HEAD_DIM or problem.head_dim_v != HEAD_DIM:
            return f"head size {HEAD_DIM} only"
        if problem.seqlen_q % ROWS or problem.seqlen_q > MAX_SEQLEN_Q:
            return f"seqlen_q must be a multiple of {ROWS} up to {MAX_SEQLEN_Q}"
        if problem.seqlen_k % TILE_KEYS or problem.seqlen_k < 2 * TILE_KEYS:
            return f"seqlen_k must be a multiple of {TILE_KEYS}, at least {2 * TILE_KEYS}"
        if problem.causal and problem.seqlen_q != problem.seqlen_k:
            return "its causal mask is aligned top-left: only where there are as many queries as keys"
        if not math.isclose(problem.softmax_scale, 1 / math.sqrt(HEAD_DIM), rel_tol=1e-6):
            return f"its scale is 1/√{HEAD_DIM}"
        return None

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        """Compile the kernel, allocate its buffers, and wait for a first launch: it gives no status itself."""
        import torch

        if reason := self.unsupported(problem):
            raise ValueError(reason)
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            require(problem, name, tensor)
        call_kernel = _library().call_kernel
        result = torch.empty(problem.out_shape, dtype=torch.float32, device=q.device)
        out = torch.empty(problem.out_shape, dtype=torch.float16, device=q.device)
        buffers = [
            torch.empty(shape, dtype=getattr(torch, dtype), device=q.device)
            for shape, dtype in buffer_shapes(problem.seqlen_q).values()
        ]
        sizes = (HEAD_DIM, problem.seqlen_q, problem.seqlen_k, problem.causal)
        pointers = [tensor.data_ptr() for tensor in (q, k, v, result, *buffers)]

        def attend(_owners: tuple[object, ...] = (q, k, v, buffers)) -> Tensor:
            call_kernel(current_stream(), *sizes, *pointers)
            return out.copy_(result)

        attend()
        synchronize()
        return attend

    def parallel_units(self, problem: Problem) -> int:
        occupied: int = min(problem.seqlen_q // ROWS, cores())
        return occupied


def buffer_shapes(seqlen_q: int) -> Mapping[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of what the kernel works in, in the order of its arguments."""
    blocks = seqlen_q // ROWS
    slots = SLOTS * blocks
    return {
        "qk_fifo": ((slots, ROWS, TILE_KEYS), "float32"),
        "p_fifo": ((slots, ROWS, TILE_KEYS), "float16"),
        "exp_max_fifo": ((slots, ROWS), "float32"),
        "pv_fifo": ((slots, ROWS, HEAD_DIM), "float32"),
        "global_sum": ((blocks, seqlen_q), "float32"),
        "exp_max": ((blocks, seqlen_q), "float32"),
        "o_parts": ((blocks, seqlen_q, HEAD_DIM), "float32"),
    }


def _library() -> ctypes.CDLL:
    """Raises CompileError, and AttnbenchError where the kernel's source cannot be read."""
    root = os.path.abspath(settings.pto_lib_path() or "")
    flags = [f"-I{os.path.join(root, folder)}" for folder in HEADERS if Path(root, folder).is_dir()]
    toolchain = jit.pto_toolchain(arch())
    library = jit.compile(Path(root, KERNEL), toolchain=toolchain, flags=flags).load()
    library.call_kernel.restype = None
    sizes = (ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_bool)
    library.call_kernel.argtypes = [ctypes.c_void_p, *sizes, *(ctypes.c_void_p for _ in range(11))]
    return library


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [PtoDemoFlash()]
