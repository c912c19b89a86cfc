"""The attention kernels that JAX brings in its language Pallas for GPUs. Knows nothing of streams and memory.

Three of them, under jax.experimental.pallas.ops.gpu, read in 0.11.2:

    attention_mgpu     FlashAttention-3 for Hopper: fp16 (its tiles in shared memory are), no scale, grouped heads
    attention          FlashAttention-2 through Triton: any scale, no grouped heads
    decode_attention   one query, the keys split among blocks, through Triton

A kernel's tile sizes are its user's to choose: `prepare` times a few, and keeps the fastest.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind
from attnbench_plugins.jax_arrays import (
    fastest_looped,
    in_groups,
    in_one_head,
    jax_on,
    no_jax_on_a_gpu,
    on_torchs_stream,
    view,
)
from attnbench_plugins.packages import AFTER_HOPPER, HOPPER, capability, cores, missing

if TYPE_CHECKING:
    from torch import Tensor

Tiles = tuple[int, ...]

HOPPER_HEAD_DIM_MULTIPLE = 64
HOPPER_TILES: tuple[Tiles, ...] = ((64, 128, 2), (64, 128, 4), (128, 64, 2), (128, 64, 4), (64, 64, 2), (64, 64, 4))
"""Queries of each of the two warpgroups, keys, and how many tiles of keys are on the way at once. JAX's own tests have
these sizes; larger ones do not fit into a thread's registers."""
SHARED_BYTES = 227 << 10
TRITON_TILES: tuple[Tiles, ...] = ((128, 128, 8), (128, 64, 8), (64, 64, 4), (64, 32, 4), (32, 32, 4), (16, 16, 4))
"""Queries, keys, warps, the largest first: which of them compile depends on the head size and the GPU."""
MOST_TRITON_TILES = 3
"""Of those that compile. Not measured: each takes seconds to compile, and the smaller a tile, the more it reads."""
SPLITS = (128, 64, 32, 16, 8, 4, 2, 1)
"""Into how many parts decode_attention may split the keys."""
SPLIT_TILES = (128, 64, 32, 16)
MOST_SPLITS = 4
WAVES = 2
"""How many splits are tried, and how many parts for each core at most. Neither was measured: see flash_attn_family."""
LEAST_TILE = 16
"""What Triton's products of matrices need."""


class JaxPallas(Backend):
    """Forward attention by one jitted call of the kernel that takes the problem."""

    name = "jax_pallas"
    device: DeviceKind = "cuda"
    summary = "JAX's Pallas kernels: FlashAttention-3 for Hopper, else those through Triton"
    homepage = "https://docs.jax.dev/en/latest/pallas/gpu/index.html"
    libraries = MappingProxyType({"jax": "0.11.2", "jaxlib": "0.11.2"})

    def unavailable(self) -> str | None:
        # JAX's kernel for Hopper imports its test utilities, which import absl.
        reason: str | None = no_jax_on_a_gpu() or missing("absl", "jax-cuda")
        return reason

    def unsupported(self, problem: Problem) -> str | None:
        if problem.direction != "fwd":
            return "forward only"
        if problem.dtype == "fp32":
            return "fp16 and bf16 only: through Triton fp32 is multiplied as TF32"
        if problem.head_dim != problem.head_dim_v:
            return "one head size for q, k and v"
        if problem.head_dim < LEAST_TILE:
            return f"head sizes of at least {LEAST_TILE}"
        if problem.window is not None:
            return "no mask but a causal one"
        if problem.seqlen_q == 1:
            few = f"one query: head sizes of a power of 2, and keys of multiples of {LEAST_TILE}"
            return None if splits(problem, cores=1) else few
        if problem.causal and problem.seqlen_q != problem.seqlen_k:
            return "its causal mask is aligned top-left"
        if hopper_tiles(problem) or triton_tiles(problem):
            return None
        if problem.causal and problem.heads_q != problem.heads_kv:
            return "causal grouped heads: fp16 on Hopper, lengths of multiples of 128, head sizes of multiples of 64"
        return f"lengths must be multiples of {LEAST_TILE}"

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        jax_on("cuda")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # JAX means to move the Triton kernels elsewhere
            if problem.seqlen_q == 1:
                candidates = _decoding(problem, cores(q))
                most = len(candidates)
            else:  # JAX refuses Hopper's kernel causal with CUDA 12.8 to 12.9.0: then there is the other
                candidates = _on_hopper(problem)
                most = len(candidates) + MOST_TRITON_TILES
                candidates += _through_triton(problem)
        queries = in_groups(problem, q) if ordered(problem) else in_one_head(problem, q)
        others = [view(in_one_head(problem, tensor)) for tensor in (k, v)]
        call = on_torchs_stream(fastest_looped(candidates, view(queries), *others, most=most), queries, *others)
        call()
        return lambda: call().view(problem.out_shape)


def ordered(problem: Problem) -> bool:
    """Whether the queries of grouped heads must stay apart: under a causal mask, folded ones have no order."""
    return problem.causal and problem.seqlen_q > 1 and problem.heads_q != problem.heads_kv


def rows(problem: Problem) -> int:
    """How many queries a head has as the kernel sees it."""
    return problem.seqlen_q if ordered(problem) else problem.seqlen_q * problem.heads_q // problem.heads_kv


def hopper_tiles(problem: Problem) -> list[Tiles]:
    """The tiles with which FlashAttention-3 takes a problem on this GPU."""
    if not HOPPER <= capability() < AFTER_HOPPER or problem.dtype != "fp16":
        return []
    if problem.head_dim % HOPPER_HEAD_DIM_MULTIPLE:
        return []
    return [
        (queries, keys, steps)
        for queries, keys, steps in HOPPER_TILES
        if rows(problem) % (2 * queries) == 0
        and problem.seqlen_k % keys == 0
        and problem.seqlen_k >= steps * keys
        and (2 * queries + 2 * steps * keys) * problem.head_dim * 2 <= SHARED_BYTES
    ]


def triton_tiles(problem: Problem) -> list[Tiles]:
    """The tiles with which FlashAttention-2 takes a problem, the largest first."""
    if ordered(problem):
        return []
    return [t for t in TRITON_TILES if rows(problem) % t[0] == 0 and problem.seqlen_k % t[1] == 0]


def splits(problem: Problem, cores: int) -> list[Tiles]:
    """Into how many parts the keys may be split for one query, and the tile of each: what fills the cores, and 1."""
    if problem.head_dim & (problem.head_dim - 1):
        return []
    most = max(1, WAVES * cores // (problem.batch * problem.heads_kv))
    found: list[Tiles] = []
    for parts in (parts for parts in SPLITS if parts <= most):
        length, rest = divmod(problem.seqlen_k, parts)
        tile = next((tile for tile in SPLIT_TILES if length % tile == 0), None)
        if rest == 0 and length > 0 and tile is not None:
            found.append((parts, tile))
    return found if len(found) <= MOST_SPLITS else [*found[: MOST_SPLITS - 1], found[-1]]


def _on_hopper(problem: Problem) -> list[Callable[..., Any]]:
    if not hopper_tiles(problem):
        return []
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    apart = ordered(problem)

    def attend(q: Any, k: Any, v: Any, *, tiles: Tiles) -> Any:
        queries, keys, steps = tiles
        config = attention_mgpu.TuningConfig(
            block_q=queries, block_kv=keys, max_concurrent_steps=steps, causal=problem.causal
        )
        scaled = (q.astype("float32") * problem.softmax_scale).astype(q.dtype)
        out = attention_mgpu.attention(scaled.swapaxes(1, 2) if apart else scaled, k, v, config)
        return out.swapaxes(1, 2) if apart else out

    return [functools.partial(attend, tiles=tiles) for tiles in hopper_tiles(problem)]


def _through_triton(problem: Problem) -> list[Callable[..., Any]]:
    if not triton_tiles(problem):
        return []
    from jax.experimental.pallas.ops.gpu import attention

    def attend(q: Any, k: Any, v: Any, *, tiles: Tiles) -> Any:
        queries, keys, warps = tiles
        return attention.mha(
            q,
            k,
            v,
            segment_ids=None,
            sm_scale=problem.softmax_scale,
            causal=problem.causal,
            block_sizes=attention.BlockSizes(block_q=queries, block_k=keys),
            num_warps=warps,
        )

    return [functools.partial(attend, tiles=tiles) for tiles in triton_tiles(problem)]


def _decoding(problem: Problem, cores: int) -> list[Callable[..., Any]]:
    from jax.experimental.pallas.ops.gpu import decode_attention

    def attend(q: Any, k: Any, v: Any, *, tiles: Tiles) -> Any:
        parts, tile = tiles
        one = [array.squeeze(2) for array in (q, k, v)]
        out = decode_attention.mqa(*one, sm_scale=problem.softmax_scale, k_splits=parts, block_k=tile)
        return out.astype(q.dtype)[:, :, None]

    return [functools.partial(attend, tiles=tiles) for tiles in splits(problem, cores)]


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [JaxPallas()]
