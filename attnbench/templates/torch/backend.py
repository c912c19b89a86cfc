"""my_flash: attention in torch. Replace what `prepare` returns by your own."""

import torch

from attnbench import Backend, hookimpl


class MyFlash(Backend):
    name = "my_flash"
    summary = "two matmuls and a softmax, in torch"

    def __init__(self, device="cpu"):
        self.device = device

    def unavailable(self):
        """Why this machine cannot run it; None where it can."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "torch sees no CUDA device: it takes an NVIDIA GPU and a CUDA build of torch"
        if self.device == "npu":
            try:
                import torch_npu  # noqa: F401
            except ImportError:
                return "torch_npu is not installed: on an Ascend machine, pip install torch-npu"
        return None

    def unsupported(self, problem):
        """Why it cannot do this problem; None where it can."""
        if problem.direction != "fwd":
            return "forward only"
        if problem.window is not None:
            return "no sliding windows"
        return None

    def prepare(self, problem, q, k, v):
        """Compile, allocate and lay out here; only the callable that comes back is timed.

        q (batch, heads_q, seqlen_q, head_dim), k (batch, heads_kv, seqlen_k, head_dim) and v (batch, heads_kv,
        seqlen_k, head_dim_v) are contiguous, and hold other values at each call.
        """
        group = problem.heads_q // problem.heads_kv
        hidden = None
        if problem.causal:  # aligned bottom-right: the last query sees every key
            visible = torch.ones(problem.seqlen_q, problem.seqlen_k, dtype=torch.bool, device=q.device)
            hidden = ~visible.tril(problem.seqlen_k - problem.seqlen_q)

        def attend():
            keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            scores = q @ keys.transpose(-1, -2) * problem.softmax_scale
            if hidden is not None:
                scores = scores.masked_fill(hidden, -torch.inf)
            weights = torch.softmax(scores, dim=-1)
            if hidden is not None:
                weights = weights.masked_fill(hidden, 0.0)  # a query that sees no key gives zeros
            return weights @ values

        return attend


@hookimpl
def attnbench_backends():
    return [MyFlash("cpu"), MyFlash("cuda"), MyFlash("npu")]
