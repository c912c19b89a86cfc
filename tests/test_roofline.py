"""attnbench.roofline: bounds computed by hand, and what they call impossible."""

from __future__ import annotations

import dataclasses

import pytest

from attnbench.devices import DeviceInfo
from attnbench.problem import Problem
from attnbench.roofline import Bound, fault, least_time_us

NPU = DeviceInfo(kind="npu", name="N", cores=24, peak_tflops={"fp16": 353.9}, peak_source="table")
CPU = DeviceInfo(
    kind="cpu",
    name="C",
    cores=2,
    peak_tflops={"fp32": 0.2},
    peak_source="measured",
    bandwidths=((1 << 15, 200.0), (1 << 19, 100.0), (1 << 24, 50.0), (1 << 27, 10.0)),
)
SQUARE = Problem(seqlen_q=8192, seqlen_k=8192, heads_q=16, dtype="fp16")


def decode(keys: int, **fields) -> Problem:
    """One query: 4 · keys · 128 FLOPs against 4 · (2 · 128 + 2 · keys · 128) bytes moved in fp32."""
    return Problem(seqlen_q=1, seqlen_k=keys, dtype="fp32", **fields)


def test_flops_over_the_peak_bound_a_large_problem():
    # 2 · 16 · 8192² · 256 FLOPs = 549,755,813,888; at 353.9 TFLOP/s 1553.42 µs; over 1.1, 1412.20 µs.
    bound = least_time_us(SQUARE, NPU, "hot")
    assert bound == Bound(pytest.approx(549_755_813_888 / 353.9e6 / 1.1), "1.1 × 353.9 TFLOP/s")
    assert bound.time_us == pytest.approx(1412.20, abs=0.01)


def test_a_masked_problem_is_bounded_by_the_pairs_it_sees():
    causal = dataclasses.replace(SQUARE, causal=True)
    assert least_time_us(causal, NPU, "hot").time_us == pytest.approx(1412.20 * 8193 / 16384, abs=0.01)


def test_a_measured_peak_has_the_wider_margin():
    # 2 · 64 · 1024 · 256 FLOPs at 0.2 TFLOP/s take 167.77 µs, over 1.25: 134.22 µs.
    bound = least_time_us(Problem(seqlen_q=64, seqlen_k=1024, dtype="fp32"), CPU, "hot")
    assert bound == Bound(pytest.approx(134.2177, abs=1e-3), "1.25 × 0.2 TFLOP/s")


@pytest.mark.parametrize(
    ("keys", "gbps"),
    [
        (8, 200.0),  # 9,216 bytes: smaller than all that were measured
        (100, 200.0),
        (511, 200.0),  # 524,288 bytes: the set of 512 KiB is not half of it
        (1023, 100.0),  # 1 MiB: exactly half
        (32_766, 100.0),
        (32_767, 50.0),  # 32 MiB
        (262_142, 50.0),
        (262_143, 10.0),  # 256 MiB
    ],
)
def test_hot_the_bandwidth_is_that_of_a_set_of_half_the_bytes_or_less(keys, gbps):
    problem = decode(keys)
    quick = dataclasses.replace(CPU, peak_tflops={})
    bound = least_time_us(problem, quick, "hot")
    assert problem.bytes_moved == 1024 * (keys + 1)
    assert bound == Bound(pytest.approx(1024 * (keys + 1) / (gbps * 1e3) / 1.25), f"1.25 × {gbps:.0f} GB/s")


def test_cold_the_inputs_come_from_memory_and_the_output_need_not_reach_it():
    quick = dataclasses.replace(CPU, peak_tflops={})
    # q, k and v: 512 · (64 + 8 + 8) bytes; the output's 512 · 64 may stay in a cache.
    problem = Problem(seqlen_q=64, seqlen_k=8, dtype="fp32")
    assert least_time_us(problem, quick, "cold") == Bound(pytest.approx(40_960 / 10e3 / 1.25), "1.25 × 10 GB/s")
    assert problem.bytes_moved == 512 * (64 + 8 + 8 + 64)


def test_the_larger_of_both_bounds_counts():
    # 4 · 1023 · 128 FLOPs at 0.2 TFLOP/s take 2.62 µs; 1 MiB at 100 GB/s 10.49 µs.
    assert least_time_us(decode(1023), CPU, "hot").words == "1.25 × 100 GB/s"
    faster = dataclasses.replace(CPU, bandwidths=((1 << 15, 1e6),))
    assert least_time_us(decode(1023), faster, "hot").words == "1.25 × 0.2 TFLOP/s"


def test_fp32_may_be_made_of_three_products_of_half_width():
    gpu = dataclasses.replace(NPU, peak_tflops={"fp16": 300.0, "bf16": 360.0, "fp32": 60.0})
    problem = dataclasses.replace(SQUARE, dtype="fp32")
    assert least_time_us(problem, gpu, "hot").words == "1.1 × 120 TFLOP/s"
    slow = dataclasses.replace(gpu, peak_tflops={"fp16": 150.0, "fp32": 60.0})
    assert least_time_us(problem, slow, "hot").words == "1.1 × 60 TFLOP/s"


def test_where_nothing_is_known_nothing_is_impossible():
    unknown = DeviceInfo(kind="cuda", name="U", cores=None)
    assert least_time_us(SQUARE, unknown, "hot") is None
    assert fault(SQUARE, unknown, "hot", 1e-9) == ""
    other = dataclasses.replace(SQUARE, dtype="bf16")
    assert least_time_us(other, NPU, "cold") is None  # neither that dtype's peak nor a bandwidth


def test_a_problem_that_sees_nothing_may_take_no_time():
    blind = Problem(seqlen_q=8, seqlen_k=8, causal=True, window=1, dtype="fp16")
    assert fault(blind, NPU, "hot", 1e-3) == ""


def test_the_fault_says_both_times_and_the_peak_and_the_bound_itself_is_none():
    bound = least_time_us(SQUARE, NPU, "hot").time_us
    assert fault(SQUARE, NPU, "hot", 12.4) == "12.4 µs is faster than the 1412.2 µs that 1.1 × 353.9 TFLOP/s allow"
    assert fault(SQUARE, NPU, "hot", bound) == ""
    assert fault(SQUARE, NPU, "hot", bound * 0.999) != ""
    assert fault(decode(1023), CPU, "hot", 0.5).startswith("0.500 µs is faster than the 8.389 µs that 1.25 × 100 GB/s")
