"""my_flash: the kernel of attention.cpp, compiled for this machine when it is first needed."""

import ctypes
from pathlib import Path

import torch

from attnbench import Backend, hookimpl, jit

KERNEL = Path(__file__).with_name("attention.cpp")


class MyFlash(Backend):
    name = "my_flash"
    device = "cpu"
    summary = "attention.cpp, JIT-compiled"
    sources = (str(KERNEL),)

    def unavailable(self):
        """Why this machine cannot run it; None where it can."""
        return jit.missing(jit.cpp_toolchain)

    def unsupported(self, problem):
        """Why it cannot do this problem; None where it can."""
        if problem.direction != "fwd":
            return "forward only"
        if problem.window is not None:
            return "no sliding windows"
        if problem.dtype != "fp32":
            return f"the kernel reads fp32, not {problem.dtype}"
        return None

    def prepare(self, problem, q, k, v):
        """Compile, allocate and lay out here; only the callable that comes back is timed.

        q (batch, heads_q, seqlen_q, head_dim), k (batch, heads_kv, seqlen_k, head_dim) and v (batch, heads_kv,
        seqlen_k, head_dim_v) are contiguous, and hold other values at each call.
        """
        kernel = jit.compile(KERNEL, flags=("-fopenmp",)).load().attention
        kernel.restype = None
        sizes = (problem.batch, problem.heads_q, problem.heads_kv, problem.seqlen_q, problem.seqlen_k)
        sizes += (problem.head_dim, problem.head_dim_v, problem.causal, torch.get_num_threads())
        out = torch.empty(problem.out_shape)
        arguments = (
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (q, k, v, out)),
            *map(ctypes.c_int64, sizes),
            ctypes.c_float(problem.softmax_scale),
        )

        def attend(_alive=(q, k, v)):  # the kernel has their addresses, which keep nothing alive
            kernel(*arguments)
            return out

        return attend

    def parallel_units(self, problem):
        """How many of the device's cores the problem occupies."""
        return min(torch.get_num_threads(), problem.batch * problem.heads_q * problem.seqlen_q)


@hookimpl
def attnbench_backends():
    return [MyFlash()]
