"""my_flash: the PTO kernel of attention.cpp, compiled for an Ascend 910B when it is first needed."""

import ctypes
from pathlib import Path

import torch

from attnbench import Backend, hookimpl, jit

KERNEL = Path(__file__).with_name("attention.cpp")
KEYS, MAX_KEYS = 64, 8192
"""As in the kernel."""
BLOCKS = 24
"""Cores of an Ascend 910B2, two vector cores in each."""


class MyFlash(Backend):
    name = "my_flash"
    device = "npu"
    summary = "attention.cpp in PTO, JIT-compiled"
    sources = (str(KERNEL),)

    def unavailable(self):
        """Why this machine cannot run it; None where it can."""
        try:
            import torch_npu  # noqa: F401
        except ImportError:
            return "torch_npu is not installed: on an Ascend machine, pip install torch-npu"
        if not torch.npu.is_available():
            return "torch_npu sees no NPU: npu-smi info tells what the driver sees"
        return jit.missing(jit.pto_toolchain)

    def unsupported(self, problem):
        """Why it cannot do this problem; None where it can."""
        if problem.direction != "fwd":
            return "forward only"
        if problem.causal or problem.window is not None:
            return "no masks"
        if problem.dtype != "fp16":
            return f"the kernel reads fp16, not {problem.dtype}"
        if problem.head_dim not in (64, 128) or problem.head_dim_v != problem.head_dim:
            return "head_dim 64 and 128 alone, of Q, K and V alike"
        if problem.seqlen_k % KEYS or problem.seqlen_k > MAX_KEYS:
            return f"seqlen_k must be a multiple of {KEYS}, at most {MAX_KEYS}"
        return None

    def prepare(self, problem, q, k, v):
        """Compile, allocate and lay out here; only the callable that comes back is timed.

        q (batch, heads_q, seqlen_q, head_dim), k (batch, heads_kv, seqlen_k, head_dim) and v (batch, heads_kv,
        seqlen_k, head_dim_v) are contiguous, and hold other values at each call.
        """
        launch = jit.compile(KERNEL, toolchain=jit.pto_toolchain()).load().launch
        sizes = (problem.batch * problem.heads_q * problem.seqlen_q, problem.heads_q, problem.heads_kv)
        sizes += (problem.seqlen_q, problem.seqlen_k, problem.head_dim)
        out = torch.empty(problem.out_shape, dtype=q.dtype, device=q.device)
        arguments = (
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (q, k, v, out)),
            *map(ctypes.c_int, sizes),
            ctypes.c_float(problem.softmax_scale),
            ctypes.c_int(BLOCKS),
        )

        def attend(_alive=(q, k, v)):  # the kernel has their addresses, which keep nothing alive
            stream = torch.npu.current_stream().npu_stream
            if launch(*arguments, ctypes.c_void_p(stream)):
                raise RuntimeError("the kernel refuses its arguments")
            return out

        return attend


@hookimpl
def attnbench_backends():
    return [MyFlash()]
