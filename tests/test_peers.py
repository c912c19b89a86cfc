"""The plugin sdpa_upcast: what it refuses, and that it is sdpa in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnbench import Problem
from attnbench.problem import Dtype
from attnbench.reference import make_inputs
from attnbench_plugins.sdpa import Sdpa
from attnbench_plugins.sdpa_upcast import SdpaUpcast


def problem(seqlen_q: int, seqlen_k: int, dtype: Dtype = "fp32", **fields) -> Problem:
    return Problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, dtype=dtype, **{"head_dim": 64, **fields})


def tensors(case: Problem, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    inputs = make_inputs(case, seed)
    return inputs.q, inputs.k, inputs.v


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (problem(8, 8, "bf16", direction="bwd"), "forward only"),
        (problem(8, 8), "nothing to upcast"),
        (problem(9, 8, "fp16", causal=True), None),
    ],
)
def test_what_is_refused_has_its_reason(case: Problem, reason: str | None) -> None:
    assert SdpaUpcast().unsupported(case) == reason


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("fields", [{}, {"causal": True, "heads_q": 4, "heads_kv": 2}], ids=["plain", "causal-grouped"])
def test_sdpa_upcast_is_sdpa_in_fp32_rounded_once(dtype: Dtype, fields: dict) -> None:
    case = problem(40, 56, dtype, **fields)
    q, k, v = tensors(case)
    wide = problem(40, 56, **fields)
    expected = Sdpa("cpu").prepare(wide, q.float(), k.float(), v.float())().to(q.dtype)
    assert SdpaUpcast().prepare(case, q, k, v)().equal(expected)
    assert SdpaUpcast().parallel_units(case) == torch.get_num_threads()
