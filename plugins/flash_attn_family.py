"""What the plugins of the flash-attn family share: how its functions are asked, and in how many parts keys are split.

Knows no version of it. All of them take (batch, seqlen, heads, dim) with any strides but the last's, align masks
bottom-right, and give zeros to a query that sees no key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from attnbench import Problem
from attnbench.registry import installed_version
from attnbench_plugins.fastest import fastest
from attnbench_plugins.masks import window_size

if TYPE_CHECKING:
    from torch import Tensor

Options = Mapping[str, Any]

HOMEPAGE = "https://github.com/Dao-AILab/flash-attention"
MAX_HEAD_DIM = 256
"""Of FlashAttention-2."""
HEAD_DIM_MULTIPLE = 8
"""Rows are loaded 16 bytes at once, in fp16 and bf16."""
TILE = 128
"""Of queries and of keys, about: what the kernels take for head size 128."""
MOST_SPLITS = 128
WAVES = 2
"""More parts than twice the cores hold only add to what is combined afterwards."""


def not_installed(distribution: str) -> str | None:
    """That it is not installed, with the extra of attnbench of the same name; None where it is.

    Modules do not tell: flash-attn and flash-attn-4 both have a folder flash_attn, and flash_attn.cute in it.
    """
    if installed_version(distribution):
        return None
    return f"{distribution} is not installed: pip install 'attnbench[{distribution}]'"


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


def lost_window(problem: Problem) -> str | None:
    """That FlashAttention-2 would drop the window: it does on a side that reaches as far as there are keys.

    That is right of keys before a query's position. After it, the queries that stand before the first key by more than
    the window see none.
    """
    lost = problem.window is not None and not problem.causal and problem.seqlen_k < problem.window < problem.seqlen_q
    return "a window of more than seqlen_k keys to both sides, which FlashAttention-2 drops" if lost else None


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


def is_blackwell() -> bool:
    """Whether the GPU is a later one than Hopper."""
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (10, 0)


def cores(tensor: Tensor) -> int:
    """How many cores the tensor's device has."""
    from attnbench.devices import device

    return device("cuda" if tensor.is_cuda else "cpu").info().cores or 1


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
