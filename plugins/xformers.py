"""xFormers' memory_efficient_attention with the fastest of its operators. Knows nothing of their kernels.

FlashAttention-3 (compiled into 0.0.34, or flash-attn-3), FlashAttention-2 (flash-attn, or torch's), torch's CUTLASS
kernel and xFormers' own split-K kernel in Triton. Each operator says itself what it cannot do, and is left out then;
what is refused here none of these four can. Two are not tried: flash3.FwOp_KVSplit splits keys for biases of batches in
one row alone, and cutlass_blackwell takes no scale.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind
from attnbench.registry import installed_version
from attnbench_plugins.fastest import fastest
from attnbench_plugins.flash_attn_family import lost_window, no_flash_attn_3
from attnbench_plugins.masks import hides, window_size
from attnbench_plugins.packages import AFTER_HOPPER, HOPPER, capability, missing, no_gpu
from attnbench_plugins.sdpa_kernels import odd_head_dim

if TYPE_CHECKING:
    from torch import Tensor

FLASH_MAX_HEAD_DIM = 256
FLASH3_MIN_HEAD_DIM = 32
MAX_HEAD_DIM = 65536
MOST_SPLIT_ROWS = 256
"""Of queries: beyond that the split-K kernel, whose tiles have 32 of them, is not tried. Where it stops paying was not
measured."""


class XFormers(Backend):
    """memory_efficient_attention_forward, grouped heads as BMGHK views, masks as its own classes of bias."""

    name = "xformers"
    device: DeviceKind = "cuda"
    summary = "memory_efficient_attention with the fastest of its operators (xFormers)"
    homepage = "https://facebookresearch.github.io/xformers/"
    libraries = MappingProxyType({"xformers": "0.0.34"})

    def unavailable(self) -> str | None:
        reason: str | None = (
            no_gpu((8, 0)) or missing("xformers", "xformers") or _misplaced_flash_attn() or _other_cuda()
        )
        return reason

    def unsupported(self, problem: Problem) -> str | None:
        if problem.direction != "fwd":
            return "forward only"
        odd: str | None = odd_head_dim(problem, 4 if problem.dtype == "fp32" else 8)
        if odd:
            return odd
        if max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
            return f"head sizes up to {MAX_HEAD_DIM}"
        if operators(problem):
            return None
        lost: str | None = lost_window(problem)
        if lost:
            return lost
        what = "on Blackwell"
        if capability() < AFTER_HOPPER:
            what = "a query that sees no key" if problem.causal else "a window that is not causal"
        return f"{what} only in fp16 and bf16, for one head size up to {FLASH_MAX_HEAD_DIM}"

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        from xformers.ops import fmha

        tensors, bias, scale = layout(problem, q, k, v), attn_bias(problem), problem.softmax_scale
        shape = (problem.batch, problem.seqlen_q, problem.heads_q, problem.head_dim_v)

        def calling(operator: Any) -> Callable[[], Tensor]:
            def call() -> Tensor:
                output: Tensor = fmha.memory_efficient_attention_forward(*tensors, bias, scale=scale, op=operator)
                return output.reshape(shape).transpose(1, 2)

            return call

        chosen: Callable[[], Tensor] = fastest([calling(getattr(fmha, name).FwOp) for name in operators(problem)])
        return chosen


def operators(problem: Problem) -> list[str]:
    """The modules of xformers.ops.fmha whose operator is right for a problem, where it takes it."""
    half, same = problem.dtype != "fp32", problem.head_dim == problem.head_dim_v <= FLASH_MAX_HEAD_DIM
    flash = half and same and not lost_window(problem)
    # Before Hopper it is one more of those that take a problem: whether a build has it there was not looked up.
    found = ["flash3"] if (flash or capability() >= HOPPER) and _fits_flash3(problem) else []
    if flash:
        found += ["flash"]
        if not hides(problem) and problem.seqlen_q <= MOST_SPLIT_ROWS:
            found += ["triton_splitk"]
    return found + (["cutlass"] if _fits_cutlass(problem) else [])


def _fits_flash3(problem: Problem) -> bool:
    """FlashAttention-3 has all masks and drops no window: where it is there, it may be the only one for a problem."""
    sizes = (problem.head_dim, problem.head_dim_v)
    return (
        capability() < AFTER_HOPPER
        and min(sizes) >= FLASH3_MIN_HEAD_DIM
        and max(sizes) <= FLASH_MAX_HEAD_DIM
        and not no_flash_attn_3(problem)
        and _has_flash3()
    )


def _has_flash3() -> bool:
    """Whether it is compiled in, or beside xFormers as the package flash_attn_3."""
    for package, folder in (("xformers", "flash_attn_3"), ("flash_attn_3", "")):
        spec = importlib.util.find_spec(package)
        if any(any(Path(place, folder).glob("_C*")) for place in (spec and spec.submodule_search_locations) or ()):
            return True
    return False


def _fits_cutlass(problem: Problem) -> bool:
    """It has no window to both sides, gives a query that sees no key no zeros, and is refused after Hopper."""
    return (
        (problem.causal or problem.window is None)
        and problem.visible_rows == problem.seqlen_q
        and capability() < AFTER_HOPPER
    )


def layout(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """BHSD tensors as the views that xFormers takes: BMHK, or where heads are grouped BMGHK with the keys expanded."""
    if problem.heads_q == problem.heads_kv:
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    group = problem.heads_q // problem.heads_kv

    def expanded(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).unsqueeze(3).expand(-1, -1, -1, group, -1)

    grouped = q.view(problem.batch, problem.heads_kv, group, *q.shape[2:])
    return grouped.permute(0, 3, 1, 2, 4), expanded(k), expanded(v)


def attn_bias(problem: Problem) -> Any:
    """The mask as one of xFormers' classes, all of them aligned bottom-right; None where there is none."""
    from xformers.ops.fmha import attn_bias as biases

    if not hides(problem):
        return None
    if problem.causal:
        causal = biases.LowerTriangularFromBottomRightMask()
        return causal if problem.window is None else causal.make_local_attention(problem.window)
    return biases.LocalAttentionFromBottomRightMask(*window_size(problem))


def _misplaced_flash_attn() -> str | None:
    """That xFormers cannot be imported, since it takes any folder flash_attn for FlashAttention-2."""
    if importlib.util.find_spec("flash_attn") is None or installed_version("flash-attn"):
        return None
    return "it cannot be imported beside flash-attn-4 without flash-attn: give it an environment of its own"


def _other_cuda() -> str | None:
    """That its library is built for a CUDA runtime that is not here: then every operator refuses every problem."""
    import torch

    spec = importlib.util.find_spec("xformers")
    facts = Path(spec.origin).with_name("cpp_lib.json") if spec is not None and spec.origin else None
    if facts is None or not facts.is_file():
        return None
    built_for = int(json.loads(facts.read_text(encoding="utf-8"))["version"]["cuda"] or 0) // 100
    if not built_for or str(torch.version.cuda).startswith(f"{built_for}."):
        return None
    try:
        ctypes.CDLL(f"libcudart.so.{built_for}")
    except OSError:
        return (
            f"this xformers is built for CUDA {built_for}, and libcudart.so.{built_for} is not found: "
            f"put the folder lib of nvidia-cuda-runtime-cu{built_for} on LD_LIBRARY_PATH"
        )
    return None


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [XFormers()]
