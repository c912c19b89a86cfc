"""my_flash: the Triton kernel of kernel.py."""

import torch

from attnbench import Backend, hookimpl

MAX_HEAD_DIM = 256
"""A tile of K and one of V must fit into shared memory."""


class MyFlash(Backend):
    name = "my_flash"
    device = "cuda"
    summary = "flash attention in Triton"

    def unavailable(self):
        """Why this machine cannot run it; None where it can."""
        if not torch.cuda.is_available():
            return "torch sees no CUDA device: it takes an NVIDIA GPU and a CUDA build of torch"
        try:
            import triton  # noqa: F401
        except ImportError:
            return "triton is not installed: pip install triton"
        return None

    def unsupported(self, problem):
        """Why it cannot do this problem; None where it can."""
        if problem.direction != "fwd":
            return "forward only"
        if problem.window is not None:
            return "no sliding windows"
        if problem.dtype == "fp32":
            return "the kernel reads fp16 and bf16, not fp32"
        if max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
            return f"no head_dim above {MAX_HEAD_DIM}"
        return None

    def prepare(self, problem, q, k, v):
        """Compile, allocate and lay out here; only the callable that comes back is timed.

        q (batch, heads_q, seqlen_q, head_dim), k (batch, heads_kv, seqlen_k, head_dim) and v (batch, heads_kv,
        seqlen_k, head_dim_v) are contiguous, and hold other values at each call.
        """
        from my_flash.kernel import attention, launch_options  # here, since listing a plugin must not need triton

        out = torch.empty(problem.out_shape, dtype=q.dtype, device=q.device)
        options = launch_options(problem)
        grid = (-(-problem.seqlen_q // options["ROWS"]), problem.batch * problem.heads_q)
        sizes = (problem.heads_q, problem.heads_kv, problem.seqlen_q, problem.seqlen_k)

        def attend():
            attention[grid](
                q, k, v, out, *sizes, problem.head_dim, problem.head_dim_v, problem.softmax_scale, **options
            )
            return out

        attend()  # which compiles it
        return attend


@hookimpl
def attnbench_backends():
    return [MyFlash()]
