"""FlashInfer's functions for one problem, each as the call of a backend. Knows their layouts, not which is the fastest.

A problem's batch is folded into its heads: all of its sequences are of one length, and FlashInfer reads heads with
whatever stride, so that one request is the whole of it and nothing is copied.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from attnbench import Backend, Problem
from attnbench.problem import DeviceKind
from attnbench_plugins.masks import visible, window_size
from attnbench_plugins.packages import GPU, missing, no_gpu

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Call = Callable[[], "Tensor"]

WORKSPACE_BYTES = 128 << 20
"""What FlashInfer recommends for what a split of the keys leaves to be merged."""
MOST_HEADS = 65535
"""Heads, all sequences' together, are a dimension of the grid."""


class FlashInfer(Backend):
    """FlashInfer's attention by one of its kernel templates, compiled for the problem at its first call."""

    device: DeviceKind = "cuda"
    homepage = "https://docs.flashinfer.ai"
    libraries = MappingProxyType({"flashinfer-python": "0.7.2.post1"})

    def __init__(
        self,
        name: str,
        summary: str,
        refusal: Callable[[Problem], str | None],
        candidates: Callable[[Problem, Tensor, Tensor, Tensor], Iterable[Call]],
        *,
        least_capability: GPU,
        below_capability: GPU | None = None,
    ) -> None:
        """`refusal` is why the template cannot do a problem, beyond what none can; `candidates` are calls to choose
        from, the one first that FlashInfer's documentation leads to.
        """
        self.name, self.summary = name, summary
        self._refusal, self._candidates = refusal, candidates
        self._least_capability, self._below_capability = least_capability, below_capability

    def unavailable(self) -> str | None:
        reason: str | None = no_gpu(self._least_capability, self._below_capability)
        return reason or missing("flashinfer", "flashinfer") or _no_compiler()

    def unsupported(self, problem: Problem) -> str | None:
        if problem.direction != "fwd":
            return "forward only"
        if problem.dtype == "fp32":
            return "fp16 and bf16 only"
        if problem.batch * problem.heads_q > MOST_HEADS:
            return f"at most {MOST_HEADS} heads, all sequences' together"
        return self._refusal(problem)

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        from attnbench_plugins.fastest import fastest

        if shutil.which("ninja") is None:  # FlashInfer looks in PATH alone
            os.environ["PATH"] = _search_path()
        chosen: Call = fastest(list(self._candidates(problem, q, k, v)))
        return chosen


def _no_compiler() -> str | None:
    """Why FlashInfer could not compile a kernel, where no compiled ones are installed."""
    if importlib.util.find_spec("flashinfer_jit_cache") is not None:
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if shutil.which("nvcc") is None and not any(home and Path(home, "bin", "nvcc").is_file() for home in homes):
        return "FlashInfer compiles with nvcc, and there is none: install the CUDA toolkit, or set CUDA_HOME"
    if shutil.which("ninja", path=_search_path()) is None:
        return "FlashInfer compiles with ninja, and there is none: pip install ninja"
    return None


def _search_path() -> str:
    """PATH and this interpreter's folder, where pip puts ninja, and which need not be in PATH."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])


def hides_right(problem: Problem) -> bool:
    """Whether its window hides keys on the right as well: FlashInfer's own window is one of the left side alone."""
    return problem.window is not None and not problem.causal and problem.window < problem.seqlen_q


def rows_first(tensor: Tensor) -> Tensor:
    """A view of q, k or v as (rows, heads, dim), all sequences' heads together. Raises where there is no such view."""
    return tensor.view(-1, *tensor.shape[2:]).transpose(0, 1)


def rows_last(problem: Problem, out: Tensor) -> Tensor:
    """FlashInfer's (rows, heads, dim) as a view of the output's shape."""
    return out.view(problem.seqlen_q, problem.batch, problem.heads_q, problem.head_dim_v).permute(1, 2, 0, 3)


def packed_mask(problem: Problem, device: torch.device) -> Tensor | None:
    """Which keys each query sees, eight to a byte, the first in the lowest bit; None where FlashInfer has the mask."""
    import torch

    seen = visible(problem, device) if hides_right(problem) else None
    if seen is None:
        return None
    bits = torch.nn.functional.pad(seen.flatten(), (0, -seen.numel() % 8)).view(-1, 8).byte()
    return (bits << torch.arange(8, dtype=torch.uint8, device=device)).sum(1, dtype=torch.uint8)


def single_prefill(problem: Problem, q: Tensor, k: Tensor, v: Tensor, template: str) -> Call:
    """single_prefill_with_kv_cache, which splits the keys by itself where the template can."""
    import flashinfer

    tensors = [rows_first(tensor) for tensor in (q, k, v)]
    how = {
        "causal": problem.causal,
        "packed_custom_mask": packed_mask(problem, q.device),
        "window_left": window_size(problem)[0],
        "sm_scale": problem.softmax_scale,
        "backend": template,
    }

    def call() -> Tensor:
        return rows_last(problem, flashinfer.single_prefill_with_kv_cache(*tensors, **how))

    return call


def ragged_prefill(problem: Problem, q: Tensor, k: Tensor, v: Tensor, template: str, **split: bool) -> Call:
    """BatchPrefillWithRaggedKVCacheWrapper, which skips keys left of a window, planned at the first call."""
    import torch

    queries, keys, values = (rows_first(tensor) for tensor in (q, k, v))
    out = torch.empty(*queries.shape[:2], problem.head_dim_v, dtype=q.dtype, device=q.device)
    result = rows_last(problem, out)

    @functools.cache
    def planned() -> Callable[..., Tensor]:
        import flashinfer

        wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace(q.device), "NHD", backend=template)
        wrapper.plan(
            *(torch.tensor([0, length], dtype=torch.int32) for length in (problem.seqlen_q, problem.seqlen_k)),
            queries.shape[1],
            keys.shape[1],
            problem.head_dim,
            problem.head_dim_v,
            packed_custom_mask=packed_mask(problem, q.device),
            causal=problem.causal,
            window_left=window_size(problem)[0],
            sm_scale=problem.softmax_scale,
            q_data_type=q.dtype,
            **split,
        )
        run: Callable[..., Tensor] = wrapper.run
        return run

    def call() -> Tensor:
        planned()(queries, keys, values, out=out)
        return result

    return call


def single_decode(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """single_decode_with_kv_cache on CUDA cores, which splits the keys."""
    import flashinfer

    queries = q.view(-1, problem.head_dim)
    keys, values = (tensor.view(-1, *tensor.shape[2:]) for tensor in (k, v))
    how = {"kv_layout": "HND", "window_left": window_size(problem)[0], "sm_scale": problem.softmax_scale}

    def call() -> Tensor:
        out: Tensor = flashinfer.single_decode_with_kv_cache(queries, keys, values, **how)
        return out.view(problem.out_shape)

    return call


def batch_decode(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """BatchDecodeWithPagedKVCacheWrapper on CUDA cores, a sequence's keys being one page, planned at the first call."""
    import torch

    out = torch.empty(problem.out_shape, dtype=q.dtype, device=q.device)

    @functools.cache
    def planned() -> Callable[..., Tensor]:
        import flashinfer

        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(q.device), "HND", backend="fa2")
        pages = torch.arange(problem.batch + 1, dtype=torch.int32)
        wrapper.plan(
            pages,
            pages[:-1].to(q.device),
            torch.full((problem.batch,), problem.seqlen_k, dtype=torch.int32),
            problem.heads_q,
            problem.heads_kv,
            problem.head_dim,
            problem.seqlen_k,
            window_left=window_size(problem)[0],
            sm_scale=problem.softmax_scale,
            q_data_type=q.dtype,
        )
        run: Callable[..., Tensor] = wrapper.run
        return run

    def call() -> Tensor:
        planned()(q[:, :, 0], (k, v), out=out[:, :, 0])
        return out

    return call


def workspace(device: torch.device) -> Tensor:
    """A wrapper's own, zeroed as its first use must find it."""
    import torch

    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
