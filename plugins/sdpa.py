"""torch's scaled_dot_product_attention, which picks a fused kernel by itself. The default baseline on cpu and cuda."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind
from attnbench_plugins.masks import added, hides

if TYPE_CHECKING:
    from torch import Tensor


class Sdpa(Backend):
    """torch.nn.functional.scaled_dot_product_attention."""

    name = "sdpa"
    summary = "torch.nn.functional.scaled_dot_product_attention"
    homepage = "https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html"

    def __init__(self, device: DeviceKind) -> None:
        self.device = device

    def unavailable(self) -> str | None:
        from attnbench.devices import device

        return device(self.device).unavailable()

    def unsupported(self, problem: Problem) -> str | None:
        if problem.direction != "fwd":
            return "forward only"
        if self.device == "cuda" and problem.visible_rows < problem.seqlen_q:
            return "torch's CUDA kernels give a query that sees no key other values than zeros"
        return None

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        return attending(problem, q, k, v, self._mask)

    def _mask(self, problem: Problem, q: Tensor) -> Tensor | None:
        # The flash kernel has a mask aligned bottom-right on a GPU. On a CPU its mask would be built at each call, and
        # its module alone takes a second to import.
        return bottom_right(problem, q, own=self.device == "cuda" and problem.seqlen_q < problem.seqlen_k)

    def parallel_units(self, problem: Problem) -> int | None:
        if self.device != "cpu":
            return None
        import torch

        return torch.get_num_threads()


def attending(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, mask_of: Callable[[Problem, Tensor], Tensor | None]
) -> Callable[[], Tensor]:
    """The call of scaled_dot_product_attention. `mask_of` gives the mask where there is one and is_causal is not it."""
    from torch.nn.functional import scaled_dot_product_attention

    # torch's is_causal is aligned top-left, which is the same only for as many queries as keys.
    square = problem.causal and problem.window is None and problem.seqlen_q == problem.seqlen_k
    mask = mask_of(problem, q) if hides(problem) and not square else None
    scale, grouped = problem.softmax_scale, problem.heads_q != problem.heads_kv

    def call() -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=square, scale=scale, enable_gqa=grouped)

    return call


def bottom_right(problem: Problem, q: Tensor, *, own: bool) -> Tensor | None:
    """The mask of a problem that has one: with `own`, torch's for a kernel that has a bottom-right causal mask itself.

    Otherwise it is one to be added, since torch makes one of a mask of booleans, and of its own, at each call.
    """
    mask: Tensor | None
    if own and problem.causal and problem.window is None:
        from torch.nn.attention.bias import causal_lower_right

        mask = causal_lower_right(problem.seqlen_q, problem.seqlen_k)
    else:
        mask = added(problem, q)
    return mask


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [Sdpa("cpu"), Sdpa("cuda")]
