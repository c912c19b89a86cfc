"""torch_npu's attention operators on the stand-in, with the signatures, defaults and refusals that op-plugin documents.

FAKE_NPU_FAULT makes them wrong: noop, drop_tail, unnormalised, top_left, or flat, which takes 12.4 µs whatever it does.
"""

from __future__ import annotations

import os

import torch

from .machine import MACHINE, on

INT_MAX = 2**31 - 1
FLAT_US = 12.4
MASK_SHAPES = ((2048, 2048), (1, 2048, 2048), (1, 1, 2048, 2048))


def npu_fused_infer_attention_score(
    query,
    key,
    value,
    *,
    atten_mask=None,
    num_heads=1,
    scale=1.0,
    pre_tokens=INT_MAX,
    next_tokens=INT_MAX,
    input_layout="BSH",
    num_key_value_heads=0,
    sparse_mode=0,
    inner_precise=0,
):
    decodes = query.shape[2] == 1
    _require(inner_precise in ((0, 1) if decodes else (0, 1, 2, 3)), "inner_precise")
    _for_inference(query, key, value, num_heads, num_key_value_heads, input_layout, decodes=decodes)
    if decodes:
        sparse_mode, atten_mask = 0, None
    hidden = _hidden(query, key, atten_mask, sparse_mode, pre_tokens, next_tokens)
    return _attend(query, key, value, scale, hidden), torch.zeros(1)


def npu_prompt_flash_attention(
    query,
    key,
    value,
    *,
    atten_mask=None,
    num_heads=1,
    scale_value=1.0,
    pre_tokens=INT_MAX,
    next_tokens=0,
    input_layout="BSH",
    num_key_value_heads=0,
    sparse_mode=0,
):
    _for_inference(query, key, value, num_heads, num_key_value_heads, input_layout, decodes=False)
    hidden = _hidden(query, key, atten_mask, sparse_mode, pre_tokens, next_tokens)
    return _attend(query, key, value, scale_value, hidden, blind_rows=False)


def npu_incre_flash_attention(
    query,
    key,
    value,
    *,
    atten_mask=None,
    num_heads=1,
    scale_value=1.0,
    input_layout="BSH",
    num_key_value_heads=0,
    inner_precise=1,
):
    _require(query.shape[2] == 1, "query must have one token")
    _require(inner_precise in (0, 1), "inner_precise")
    _for_inference(query, key, value, num_heads, num_key_value_heads, input_layout, decodes=True)
    return _attend(query, key, value, scale_value, None)


def npu_fusion_attention(
    query,
    key,
    value,
    head_num,
    input_layout,
    pse=None,
    padding_mask=None,
    atten_mask=None,
    scale=1.0,
    keep_prob=1.0,
    pre_tockens=INT_MAX,
    next_tockens=INT_MAX,
    inner_precise=0,
    prefix=None,
    actual_seq_qlen=None,
    actual_seq_kvlen=None,
    sparse_mode=0,
):
    if MACHINE.current.capture is not None:
        MACHINE.refused = "npu_fusion_attention"
        raise RuntimeError("npu_fusion_attention is not supported when a stream is capturing")
    _require(keep_prob == 1.0, "dropout is not part of this stand-in")
    _require(inner_precise in (0, 1, 2), "inner_precise")
    _tensors(query, key, value, (torch.float16, torch.bfloat16, torch.float32), 768)
    _shapes(query, key, value, head_num, key.shape[1], input_layout)
    if atten_mask is None:  # then it ignores every other word about masks
        sparse_mode, pre_tockens, next_tockens = 0, INT_MAX, INT_MAX
    hidden = _hidden(
        query, key, atten_mask, sparse_mode, pre_tockens, next_tockens, mask_dtypes=(torch.bool, torch.uint8)
    )
    output = _attend(query, key, value, scale, hidden)
    statistics = torch.zeros(*query.shape[:3], 8)
    return output, statistics, statistics, torch.zeros(0), 0, 0, 0


def _require(condition, what):
    if not condition:
        raise RuntimeError(f"call aclnn kernel failed, error code is 161002: {what}")


def _tensors(query, key, value, dtypes, largest_head_dim):
    """What lies elsewhere, is of another dtype, or has gaps, is refused."""
    for tensor in (query, key, value):
        _require(tensor.dim() == 4, "dimensions")
        _require(tensor.device.type == "npu", "Expected all tensors to be on the same device")
        _require(tensor.dtype == query.dtype and tensor.dtype in dtypes, "dtype")
        _require(tensor.is_contiguous(), "inputs must be contiguous")
        _require(0 < tensor.shape[3] <= largest_head_dim, "head size")


def _shapes(query, key, value, heads, heads_kv, layout):
    _require(layout == "BNSD", "this stand-in knows the layout BNSD alone")
    _require(key.shape == value.shape, "key and value must have one shape")
    _require((query.shape[0], query.shape[3]) == (key.shape[0], key.shape[3]), "query and key do not fit")
    _require((heads, heads_kv) == (query.shape[1], key.shape[1]), "heads")
    _require(heads % heads_kv == 0, "heads of keys must divide those of queries")
    _require(heads <= 256, "more than 256 heads")


def _for_inference(query, key, value, heads, heads_kv, layout, *, decodes):
    _tensors(query, key, value, (torch.float16, torch.bfloat16), 512)
    _require(query.shape[3] % 8 == 0, "head size")
    _shapes(query, key, value, heads, heads_kv or heads, layout)
    _require(heads // key.shape[1] <= 64, "more than 64 query heads to a key head")
    _require(decodes or query.shape[3] % 16 == 0 or query.shape[0] <= 128, "batch of an unaligned head size")


def _hidden(query, key, mask, mode, before, after, mask_dtypes=(torch.bool, torch.int8, torch.uint8)):
    """Which keys each query does not see, (queries, keys); None where it sees all."""
    _require(mode in (0, 1, 2, 3), "sparse_mode")
    _require(mode == 0 or mask is not None, "this sparse_mode takes a mask")
    queries, keys = query.shape[2], key.shape[2]
    if mask is not None:
        _require(mask.dtype in mask_dtypes, "dtype of the mask")
        _require(mask.device.type == "npu" and mask.is_contiguous(), "the mask must be contiguous and on the device")
    if mode in (2, 3):
        _require(mask.shape in MASK_SHAPES, "a causal sparse_mode takes a mask of 2048 × 2048")
        if os.environ.get("FAKE_NPU_FAULT") == "top_left":
            mode = 2
        last = torch.arange(queries)[:, None] + (keys - queries if mode == 3 else 0)
        distance = (torch.arange(keys) - last).sign()
        MACHINE.drain()
        values = on(mask, "cpu").reshape(2048, 2048).bool()
        return torch.stack((values[1, 0], values[0, 0], values[0, 1]))[distance + 1]
    if mask is None:  # next_tokens says nothing without one
        return None
    _require(mask.shape[-2:] == (queries, keys), "the mask must have a row for every query")
    MACHINE.drain()
    hidden = on(mask, "cpu").reshape(-1, queries, keys)[0].bool()
    distance = torch.arange(keys) - torch.arange(queries)[:, None]
    return hidden if mode == 1 else hidden | (distance > after) | (distance < -before)


def _attend(query, key, value, scale, hidden, *, blind_rows=True):
    """An output that is there at once and written when the queue comes to it.

    A row that sees no key is zeros, or with blind_rows=False the mean of all values.
    """
    q, k, v = (on(tensor, "cpu") for tensor in (query, key, value))
    out, fault = torch.empty_like(q), os.environ.get("FAKE_NPU_FAULT", "")

    def work():
        if fault != "noop":
            out.copy_(attention(q, k, v, scale, hidden, blind_rows=blind_rows, fault=fault))

    flops = 4 * q.numel() * k.shape[2]
    MACHINE.enqueue(work, FLAT_US if fault == "flat" else 5.0 + flops / 150e6)
    return on(out, "npu")


def attention(q, k, v, scale, hidden, *, blind_rows=True, fault=""):
    """Of the host's tensors, in fp32."""
    keys = k.shape[2] // 2 if fault == "drop_tail" else k.shape[2]
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (t[:, :, :keys].float().repeat_interleave(group, 1) for t in (k, v))
    scores = q.float() @ wide_k.transpose(-1, -2) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, :keys], -1e30)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    if fault != "unnormalised":
        weights = weights / weights.sum(-1, keepdim=True)
    result = weights @ wide_v
    if hidden is not None and blind_rows:
        result = result.masked_fill(hidden.all(-1)[:, None], 0.0)
    return result
