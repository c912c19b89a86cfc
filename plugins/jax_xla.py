"""Attention as XLA compiles it for a CPU from three lines of JAX: a product, a softmax, a product.

Knows nothing of how arrays are shared with torch, which jax_arrays does. jax.nn.dot_product_attention is no more than
these lines there, but its products in four dimensions reach XLA transposed; here heads are in the batch. Times with
jaxlib 0.10.2 on one core of an AMD EPYC (AVX2), fp32, head size 128, in ms of that core's time:

    heads × queries × keys      1×128×1024  1×512×2048  1×16×4096  8×128×512  8×1×4096
    here                               1.4        11.1        1.7        6.2       4.9
    dot_product_attention              1.9        14.7        1.6        8.7      33.6

Its sums over the keys are also the less exact: at 16×4096 they are beyond what attnbench allows in fp32. XLA's CPU
client has products of fp16 and bf16 for some shapes alone, no faster than fp32: both are cast, in the call and so in
the time.
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
    summary = "softmax(QKᵀ)V in JAX under jit, by XLA's CPU client"
    homepage = "https://docs.jax.dev"
    libraries = MappingProxyType({"jax": "0.10.2", "jaxlib": "0.10.2"})

    def unavailable(self) -> str | None:
        reason: str | None = missing("jax", "jax") or missing("jaxlib", "jax")
        return reason

    def unsupported(self, problem: Problem) -> str | None:
        return "forward only" if problem.direction != "fwd" else None

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        from torch.utils.dlpack import from_dlpack

        jax = jax_on("cpu")
        seen = folded_visible(problem, q.device)
        tensors = [*(fold(problem, tensor).flatten(0, 1) for tensor in (q, k, v)), *([] if seen is None else [seen])]

        def attend(q: Any, k: Any, v: Any, seen: Any = None) -> Any:
            wide = [array.astype("float32") for array in (q, k, v)]
            scores = wide[0] @ wide[1].swapaxes(1, 2) * problem.softmax_scale
            # Where nothing is seen, this softmax gives zeros.
            return (jax.nn.softmax(scores, where=seen) @ wide[2]).astype(v.dtype)

        jitted, arrays = jax.jit(attend), [view(tensor) for tensor in tensors]

        def call(_owners: list[Tensor] = tensors) -> Tensor:
            output: Tensor = from_dlpack(jitted(*arrays).block_until_ready())
            return output.view(problem.out_shape)

        call()
        return call

    def parallel_units(self, problem: Problem) -> int:
        import torch

        return torch.get_num_threads()


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [JaxXla()]
