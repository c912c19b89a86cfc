"""A stand-in for flash-attn-npu's flash_attn_npu_3 on the stand-in for torch_npu, with its refusals and its quirks.

It reads memory as contiguous (batch, seqlen, heads, head_dim), whatever strides it is given.
"""

import math
import os

import torch
from torch_npu.machine import MACHINE, on
from torch_npu.npu import get_device_name

if "Ascend910" not in get_device_name() and "Ascend950" not in get_device_name():
    raise RuntimeError(f"Unsupported Ascend device: {get_device_name()}")
if os.environ.get("FAKE_NPU_FAULT") == "other_torch":
    raise ImportError("flash_attn_npu_3.so: undefined symbol: _ZN3c10")

PLANNED = []
"""What was planned, in order."""


def get_scheduler_metadata(
    batch_size,
    max_seqlen_q,
    max_seqlen_k,
    num_heads_q,
    num_heads_kv,
    headdim,
    cache_seqlens,
    qkv_dtype=torch.bfloat16,
    causal=False,
    window_size=(-1, -1),
    num_splits=0,
    softmax_scale=None,
):
    assert cache_seqlens.dtype == torch.int32
    assert cache_seqlens.shape == (batch_size,)
    plan = on(torch.zeros(2384, dtype=torch.uint8), "npu")
    plan._fa_scheduler_params = {
        "causal": causal,
        "window_size": window_size,
        "softmax_scale": headdim**-0.5 if softmax_scale is None else softmax_scale,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "num_splits": num_splits,
    }
    plan._shape = (batch_size, num_heads_q, num_heads_kv, headdim, qkv_dtype)  # which the real one does not check
    PLANNED.append(plan._fa_scheduler_params)
    return plan


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    cache_seqlens=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    scheduler_metadata=None,
    num_splits=0,
):
    batch, seqlen_q, heads, dim = q.shape
    seqlen_k, heads_kv = k_cache.shape[1:3]
    tensors = (q, k_cache, v_cache)
    if any(t.stride(-1) != 1 or t.device.type != "npu" for t in tensors):
        raise RuntimeError("Input tensors must have contiguous last dimension and be NPU tensors")
    if q.dtype not in (torch.float16, torch.bfloat16) or any(t.dtype != q.dtype for t in tensors):
        raise RuntimeError("FlashAttention only supports FP16 and BF16 data types")
    if dim > 256 or heads % heads_kv or v_cache.shape != k_cache.shape or num_splits > 1:
        raise RuntimeError("unsupported head dimension, number of heads, or num_splits")
    expected = {
        "causal": causal,
        "window_size": window_size,
        "softmax_scale": dim**-0.5 if softmax_scale is None else softmax_scale,
        "max_seqlen_q": seqlen_q,
        "max_seqlen_k": seqlen_k,
        "num_splits": num_splits,
    }
    if scheduler_metadata._fa_scheduler_params != expected:
        raise ValueError("scheduler_metadata arguments do not match this call")
    assert scheduler_metadata._shape == (batch, heads, heads_kv, dim, q.dtype)
    left, right = (-1 if side >= seqlen_k else side for side in window_size)  # though queries may be more than keys
    right = 0 if causal else right
    row = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    key = torch.arange(seqlen_k)
    hidden = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool)
    if left >= 0:
        hidden |= key < row - left
    if right >= 0:
        hidden |= key > row + right
    out = torch.empty(q.shape, dtype=q.dtype)
    host = [on(t, "cpu").as_strided(t.shape, torch.empty(t.shape, device="meta").stride()) for t in tensors]

    def attend():
        wide_q, wide_k, wide_v = (t.transpose(1, 2).float() for t in host)
        wide_k, wide_v = (t.repeat_interleave(heads // heads_kv, 1) for t in (wide_k, wide_v))
        scores = (wide_q @ wide_k.transpose(2, 3) * expected["softmax_scale"]).masked_fill(hidden, -math.inf)
        out.copy_((torch.softmax(scores, -1).nan_to_num(0.0) @ wide_v).transpose(1, 2))

    MACHINE.enqueue(attend, 20.0)
    return on(out, "npu")
