"""JAX's dot_product_attention by cuDNN on a GPU, as XLA calls it.

Knows nothing of streams and memory, which jax_arrays does. The limits are those of JAX's own checks
(fused_attention_stablehlo.py), read in 0.11.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind
from attnbench_plugins.folding import folded_visible
from attnbench_plugins.jax_arrays import in_groups, in_one_head, jax_on, no_jax_on_a_gpu, on_torchs_stream, view
from attnbench_plugins.packages import HOPPER, capability

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEAD_DIM, MAX_HEAD_DIM_OF_HOPPER = 128, 256
HEAD_DIM_MULTIPLE = 8
MASKED = -(2.0**15)
"""Added to what is not seen, which cuDNN wants to be finite; JAX adds as much in fp16."""


class JaxCudnn(Backend):
    """Forward attention by one jitted call of cuDNN."""

    name = "jax_cudnn"
    device: DeviceKind = "cuda"
    summary = 'jax.nn.dot_product_attention(implementation="cudnn") under jit'
    homepage = "https://docs.jax.dev/en/latest/_autosummary/jax.nn.dot_product_attention.html"
    libraries = MappingProxyType({"jax": "0.11.2", "jaxlib": "0.11.2"})

    def unavailable(self) -> str | None:
        reason: str | None = no_jax_on_a_gpu()
        return reason

    def unsupported(self, problem: Problem) -> str | None:
        if problem.direction != "fwd":
            return "forward only"
        if problem.head_dim != problem.head_dim_v:
            return "one head size for q, k and v"
        if problem.visible_rows < problem.seqlen_q:
            return "JAX gives a query that sees no key other values than zeros"
        if problem.dtype == "fp32":
            return "fp16 and bf16 only"
        most = MAX_HEAD_DIM_OF_HOPPER if capability() >= HOPPER else MAX_HEAD_DIM
        if problem.head_dim > most or problem.head_dim % HEAD_DIM_MULTIPLE:
            return f"head sizes must be multiples of {HEAD_DIM_MULTIPLE} up to {most}"
        return None

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        import torch

        jax = jax_on("cuda")
        # cuDNN's causal mask and window, aligned top-left, which skip what they hide; any other mask is added.
        own = problem.causal and problem.seqlen_q == problem.seqlen_k
        # Folded queries have no such order: those of grouped heads are laid out as JAX wants them, in the call.
        apart = own and problem.heads_q != problem.heads_kv
        window = (problem.window - 1, 0) if own and problem.window is not None else None
        seen = None if own else folded_visible(problem, q.device)
        others = [view(in_one_head(problem, tensor)) for tensor in (k, v)]
        if seen is not None:
            others.append(view(torch.zeros_like(seen, dtype=q.dtype).masked_fill_(~seen, MASKED)[None, None]))

        def attend(q: Any, k: Any, v: Any, bias: Any = None) -> Any:
            out = jax.nn.dot_product_attention(
                q.swapaxes(1, 2) if apart else q,
                k,
                v,
                bias=bias,
                scale=problem.softmax_scale,
                is_causal=own,
                local_window_size=window,
                implementation="cudnn",
            )
            return out.swapaxes(1, 2) if apart else out

        queries = in_groups(problem, q) if apart else in_one_head(problem, q)
        call = on_torchs_stream(jax.jit(attend), queries, *others)
        call()
        return lambda: call().view(problem.out_shape)


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [JaxCudnn()]
