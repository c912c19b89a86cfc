"""What the plugins of the flash-attn family share: how its functions are asked, and in how many parts keys are split.

Knows no version of it. All of them take (batch, seqlen, heads, dim) with any strides but the last's, align masks
bottom-right, and give zeros to a query that sees no key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from attnbench import Problem
from attnbench_plugins.fastest import fastest
from attnbench_plugins.masks import window_size
from attnbench_plugins.packages import HOPPER, capability
from attnbench_plugins.sdpa_kernels import odd_head_dim

if TYPE_CHECKING:
    from torch import Tensor

Options = Mapping[str, Any]

HOMEPAGE = "https://github.com/Dao-AILab/flash-attention"
MAX_HEAD_DIM = 256
"""Of FlashAttention-2 and -3."""
HEAD_DIM_MULTIPLE = 8
"""Rows are loaded 16 bytes at once, in fp16 and bf16."""
TILE = 128
"""Of queries and of keys, about: what the kernels take for head size 128."""
MOST_SPLITS = 128
"""FlashAttention-2 has no kernel that combines more."""
WAVES = 2
"""Tiles for each core, up to which splits are tried. Not measured: one fills the cores, a second evens them out."""


def masking(problem: Problem) -> dict[str, Any]:
    """A problem's scale and mask as the functions of the family name them."""
    found: dict[str, Any] = {"softmax_scale": problem.softmax_scale, "causal": problem.causal}
    # Without a window the flag alone: some of them take any pair for a window, (-1, 0) too.
    return found if problem.window is None else found | {"window_size": window_size(problem)}


def no_flash_attn_2(problem: Problem) -> str | None:
    """Why FlashAttention-2 cannot do a problem, whoever brings it and whatever its mask."""
    if problem.direction != "fwd":
        return "forward only"
    if problem.dtype == "fp32":
        return "fp16 and bf16 only"
    if problem.head_dim != problem.head_dim_v:
        return "one head size for q, k and v"
    return f"head sizes up to {MAX_HEAD_DIM}" if problem.head_dim > MAX_HEAD_DIM else None


def no_flash_attn_3(problem: Problem) -> str | None:
    """Why FlashAttention-3 cannot do a problem, whoever brings it and with all that it can be built with."""
    if problem.direction != "fwd":
        return "forward only"
    if problem.dtype == "fp32":
        return "fp16 and bf16 only"
    if problem.head_dim > MAX_HEAD_DIM:
        return f"head sizes up to {MAX_HEAD_DIM}"
    odd: str | None = odd_head_dim(problem, HEAD_DIM_MULTIPLE)
    return odd or no_pair(problem.head_dim, problem.head_dim_v)


def no_pair(d: int, e: int) -> str | None:
    """Why FlashAttention-3 does not take values of size e with keys of size d."""
    if d == e:
        return None
    if capability() < HOPPER:
        return "values of another size than keys only on Hopper"
    if (d <= 64 and e <= 512) or (128 < d <= 192 and 96 < e <= 128):
        return None
    return "values of another size than keys only for head sizes up to 64×512, or of 136–192×104–128"


def lost_window(problem: Problem) -> str | None:
    """That FlashAttention-2 would drop the window: it does on a side that reaches as far as there are keys.

    That is right of keys before a query's position. After it, the queries that stand before the first key by more than
    the window see none.
    """
    lost = problem.window is not None and not problem.causal and problem.seqlen_k < problem.window < problem.seqlen_q
    return "a window of more than seqlen_k keys to both sides, which the library drops" if lost else None


def split_counts(problem: Problem, cores: int) -> list[int]:
    """In how many parts it may pay to split the keys: 0, the library's own choice, 1, and what could fill the cores."""
    rows = problem.seqlen_q * problem.heads_q // problem.heads_kv  # as where the heads of a group are packed
    tiles = problem.batch * problem.heads_kv * -(-rows // TILE)
    keys = problem.seqlen_k
    if problem.window is not None:
        keys = min(keys, 2 * problem.window + TILE)
    most = min(MOST_SPLITS, -(-keys // TILE), WAVES * cores // tiles)
    counts = {1, *(2**power for power in range(1, 8)), cores // tiles, most}
    return [0, *sorted(count for count in counts if count == 1 or 1 < count <= most)]


def attending(
    attend: Callable[..., Any], choices: Iterable[Options], problem: Problem, q: Tensor, k: Tensor, v: Tensor
) -> Callable[[], Tensor]:
    """The call of such a function on BHSD tensors with whichever of the choices is fastest; it copies no input."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    mask = masking(problem)

    def calling(choice: Options) -> Callable[[], Tensor]:
        def call() -> Tensor:
            found = attend(q, k, v, **mask, **choice)
            output: Tensor = found[0] if isinstance(found, tuple) else found  # some give the log-sum-exp as well
            return output.transpose(1, 2)

        return call

    chosen: Callable[[], Tensor] = fastest([calling(choice) for choice in choices])
    return chosen
