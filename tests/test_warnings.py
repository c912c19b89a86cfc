"""attnbench.report.warnings: what is warned of and when, in one line that names the next step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from helpers import ASCEND_CSV, DEVICE, passed

from attnbench import store
from attnbench.report import warnings
from attnbench.report.tables import Tables
from attnbench.result import Conditions, Result
from attnbench.rows import row
from attnbench.store import Record


def record(*results: Result) -> Record:
    return Record(Path("r"), tuple(row(result, DEVICE) for result in results), DEVICE, results)


def told(*results: Result) -> list[str]:
    return [str(warning) for warning in warnings.of(record(*results))]


def with_conditions(result: Result, **fields: object) -> Result:
    assert result.measurement is not None
    measurement = dataclasses.replace(result.measurement, conditions=Conditions(**fields))  # type: ignore[arg-type]
    return dataclasses.replace(result, measurement=measurement)


STEADY = ((20.0,),) * 5


def test_a_quiet_run_has_no_warning() -> None:
    assert told(with_conditions(passed("sdpa", *STEADY), rounds=15)) == []


def test_a_wide_interval_is_noisy_and_the_widest_is_named() -> None:
    wide = passed("sdpa", (20.0,), (24.0,), (18.0,), (21.0,), (20.0,))
    wider = passed("jit_flash", (20.0,), (34.0,), (18.0,), (21.0,), (20.0,))
    (one,) = told(passed("gemm_ref", *STEADY), wide)
    assert one == (
        "noisy: sdpa on b1-h1-q128-k1024-d128-fp16 is known to ±14% only: "
        "close other programs or try --protocol adaptive --budget 60"
    )
    (two,) = told(wide, wider)
    assert two.startswith("noisy: jit_flash on b1-h1-q128-k1024-d128-fp16 is known to ±36% only, and 1 more are wider")


@pytest.mark.parametrize(("growth", "warned"), [(1.24, True), (1.26, False)])
def test_a_time_that_stays_flat_while_work_grows_is_told(growth: float, warned: bool) -> None:
    small = passed("jit_flash", *STEADY)
    large = passed("jit_flash", *((20.0 * growth,),) * 5, problem={"seqlen_q": 512, "seqlen_k": 2048})
    found = told(small, large)
    assert bool(found) is warned
    if warned:
        assert found[0].startswith(
            "launch-bound? jit_flash stays at about 20.0 µs over 8× more work (128×1024 to 512×2048)"
        )


def test_less_than_four_times_the_work_is_not_flat() -> None:
    assert told(passed("a", *STEADY), passed("a", *STEADY, problem={"seqlen_q": 384})) == []


def test_flatness_is_looked_for_within_one_configuration() -> None:
    assert told(passed("a", *STEADY), passed("a", *STEADY, problem={"heads_q": 8})) == []


def test_rounds_that_were_disturbed_are_counted_once_a_problem() -> None:
    conditions = {"rounds": 15, "rounds_dropped": 2, "rounds_disturbed": 1, "causes": ("other programs",)}
    both = [with_conditions(passed(name, *STEADY), **conditions) for name in ("sdpa", "jit_flash")]
    assert told(*both) == [
        "disturbed: 2 rounds were thrown away, and 1 of 15 rounds kept were disturbed too (other programs): "
        "close other programs, or run again when it is quiet"
    ]


def test_a_device_that_throttled_is_told_of_as_that_too() -> None:
    hot = with_conditions(passed("a", *STEADY), rounds=15, rounds_dropped=1, causes=("throttling (heat)",))
    assert told(hot)[0].startswith("throttled: throttling (heat): ")


def test_a_device_that_waits_for_the_host_is_told_of() -> None:
    (one,) = told(passed("a", *STEADY, timing={"host_us": 25.0}))
    assert one.startswith("host-bound: on 1 problems calling a took the host longer")
    assert told(passed("a", *STEADY, timing={"host_us": 25.0, "timing_method": "host_clock"})) == []


def test_one_block_has_no_interval_and_says_so() -> None:
    assert told(passed("a", (20.0, 21.0))) == [
        "one block gives no interval and no verdict: leave --iters out, or give at least 40"
    ]


def test_warnings_stand_below_the_captions_of_every_table_and_work_for_a_csv() -> None:
    published = Tables(store.load(ASCEND_CSV))
    flat = [line for line in published.warnings if "launch-bound?" in line]
    assert all(line.startswith("Warning: ") for line in published.warnings)
    assert all(line in published.render("plain") for line in flat)
    noisy = Tables(record(passed("sdpa", (20.0,), (34.0,)), passed("jit_flash", (20.0,), (24.0,))))
    assert "Warning: noisy: " in noisy.render("github")
    assert "Warning: noisy: " in noisy.render("html")


# Rows of a CSV that claim too much

HEAD = "sq,sk,head_size,kernel,time_us,tflops,flops_total\n"


def read(tmp_path: Path, *lines: str) -> Record:
    path = tmp_path / "results.csv"
    path.write_text(HEAD + "".join(f"{line}\n" for line in lines))
    return store.load(path)


def test_a_published_2105_tflops_on_a_910b2_is_implausible(tmp_path: Path) -> None:
    flops = 2 * 2048 * 8192 * 256 + 2048 * 8192 + 2048 * (5 * 8192 - 2)
    time_us = flops / 2105e6
    found = read(
        tmp_path,
        "128,1024,128,npu_fused_attention,70.338,0.965268,67895040",
        "128,1024,128,jit_flash,19.200,3.536200,67895040",
        f"2048,8192,128,jit_flash,{time_us},2105,{flops}",
    )
    bad = found.rows[2]
    assert bad["status"] == "IMPLAUSIBLE"
    assert bad["reason"] == "2081 TFLOP/s is above the 353.9 TFLOP/s that an Ascend 910B2 can do in fp16"
    assert [bad[name] for name in ("time_us", "tflops", "tflops_gemm", "normalized_tflops", "gbps")] == [None] * 5
    assert [r["status"] for r in found.rows[:2]] == ["PASSED"] * 2
    assert "1 of 3 rows are IMPLAUSIBLE, and show no number: the details say why" in found.warnings
    shown = Tables(found).render("plain")
    assert "2105" not in shown
    assert "3.66×" in shown


def test_a_claim_beyond_the_peak_is_implausible_though_the_time_is_not(tmp_path: Path) -> None:
    found = read(tmp_path, "128,1024,128,npu_fused_attention,70.338,2105,67895040")
    assert found.rows[0]["status"] == "IMPLAUSIBLE"
    assert "IMPLAUSIBLE" in Tables(found).render("plain")


def test_a_rate_below_the_peak_is_not(tmp_path: Path) -> None:
    flops = 2 * 2048 * 8192 * 256
    found = read(tmp_path, f"2048,8192,128,npu_fused_attention,{flops / 353e6},,")
    assert found.rows[0]["status"] == "PASSED"
