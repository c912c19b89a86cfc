"""flash_attn_npu on the stand-ins for it and torch_npu, and what triton_flash says of an NPU.

What triton_flash computes is in test_triton_peers.py.
"""

from __future__ import annotations

from typing import Any

import pytest
from helpers import python
from test_npu import CONTRACT, OnNpu, environment, on_npu, problem  # noqa: F401

from attnbench import Problem
from attnbench_plugins.flash_attn_npu import FlashAttnNpu
from attnbench_plugins.triton_flash import TritonFlash

FLASH = FlashAttnNpu()
TRITON = TritonFlash("npu")


def say(code: str, **env: str) -> str:
    return python(code, env=environment(**env)).out.strip()


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({}, "None"),
        ({"FAKE_NPU": "absent"}, "torch_npu sees no NPU: check npu-smi info and ASCEND_RT_VISIBLE_DEVICES"),
        (
            {"FAKE_NPU_FAULT": "other_torch"},
            "flash_attn_npu_3 does not import: flash_attn_npu_3.so: undefined symbol: _ZN3c10",
        ),
        (
            {"FAKE_NPU_NAME": "Ascend310P3"},
            "flash_attn_npu_3 does not import: Unsupported Ascend device: Ascend310P3",
        ),
    ],
)
def test_flash_attn_npu_says_what_is_missing(env: dict[str, str], words: str) -> None:
    assert say("from attnbench_plugins.flash_attn_npu import *; print(FlashAttnNpu().unavailable())", **env) == words


def test_each_names_the_extra_that_has_its_library() -> None:
    code = """
        import importlib.util
        from attnbench_plugins import flash_attn_npu, triton_flash
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name: None if name == "flash_attn_npu_3" else find(name)
        triton_flash.installed_version = lambda name: ""
        print(flash_attn_npu.FlashAttnNpu().unavailable())
        print(triton_flash.TritonFlash("npu").unavailable())
        triton_flash.installed_version = {"triton-ascend": "3.2.0"}.get
        print(triton_flash.TritonFlash("npu").unavailable())
    """
    assert say(code).splitlines() == [
        "flash_attn_npu_3 is not installed: pip install --no-build-isolation 'attnbench[flash-attn-npu]'",
        "triton-ascend is not installed: pip install 'attnbench[triton-ascend]'",
        "None",
    ]


@pytest.mark.parametrize(
    ("backend", "case", "reason"),
    [
        *((b, problem(8, 8, direction="bwd"), "forward only") for b in (FLASH, TRITON)),
        (FLASH, problem(8, 8, dtype="fp32"), "fp16 and bf16 only"),
        (FLASH, problem(8, 8, head_dim_v=32), "one head size for q, k and v"),
        (FLASH, problem(8, 8, head_dim=264), "head sizes up to 256"),
        (
            FLASH,
            problem(40, 8, window=20),
            "a window of more than seqlen_k keys to both sides, which the library drops",
        ),
        *((FLASH, problem(40, 8, **mask), None) for mask in ({"window": 8}, {"window": 40}, {"window": 4})),
        (FLASH, problem(40, 8, window=20, causal=True), None),
        (FLASH, problem(7, 9, head_dim=35, heads_q=6, heads_kv=2), None),
        (TRITON, problem(8, 8, head_dim=1025), "head sizes up to 1024"),
        (TRITON, problem(1, 8, batch=65535), None),
        (TRITON, problem(1, 8, batch=65536), "up to 65535 tiles of queries"),
        (TRITON, problem(64, 1 << 25), "fewer than 2³¹ elements in what belongs to a key head"),
    ],
)
def test_what_is_refused_has_its_reason(backend: Any, case: Problem, reason: str | None) -> None:
    assert backend.unsupported(case) == reason


CASES = (
    problem(24, 40, heads_q=3, batch=2),
    problem(24, 40, heads_q=6, heads_kv=2, batch=2, dtype="bf16"),
    problem(24, 40, heads_q=6, heads_kv=2, batch=2, causal=True),
    problem(40, 24, heads_q=2, causal=True, softmax_scale=0.3),
    problem(24, 40, heads_q=4, heads_kv=1, window=7),
    problem(24, 40, heads_q=2, causal=True, window=7),
    problem(40, 8, window=8),
    problem(40, 8, window=40),
    problem(1, 40, heads_q=8, heads_kv=2, batch=3, causal=True),
)
"""The last sees all keys, as do the first two; of the grouped ones with a mask something must be copied."""


def test_what_flash_attn_npu_computes_is_right(on_npu: OnNpu) -> None:  # noqa: F811
    code = f"""
        from attnbench_plugins.flash_attn_npu import FlashAttnNpu
        result = [fault(FlashAttnNpu(), Problem.from_json(case)) for case in {[case.to_json() for case in CASES]}]
    """
    assert on_npu(code) == [""] * len(CASES)


def test_both_ways_to_copy_what_is_grouped_are_right(on_npu: OnNpu) -> None:  # noqa: F811
    code = f"""
        from attnbench_plugins import flash_attn_npu
        result, before = [], flash_attn_npu.fastest
        for which in (0, 1):
            flash_attn_npu.fastest = lambda calls: calls[which]
            for case in {[CASES[2].to_json(), CASES[4].to_json()]}:
                result.append(fault(flash_attn_npu.FlashAttnNpu(), Problem.from_json(case)))
        flash_attn_npu.fastest = before
    """
    assert on_npu(code) == [""] * 4


def test_the_reason_is_true_of_a_window_that_is_longer_than_the_keys(on_npu: OnNpu) -> None:  # noqa: F811
    code = f"""
        from attnbench_plugins.flash_attn_npu import FlashAttnNpu
        result = fault(FlashAttnNpu(), Problem.from_json({problem(40, 8, window=20).to_json()}))
    """
    assert on_npu(code) != ""


def test_it_plans_in_prepare_and_not_in_the_call(on_npu: OnNpu) -> None:  # noqa: F811
    code = f"""
        import flash_attn_npu_3
        from attnbench_plugins.flash_attn_npu import FlashAttnNpu
        case = Problem.from_json({CASES[3].to_json()})
        inputs = make_inputs(case, 0)
        tensors = [tensor.to("npu", copy=True) for tensor in (inputs.q, inputs.k, inputs.v)]
        count = len(flash_attn_npu_3.PLANNED)
        call = FlashAttnNpu().prepare(case, *tensors)
        call(), call()
        result = flash_attn_npu_3.PLANNED[count:]
    """
    how = {"causal": True, "window_size": [-1, 0], "softmax_scale": 0.3, "num_splits": 1}
    assert on_npu(code) == [{**how, "max_seqlen_q": 40, "max_seqlen_k": 24}]


def test_it_passes_the_conformance_kits_contract_and_honesty(on_npu: OnNpu) -> None:  # noqa: F811
    code = f"""
        from attnbench_plugins.flash_attn_npu import FlashAttnNpu
        from attnbench.testing import BackendConformance, conformance
        from attnbench.testing.conform import _run, every_test
        conformance.BUSY_GEMMS = 0
        kit = BackendConformance()
        kit.backend = FlashAttnNpu()
        found = [(name, _run(kit, name, of)) for name, of in every_test() if of in ("", "fp16") and name in {CONTRACT}]
        result = [sum(how["outcome"] == "passed" for _, how in found)]
        result.append([[name, how["words"]] for name, how in found if how["outcome"] == "failed"])
    """
    passed, failed = on_npu(code)
    assert failed == []
    assert passed >= len(CONTRACT)


def test_tensors_that_are_not_contiguous_are_refused(on_npu: OnNpu) -> None:  # noqa: F811
    code = f"""
        from attnbench_plugins.flash_attn_npu import FlashAttnNpu
        problem, result = Problem.from_json({problem(4, 4, head_dim=4, heads_q=4, batch=4).to_json()}), []
        for which in range(3):
            qkv = [torch.zeros(4, 4, 4, 4, dtype=torch.float16, device="npu") for _ in range(3)]
            qkv[which] = qkv[which].transpose(1, 2)
            try:
                FlashAttnNpu().prepare(problem, *qkv)
            except ValueError as error:
                result.append(str(error))
    """
    assert on_npu(code) == ["q, k and v must be contiguous, and one of shape (4, 4, 4, 4) is not"] * 3
