"""A stand-in for PyPI's pto-kernels on the stand-in for torch_npu, with the refusals of its host code."""

import os

import torch
from torch_npu.machine import MACHINE, on
from torch_npu.operators import attention

if os.environ.get("FAKE_NPU_FAULT") == "other_torch":
    raise ImportError("pto_kernels_ops.so: undefined symbol: _ZN3c10")


def pto_flash_attention(q, k, v, causal=False, qk_preload=4):
    if any(tensor.dtype != torch.float16 or not tensor.is_contiguous() for tensor in (q, k, v)):
        raise RuntimeError("fa: Q, K, and V must be contiguous and have dtype fp16")
    if (q.shape[3], k.shape[3], v.shape) != (128, 128, k.shape) or q.shape[2] % 128 or k.shape[2] % 512:
        raise RuntimeError("fa: head dimension must be 128, S0 a multiple of 128, S1 of 512")
    out = torch.empty(q.shape, dtype=torch.float32)
    host = [on(tensor, "cpu") for tensor in (q, k, v)]
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1) if causal else None
    MACHINE.enqueue(lambda: out.copy_(attention(*host, 128**-0.5, hidden)), 20.0)
    return on(out, "npu")


if os.environ.get("FAKE_NPU_FAULT") == "no_operator":
    del pto_flash_attention
