"""JAX's dot_product_attention as XLA compiles it for a CPU: products, a softmax, no flash attention.

Knows nothing of how arrays are shared with torch, which jax_arrays does. XLA's CPU client does not have the products of
fp16 that JAX asks for, and those of bf16 for some shapes alone, no faster than fp32: both are cast, in the call and so
in the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind
from attnbench_plugins.folding import fold, folded_visible
from attnbench_plugins.jax_arrays import jax_on, view
from attnbench_plugins.packages import missing

if TYPE_CHECKING:
    from torch import Tensor


class JaxXla(Backend):
    """Forward attention by one jitted call; every key head is an element of the batch, with its queries in one head."""

    name = "jax_xla"
    device: DeviceKind = "cpu"
    summary = "jax.nn.dot_product_attention under jit (XLA's CPU client)"
    homepage = "https://docs.jax.dev/en/latest/_autosummary/jax.nn.dot_product_attention.html"
    libraries = MappingProxyType({"jax": "0.10.2", "jaxlib": "0.10.2"})

    def unavailable(self) -> str | None:
        reason: str | None = missing("jax", "jax") or missing("jaxlib", "jax")
        return reason

    def unsupported(self, problem: Problem) -> str | None:
        return refusal(problem)

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        from torch.utils.dlpack import from_dlpack

        jax = jax_on("cpu")
        arrays = [view(in_one_head(problem, tensor)) for tensor in (q, k, v)]
        # Its causal mask is aligned top-left, and folded queries have no such order.
        square = problem.seqlen_q == problem.seqlen_k and problem.heads_q == problem.heads_kv
        causal = problem.causal and square and problem.window is None
        mask = None if causal else folded_visible(problem, q.device)
        if mask is not None:
            arrays.append(view(mask[None, None]))

        def attend(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
            own = [x.astype("float32") for x in (q, k, v)]
            out = jax.nn.dot_product_attention(
                *own, mask=mask, scale=problem.softmax_scale, is_causal=causal, implementation="xla"
            )
            return out.astype(q.dtype)

        jitted = jax.jit(attend)

        def call(_owners: tuple[Tensor | None, ...] = (q, k, v, mask)) -> Tensor:
            output: Tensor = from_dlpack(jitted(*arrays).block_until_ready())
            return output.view(problem.out_shape)

        call()
        return call

    def parallel_units(self, problem: Problem) -> int:
        import torch

        return torch.get_num_threads()


def refusal(problem: Problem) -> str | None:
    """Why jax.nn.dot_product_attention cannot do a problem, whatever implements it."""
    if problem.direction != "fwd":
        return "forward only"
    if problem.head_dim != problem.head_dim_v:
        return "one head size for q, k and v"
    if problem.visible_rows < problem.seqlen_q:
        return "JAX gives a query that sees no key other values than zeros"
    return None


def in_one_head(problem: Problem, tensor: Tensor) -> Tensor:
    """A view as JAX wants it, (batch, length, heads, dim), with all queries of a key head in one."""
    folded: Tensor = fold(problem, tensor)
    return folded.flatten(0, 1).unsqueeze(2)


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [JaxXla()]
