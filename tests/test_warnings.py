"""attnbench.report.warnings: what is warned of and when, in one line that names the next step."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from helpers import ASCEND_CSV, DEVICE, attnbench, failed, header, passed

from attnbench import store
from attnbench.devices.known import known_device
from attnbench.report import text, warnings
from attnbench.report.tables import Tables
from attnbench.result import Conditions, Result
from attnbench.rows import csv_text, row
from attnbench.store import Gaps, Record


def record(*results: Result) -> Record:
    return Record(Path("r"), tuple(row(result, DEVICE) for result in results), DEVICE, results)


def told(*results: Result) -> list[str]:
    return [str(warning) for warning in warnings.of(record(*results))]


def with_conditions(result: Result, **fields: object) -> Result:
    assert result.measurement is not None
    measurement = dataclasses.replace(result.measurement, conditions=Conditions(**fields))  # type: ignore[arg-type]
    return dataclasses.replace(result, measurement=measurement)


STEADY = ((20.0,),) * 5


@pytest.mark.parametrize(
    ("gaps", "words"),
    [
        ((1, 0, 1), "of 1 case 1 is missing"),
        ((3, 0, 8), "of 8 cases 3 are missing"),
        ((0, 1, 2), "of 2 cases 1 has fewer blocks than asked for"),
        ((1, 2, 4), "of 4 cases 1 is missing and 2 have fewer blocks than asked for"),
    ],
)
def test_what_a_run_lacks_is_told(gaps: tuple[int, int, int], words: str) -> None:
    lacking = dataclasses.replace(record(passed("sdpa", *STEADY)), gaps=Gaps(*gaps))
    assert [str(warning) for warning in warnings.of(lacking)] == [
        f"incomplete: {words}: attnbench run --resume RUN goes on"
    ]


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


@pytest.mark.parametrize(
    ("protocol", "advice"),
    [
        ({"name": "adaptive", "budget_s": 20.0}, " or try --budget 60"),
        ({"name": "adaptive", "budget_s": 120.0}, " or try --budget 240"),
        ({"name": "fixed", "budget_s": 120.0}, " or try --protocol adaptive --budget 60"),
        (None, " or try --protocol adaptive --budget 60"),
    ],
)
def test_a_noisy_run_is_told_to_take_more_time_than_it_had(protocol: object, advice: str) -> None:
    results = (passed("sdpa", (20.0,), (24.0,), (18.0,), (21.0,), (20.0,)),)
    record = Record(Path("r"), tuple(row(r, DEVICE) for r in results), DEVICE, results, {"protocol": protocol})
    (words,) = map(str, warnings.of(record))
    assert words.endswith(advice)


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


def test_a_time_that_falls_while_work_grows_is_not_flat() -> None:
    large = passed("jit_flash", *((15.9,),) * 5, problem={"seqlen_q": 512})
    assert told(passed("jit_flash", *STEADY), large) == []


def test_a_backend_that_is_flat_in_several_configurations_is_told_of_once_by_the_widest() -> None:
    runs = [(False, 128), (False, 512), (True, 128), (True, 2048)]
    found = told(*(passed("a", *STEADY, problem={"seqlen_q": sq, "causal": causal}) for causal, sq in runs))
    assert [line.split(": ")[0].split("(")[1] for line in found] == ["128×1024 to 2048×1024)"]


def test_less_than_four_times_the_work_is_not_flat() -> None:
    assert told(passed("a", *STEADY), passed("a", *STEADY, problem={"seqlen_q": 384})) == []


def test_flatness_is_looked_for_within_one_configuration() -> None:
    assert told(passed("a", *STEADY), passed("a", *STEADY, problem={"heads_q": 8})) == []


def test_rounds_that_were_disturbed_are_counted_once_a_problem() -> None:
    conditions = {"rounds": 15, "rounds_dropped": 2, "rounds_disturbed": 1, "causes": ("other programs",)}
    both = [with_conditions(passed(name, *STEADY), **conditions) for name in ("sdpa", "jit_flash")]
    assert told(*both) == [
        "disturbed: 2 of 17 rounds were dropped and 1 kept disturbed: other programs; "
        "close other programs, or run again when it is quiet"
    ]


@pytest.mark.parametrize(
    ("dropped", "kept", "words"),
    [(12, 0, "12 of 312 rounds were dropped: "), (0, 7, "7 of 300 rounds were kept disturbed: "), (0, 0, None)],
)
def test_a_disturbance_says_how_many_of_all_rounds_were_taken(dropped: int, kept: int, words: str | None) -> None:
    fields = {"rounds": 300, "rounds_dropped": dropped, "rounds_disturbed": kept, "causes": ("steal",)}
    found = told(with_conditions(passed("a", *STEADY), **(fields if words else {"rounds": 300})))
    assert [line.startswith(f"disturbed: {words}steal; ") for line in found] == ([True] if words else [])


def test_of_a_backend_with_fewer_blocks_the_rounds_of_the_others_count() -> None:
    cut = with_conditions(passed("sdpa", *STEADY[:2]), rounds=6, rounds_dropped=1, causes=("steal",))
    whole = with_conditions(passed("jit_flash", *STEADY), rounds=15, rounds_dropped=3, causes=("steal",))
    assert [line[:48] for line in told(cut, whole)] == ["disturbed: 3 of 18 rounds were dropped: steal; c"]


def test_a_device_that_throttled_is_told_of_as_that_and_sends_nobody_to_close_programs() -> None:
    hot = with_conditions(passed("a", *STEADY), rounds=15, rounds_dropped=1, causes=("throttling (heat)",))
    cool = with_conditions(passed("a", *STEADY, problem={"seqlen_q": 129}), rounds=15)
    assert told(hot, cool) == [
        "throttled: throttling (heat) on 1 of 2 problems: let the device cool, or lock its clocks below the limit"
    ]
    both = with_conditions(
        passed("a", *STEADY), rounds=15, rounds_dropped=1, causes=("throttling (heat)", "other programs")
    )
    assert [line.split(":")[0] for line in told(both)] == ["throttled", "disturbed"]
    assert "dropped: other programs; " in told(both)[1]


def test_a_device_that_waits_for_the_host_is_told_of() -> None:
    (one,) = told(passed("a", *STEADY, timing={"host_us": 25.0}))
    assert one == (
        "host-bound: on 1 problem calling a took the host longer than running it took the device, so the queue could "
        "not be kept full and times hold launch gaps: time larger problems"
    )
    assert told(passed("a", *STEADY, timing={"host_us": 20.0})) == []
    for method in ("host_clock", "cuda_graph"):  # whose times hold no launch gap
        assert told(passed("a", *STEADY, timing={"host_us": 25.0, "timing_method": method})) == []


def test_what_no_graph_could_hold_is_told_of_with_the_reason() -> None:
    fallen = [passed("a", *STEADY, timing={"fallback": "it waits"}, problem={"seqlen_q": sq}) for sq in (128, 129)]
    line = (
        "timed otherwise: a on 2 problems by events around eager calls (it waits): these times may hold launch gaps, "
        "and no speedup is made of them and those of a graph"
    )
    assert told(*fallen) == [line]
    assert told(*fallen, passed("b", *STEADY, timing={"timing_method": "cuda_graph"})) == [line]


def test_a_csv_of_both_methods_tells_of_it_without_a_reason() -> None:
    results = passed("a", *STEADY), passed("b", *STEADY, timing={"timing_method": "cuda_graph"})
    rows = tuple(row(result, DEVICE) for result in results)
    (line,) = map(str, warnings.of(Record(Path("r"), rows, DEVICE)))
    assert line.startswith("timed otherwise: a on 1 problem by events around eager calls: these times may")
    assert not list(warnings.of(Record(Path("r"), rows[:1], DEVICE)))


def test_one_block_has_no_interval_and_says_so() -> None:
    assert told(passed("a", (20.0, 21.0))) == [
        "one block gives no interval and no verdict: leave --iters out or give at least 40, and let the run end"
    ]


def test_warnings_stand_also_where_only_the_baseline_has_a_time() -> None:
    tables = Tables(record(passed("sdpa", (20.0,), (34.0,)), failed("jit_flash")), "sdpa")
    shown = tables.render()
    assert not tables.comparisons
    assert shown.index("Warning: noisy: sdpa on ") < shown.index("### Details")


def test_the_published_table_has_one_warning_a_backend_that_is_flat() -> None:
    assert [line.split(": ")[1] for line in Tables(store.load(ASCEND_CSV)).warnings] == [
        "launch-bound? npu_fused_attention stays at about 70.3 µs over 32× more work (128×1024 to 512×8192)",
        "launch-bound? jit_flash stays at about 19.2 µs over 16× more work (128×1024 to 2048×1024)",
    ]


@pytest.mark.parametrize("style", [style for style in text.FORMATS if style != text.CSV])
def test_warnings_stand_below_the_captions_of_every_format_and_work_for_a_csv(style: str) -> None:
    published = Tables(store.load(ASCEND_CSV))
    shown = published.render(style)
    places = [shown.index(text.paragraph(line, style)) for line in (*published.captions, *published.warnings)]
    assert places == sorted(places)
    assert places[-1] < shown.rindex("Details")
    noisy = Tables(record(passed("sdpa", (20.0,), (34.0,)), passed("jit_flash", (20.0,), (24.0,))))
    assert text.paragraph(noisy.warnings[0], style) in noisy.render(style)
    assert noisy.warnings[0].startswith("Warning: noisy: ")


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
    assert "1 of 3 rows are IMPLAUSIBLE and show no number; the details say why" in found.warnings
    shown = Tables(found).render("plain")
    assert "2105" not in shown
    assert "3.66×" in shown


def test_an_implausible_row_is_as_empty_as_a_failed_one_and_is_read_back_as_that(tmp_path: Path) -> None:
    device = known_device("Ascend 910B2", "npu")
    written = [row(result, device) for result in (passed("fast", (0.1,), (0.1,)), failed("slow"), passed("ok"))]
    (tmp_path / "run.csv").write_text(csv_text(written))
    fast, slow, ok = store.load(tmp_path / "run.csv").rows
    kept = {"kernel", "status", "reason", "used_cores", "max_abs_err", "err_budget"}
    assert {name: fast[name] for name in fast if name not in kept} == {n: slow[n] for n in slow if n not in kept}
    assert (fast["status"], fast["max_abs_err"], ok["status"]) == ("IMPLAUSIBLE", 1e-4, "PASSED")
    (tmp_path / "again.csv").write_text(csv_text([fast, slow, ok]))
    assert store.load(tmp_path / "again.csv").rows == (fast, slow, ok)


def test_a_row_of_a_run_was_judged_when_it_ran(tmp_path: Path) -> None:
    fast = passed("fast", (0.1,), (0.1,))
    (tmp_path / "run.json").write_text(json.dumps(header()))
    (tmp_path / "results.jsonl").write_text(json.dumps(fast.to_json()) + "\n")
    (found,) = store.load(tmp_path).rows
    assert (found["status"], found["time_us"]) == ("PASSED", pytest.approx(0.1))


def test_where_every_row_is_implausible_the_details_say_so(tmp_path: Path) -> None:
    found = read(tmp_path, "128,1024,128,npu_fused_attention,0.1,,", "128,1024,128,jit_flash,0.01,,")
    shown = Tables(found).render()
    assert shown.startswith("### Details")
    assert shown.count("| IMPLAUSIBLE |") == 2
    assert (shown.count("671.1 TFLOP/s is above"), shown.count("6711 TFLOP/s is above")) == (1, 1)
    assert "2 of 2 rows are IMPLAUSIBLE and show no number; the details say why" in found.warnings
    answer = attnbench("report", found.source)
    assert answer.code == 0
    assert answer.out == shown + "\n"


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("npu", "910B2", "a 910B2"),
        ("npu", "Ascend 910B2", "an Ascend 910B2"),
        ("cuda", "NVIDIA H100", "an NVIDIA H100"),
    ],
)
def test_the_reason_names_the_device(tmp_path: Path, kind: str, name: str, words: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(f"{HEAD.strip()},dtype,device\n2048,8192,128,a,1,,,fp16,{kind}\n")
    assert f" that {words} can do in fp16" in store.load(path, name).rows[0]["reason"]


def test_of_a_device_or_dtype_whose_peak_is_not_known_nothing_is_implausible(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(f"{HEAD.strip()},dtype\n2048,8192,128,a,1,,,fp32\n")
    for name in (None, "910B2", "Toaster"):
        assert store.load(path, name).rows[0]["status"] == "PASSED"


def test_a_claim_beyond_the_peak_is_implausible_though_the_time_is_not(tmp_path: Path) -> None:
    found = read(tmp_path, "128,1024,128,npu_fused_attention,70.338,2105,67895040")
    assert found.rows[0]["status"] == "IMPLAUSIBLE"
    assert "IMPLAUSIBLE" in Tables(found).render("plain")


def test_a_rate_below_the_peak_is_not(tmp_path: Path) -> None:
    flops = 2 * 2048 * 8192 * 256
    found = read(tmp_path, f"2048,8192,128,npu_fused_attention,{flops / 353e6},,")
    assert found.rows[0]["status"] == "PASSED"
