"""my_flash: the kernel of attention.cu, compiled for this machine's GPU when it is first needed."""

import ctypes
from pathlib import Path

import torch

from attnbench import Backend, hookimpl, jit

KERNEL = Path(__file__).with_name("attention.cu")
DTYPES = ("fp32", "fp16", "bf16")
"""In the order of the kernel's numbers for them."""
MAX_HEAD_DIM = 256
"""As in the kernel."""


class MyFlash(Backend):
    name = "my_flash"
    device = "cuda"
    summary = "attention.cu, JIT-compiled"
    sources = (str(KERNEL),)

    def unavailable(self):
        """Why this machine cannot run it; None where it can."""
        return jit.missing(jit.cuda_toolchain)

    def unsupported(self, problem):
        """Why it cannot do this problem; None where it can."""
        if problem.direction != "fwd":
            return "forward only"
        if problem.window is not None:
            return "no sliding windows"
        if max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
            return f"no head_dim above {MAX_HEAD_DIM}"
        return None

    def prepare(self, problem, q, k, v):
        """Compile, allocate and lay out here; only the callable that comes back is timed.

        q (batch, heads_q, seqlen_q, head_dim), k (batch, heads_kv, seqlen_k, head_dim) and v (batch, heads_kv,
        seqlen_k, head_dim_v) are contiguous, and hold other values at each call.
        """
        launch = jit.compile(KERNEL, toolchain=jit.cuda_toolchain()).load().launch
        sizes = (problem.batch, problem.heads_q, problem.heads_kv, problem.seqlen_q, problem.seqlen_k)
        sizes += (problem.head_dim, problem.head_dim_v, problem.causal, DTYPES.index(problem.dtype))
        out = torch.empty(problem.out_shape, dtype=q.dtype, device=q.device)
        arguments = (
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (q, k, v, out)),
            *map(ctypes.c_int, sizes),
            ctypes.c_float(problem.softmax_scale),
        )

        def attend(_alive=(q, k, v)):  # the kernel has their addresses, which keep nothing alive
            stream = torch.cuda.current_stream().cuda_stream
            if status := launch(*arguments, ctypes.c_void_p(stream)):
                raise RuntimeError(f"the kernel was not launched: cudaError {status}")
            return out

        return attend


@hookimpl
def attnbench_backends():
    return [MyFlash()]
