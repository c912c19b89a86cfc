"""kernels/cuda/flash_attention_sm80.cu without a GPU: the kernel's own source as C++, against float64.

cuda_emulation/emulation.h stands in for the device's instructions, and reports what a device would forgive; what is
launched is what the plugin would launch. Speed, and what a device's own instructions compute, are test_jit_flash_gpu.py's.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from attnbench import jit
from attnbench.problem import Problem
from attnbench_plugins.jit_flash import cuda, cuda_sm80
from attnbench_plugins.jit_flash.cuda_sm80 import Config
from attnbench_plugins.masks import visible

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "kernels" / "cuda" / "flash_attention_sm80.cu"
EMULATION = Path(__file__).with_name("cuda_emulation") / "emulation.h"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def problem(seqlen_q: int, seqlen_k: int, **fields) -> Problem:
    return Problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, **{"dtype": "fp16", "head_dim": 64, **fields})


# --- inputs -----------------------------------------------------------------------------------------------------------


def inputs(case: Problem, seed: int = 0) -> list[Tensor]:
    """Random tensors, with NaN all around them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (case.q_shape, case.k_shape, case.v_shape)
    return [placed(torch.randn(shape, generator=generator).to(DTYPES[case.dtype])) for shape in shapes]


def placed(tensor: Tensor, *, order: Sequence[int] = (0, 1, 2, 3), pad: int = 8, offset: int = 64) -> Tensor:
    """The same numbers in a buffer of NaN: dimensions in memory in this `order`, `pad` more columns in a row."""
    sizes = [tensor.shape[i] for i in order]
    room = torch.full((offset + math.prod(sizes[:3]) * (sizes[3] + pad) + 64,), math.nan, dtype=tensor.dtype)
    start = -(-room.data_ptr() // 16) * 16 - room.data_ptr()  # the offset tells how it is aligned
    rows = room[start // 2 + offset :][: math.prod(sizes[:3]) * (sizes[3] + pad)].view(*sizes[:3], sizes[3] + pad)
    made = rows[..., : sizes[3]].permute(*(list(order).index(i) for i in range(4)))
    return made.copy_(tensor)


def extent(tensor: Tensor) -> tuple[int, int]:
    """The first address of a tensor, and the one after its last."""
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


# --- the kernel on a CPU ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """What the kernel is compiled for."""

    case: Problem
    config: Config
    copy: int = 16

    @property
    def macros(self) -> dict[str, int]:
        return cuda_sm80.macros(self.case, self.config, self.copy)


def compiled(source: Path, macros: dict[str, int]) -> ctypes.CDLL:
    base = jit.cpp_toolchain()
    flags = ("-O1", "-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
    # A long jump from a fiber to another is none that glibc's checks know.
    flags = (*flags, "-U_FORTIFY_SOURCE", "-x", "c++", f'-DEMULATION="{EMULATION}"')
    words = [f"-D{name}={value}" for name, value in macros.items()]
    library = jit.compile(source, toolchain=replace(base, flags=flags), flags=words).load()
    library.emulate.restype = ctypes.c_char_p
    return library


@lru_cache(maxsize=None)
def kernel(macros: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    return compiled(SOURCE, dict(macros))


def run(variant: Variant, tensors: Sequence[Tensor], library: ctypes.CDLL | None = None) -> SimpleNamespace:
    """The kernel's output and log-sum-exp, and what the emulation has to say."""
    case, config = variant.case, variant.config
    out = torch.full(case.out_shape, math.nan, dtype=tensors[0].dtype)
    lse = torch.full(case.out_shape[:3], 7.0)
    params = cuda.strided_params(case, config, *tensors, out, lse)
    ends = [end for tensor in (*tensors, out, lse) for end in extent(tensor)]
    ranges, conflicts = (ctypes.c_void_p * len(ends))(*ends), ctypes.c_int()
    library = library or kernel(tuple(variant.macros.items()))
    fault = library.emulate(
        *(ctypes.byref(params), cuda_sm80.units(case, config)),
        *(config.shared_bytes(case.head_dim, case.head_dim_v), 3, 2, ranges, ctypes.byref(conflicts)),
    )
    return SimpleNamespace(out=out, lse=lse, fault=fault.decode(), conflicts=conflicts.value)


def attention(
    case: Problem, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, weights_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, step by step in `dtype`, with the weights rounded as the tensor cores take them."""
    group = case.heads_q // case.heads_kv
    q, k, v = q.to(dtype), k.to(dtype).repeat_interleave(group, 1), v.to(dtype).repeat_interleave(group, 1)
    scores = q @ k.mT * case.softmax_scale
    mask = visible(case, torch.device("cpu"))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    top = scores.amax(-1, keepdim=True).nan_to_num(0, 0, 0)
    weights = torch.exp(scores - top)
    rounded = weights if weights_dtype is None else weights.to(weights_dtype).to(dtype)
    out = (rounded @ v / weights.sum(-1, keepdim=True)).nan_to_num(0.0)
    return out, torch.logsumexp(scores, -1)


def wrong(variant: Variant, tensors: Sequence[Tensor] | None = None, library: ctypes.CDLL | None = None) -> str:
    """What is wrong with the output, the log-sum-exp, or how they were computed; empty where nothing is."""
    tensors = tensors or inputs(variant.case)
    found = run(variant, tensors, library)
    if found.fault:
        return found.fault
    truth, true_lse = attention(variant.case, *tensors, torch.float64)
    plain, _ = attention(variant.case, *tensors, torch.float32, found.out.dtype)
    ulp = torch.finfo(found.out.dtype).eps * 2.0 ** math.floor(math.log2(truth.abs().max().item() or 1.0))
    limit = 2 * (plain.double() - truth).abs().max().item() + ulp
    error = (found.out.double() - truth).abs().max().item()
    words = [] if error <= limit else [f"error {error:.3g}, limit {limit:.3g}"]
    near = (found.lse.double() - true_lse).abs() <= 1e-5 * (1 + true_lse.abs())
    if not torch.where(true_lse.isinf(), found.lse.double() == true_lse, near).all():
        words.append("lse is off")
    if found.conflicts:
        words.append(f"{found.conflicts} bank conflicts")
    return ", ".join(words)
