"""attnbench.rows: the columns, the numbers in them, and CSVs of any origin."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import statistics
from pathlib import Path

import pytest
from helpers import DEVICE, HOSTILE, failed, passed

from attnbench.devices import DeviceInfo
from attnbench.errors import AttnbenchError, ExitCode
from attnbench.result import Check, Result, Status
from attnbench.rows import COLUMNS, Row, csv_text, load_csv, row
from attnbench.text import printable

CONTRACT = """
sq,sk,head_size,kernel,time_us,tflops,flops_total,batch,heads_q,heads_kv,head_dim_v,dtype,causal,direction,
device,device_name,status,reason,timing_method,cache,statistic,n_samples,n_blocks,mean_us,median_us,p10_us,p90_us,
ci95_low_us,ci95_high_us,host_us,tflops_gemm,gbps,pct_peak,used_cores,normalized_tflops,max_abs_err,err_budget,
clock_mhz,case_id,schema_version""".replace("\n", "").split(",")
ASSUMED = "the CSV names no device: cpu with fp32 is assumed; say otherwise with --device-name"
HEADER = "sq,sk,head_size,kernel,time_us,tflops,flops_total\n"
MEASURED = (
    *("time_us", "tflops", "timing_method", "cache", "statistic", "n_samples", "n_blocks", "mean_us", "median_us"),
    *("p10_us", "p90_us", "ci95_low_us", "ci95_high_us", "host_us", "tflops_gemm", "gbps", "pct_peak"),
    *("normalized_tflops", "clock_mhz"),
)


def loaded(text: str, device_name: str | None = None) -> tuple[list[Row], DeviceInfo, list[str]]:
    return load_csv(Path("x.csv"), text, device_name)


def refusal(text: str) -> str:
    with pytest.raises(AttnbenchError) as caught:
        loaded(text)
    assert caught.value.exit_code == ExitCode.USAGE
    assert "\n" not in caught.value.message
    return caught.value.message


def cells(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_the_columns_are_those_of_the_contract_in_order() -> None:
    assert list(COLUMNS) == CONTRACT
    assert csv_text([]) == ",".join(CONTRACT) + "\n"


def test_a_rows_numbers_follow_from_the_times() -> None:
    blocks = ((10.0, 12.0, 14.0), (11.0, 13.0), (20.0,))
    times = [10.0, 12.0, 14.0, 11.0, 13.0, 20.0]
    got = row(passed("jit_flash", *blocks, used_cores=3), DEVICE)
    gemm = 2 * 128 * 1024 * (128 + 128)
    flops = gemm + 128 * 1024 + 128 * (1023 + 1024 + 1024 + 1023 + 1024)
    assert flops == 67_895_040
    assert got["flops_total"] == flops
    time_us = (12.0 * 12.0 * 20.0) ** (1 / 3)  # the geometric mean of the blocks' medians
    expected = {
        "time_us": time_us,
        "median_us": time_us,
        "mean_us": statistics.fmean(times),
        "p10_us": 10.5,  # between the first two of 10 11 12 13 14 20, half-way
        "p90_us": 17.0,
        "tflops": flops / (time_us * 1e-6) / 1e12,
        "tflops_gemm": gemm / (time_us * 1e-6) / 1e12,
        "gbps": 2 * (2 * 128 * 128 + 2 * 1024 * 128) / (time_us * 1e-6) / 1e9,
        "pct_peak": gemm / (time_us * 1e-6) / 1e12 / 100.0 * 100,
        "normalized_tflops": flops / (time_us * 1e-6) / 1e12 * 24 / 3,
    }
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    half = 4.302652729911275 * statistics.stdev([math.log(v) for v in (12.0, 12.0, 20.0)]) / math.sqrt(3)
    assert got["ci95_low_us"] == pytest.approx(time_us * math.exp(-half), rel=1e-9)
    assert got["ci95_high_us"] == pytest.approx(time_us * math.exp(half), rel=1e-9)
    facts = ("n_samples", "n_blocks", "used_cores", "statistic", "timing_method", "cache", "host_us", "clock_mhz")
    assert [got[name] for name in facts] == [6, 3, 3, "median", "device_events", "hot", 5.0, 1800.0]
    shape = ("sq", "sk", "head_size", "kernel", "batch", "heads_q", "heads_kv", "head_dim_v", "dtype", "causal")
    assert [got[name] for name in shape] == [128, 1024, 128, "jit_flash", 1, 1, 1, 128, "fp16", False]
    rest = ("direction", "device", "device_name", "status", "reason", "max_abs_err", "err_budget", "schema_version")
    assert [got[name] for name in rest] == ["fwd", "npu", "Test NPU", "PASSED", None, 1e-4, 4e-4, 1]
    assert got["case_id"] == "b1-h1-q128-k1024-d128-fp16"


def test_time_us_is_the_mean_where_the_statistic_is_the_mean() -> None:
    got = row(passed("jit_flash", (8.0, 8.0, 14.0), (18.0,), timing={"statistic": "mean"}), DEVICE)
    assert (got["time_us"], got["median_us"], got["statistic"]) == (12.0, pytest.approx(12.0), "mean")
    got = row(passed("jit_flash", (8.0, 8.0, 8.0), (18.0,), timing={"statistic": "mean"}), DEVICE)
    assert (got["time_us"], got["median_us"]) == (10.5, pytest.approx(12.0))


def test_every_dimension_has_its_own_column() -> None:
    shape = {
        "batch": 2,
        "heads_q": 8,
        "heads_kv": 4,
        "seqlen_q": 3,
        "seqlen_k": 5,
        "head_dim": 16,
        "head_dim_v": 32,
        "causal": True,
    }
    got = row(passed(problem=shape), DEVICE)
    names = ("batch", "heads_q", "heads_kv", "sq", "sk", "head_size", "head_dim_v", "causal")
    assert [got[name] for name in names] == list(shape.values())
    assert got["flops_total"] == 2 * 8 * (2 * (3 + 4 + 5) * 48 + 6 * (3 + 4 + 5) - 2 * 3)


@pytest.mark.parametrize(
    ("device", "used", "empty"),
    [
        (dataclasses.replace(DEVICE, cores=None), 1, {"normalized_tflops"}),
        (DEVICE, None, {"normalized_tflops", "used_cores"}),
        (dataclasses.replace(DEVICE, peak_tflops={"bf16": 100.0}), 1, {"pct_peak"}),
    ],
    ids=["device cores not known", "used cores not known", "no peak for the dtype"],
)
def test_what_is_not_known_stays_empty(device: DeviceInfo, used: int | None, empty: set[str]) -> None:
    got = row(passed(used_cores=used), device)
    assert {name for name in COLUMNS if got[name] is None} == empty | {"reason"}


def test_one_block_has_no_interval() -> None:
    got = row(passed("jit_flash", (1.0, 2.0)), DEVICE)
    assert (got["ci95_low_us"], got["ci95_high_us"], got["n_blocks"]) == (None, None, 1)


@pytest.mark.parametrize("status", [s for s in Status if s is not Status.PASSED])
def test_a_failed_row_has_no_number_of_a_measurement(status: Status) -> None:
    got = row(failed(status=status, reason="why"), DEVICE)
    assert {name: got[name] for name in MEASURED} == dict.fromkeys(MEASURED)
    assert (got["status"], got["reason"], got["flops_total"]) == (status.value, "why", 67_895_040)


def test_an_incorrect_row_keeps_its_error_and_budget() -> None:
    check = Check(
        max_abs_err=0.5, err_budget=1e-3, classic_ok=False, inputs="normal", rows_checked=1, rows_total=1, fault="off"
    )
    got = row(dataclasses.replace(failed(status=Status.INCORRECT), check=check), DEVICE)
    assert (got["max_abs_err"], got["err_budget"], got["time_us"]) == (0.5, 1e-3, None)


# --- cells ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["=", "+", "-", "@"])
def test_a_cell_never_starts_a_formula(start: str) -> None:
    for text in (f"{start}1+1", f" \t{start}1", f"\n{start}1", f"\x1b[1m{start}1", f"\x00{start}1"):
        cell = cells(csv_text([row(failed(reason=text), DEVICE)]))[0]["reason"]
        assert cell.startswith(f"'{start}1"), text


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_outside_stays_one_harmless_cell(text: str) -> None:
    out = csv_text([row(failed(reason=text), DEVICE), row(passed(), DEVICE)])
    assert out.count("\n") == 3, "a row is a line"
    assert all(c.isprintable() for c in out.replace("\n", ""))
    assert [c["kernel"] for c in cells(out)] == ["jit_flash", "jit_flash"]
    assert cells(out)[0]["reason"].lstrip("'").split() == printable(text).split()


def test_quotes_and_commas_come_back_as_they_were() -> None:
    text = 'no "x", only, commas'
    assert cells(csv_text([row(failed(reason=text), DEVICE)]))[0]["reason"] == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07after", "after"),
        ("\x1b]8;;http://x\x1b\\link", "link"),
        ("\x9b31mred", "31mred"),
        ("\x1bcreset", "creset"),
        ("a\x00\x07\x08b\r\x7f", "ab"),
        ("right\u202eleft\u2028line\ufeff", "rightleftline"),
        ("keeps\ttabs\nand lines µ× 注", "keeps\ttabs\nand lines µ× 注"),
        ("half \udcff", "half "),
    ],
)
def test_printable_removes_terminal_codes_and_nothing_else(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_missing_values_are_empty_and_booleans_are_words() -> None:
    shape = {"causal": True}
    got = cells(csv_text([row(passed(problem=shape, timing={"clock_mhz": None}), DEVICE), row(failed(), DEVICE)]))
    assert [c["causal"] for c in got] == ["true", "false"]
    assert (got[0]["clock_mhz"], got[1]["time_us"]) == ("", "")


# --- reading ----------------------------------------------------------------------------------------------------------

CASES: list[Result] = [
    passed("jit_flash"),
    passed("sdpa", (33.333333333, 1.0 / 3), (7.0,), timing={"statistic": "mean", "cache": "cold"}),
    failed("gemm_ref", Status.OOM, "no room"),
    passed(problem={"causal": True, "heads_q": 8, "heads_kv": 2, "window": 7}),
    passed(problem={"softmax_scale": 0.125, "head_dim_v": 64, "batch": 3}),
    failed("x", direction="bwd", status=Status.UNSUPPORTED),
]


def test_what_is_written_is_read_back_the_same() -> None:
    device = dataclasses.replace(DEVICE, peak_tflops={})
    written = [row(result, device) for result in CASES]
    read, got, warnings = loaded(csv_text(written))
    assert warnings == []
    assert (got.kind, got.name, got.cores) == ("npu", "Test NPU", 24)
    for before, after in zip(written, read, strict=True):
        assert list(after) == list(before)
        for column, value in before.items():
            close = pytest.approx(value, rel=1e-8, abs=0) if isinstance(value, float) else value
            assert after[column] == close, column


def test_a_plain_csv_with_the_published_baseline_is_taken_for_a_910b2() -> None:
    lines = (
        "128,1024,128,npu_fused_attention,70.338,0.965268,67895040\n4096,1024,128,jit_flash,100,21.7264,2172641280\n"
    )
    rows, device, warnings = loaded(HEADER + lines)
    assert (device.kind, device.name, device.cores, device.peak_tflops["fp16"]) == ("npu", "Ascend 910B2", 24, 353.9)
    assert [r["used_cores"] for r in rows] == [1, 24], "min(24, ceil(sq / 128))"
    assert rows[0]["normalized_tflops"] == pytest.approx(67895040 / 70.338 / 1e6 * 24)
    assert {(r["dtype"], r["status"], r["device"]) for r in rows} == {("fp16", "PASSED", "npu")}
    assert len(warnings) == 1
    assert "910B2 (24 cores" in warnings[0]
    assert "--device-name" in warnings[0]


@pytest.mark.parametrize(("seqlen_q", "cores"), [(1, 1), (128, 1), (129, 2), (3072, 24), (3073, 24)])
def test_used_cores_of_the_published_kernel_are_its_query_tiles(seqlen_q: int, cores: int) -> None:
    rows, _, _ = loaded(f"{HEADER}{seqlen_q},64,128,npu_fused_attention,9,,\n")
    assert rows[0]["used_cores"] == cores


@pytest.mark.parametrize(
    ("name", "cores", "normalized"), [("910B3", 20, 20 / 2), ("Ascend 910b1", 24, 24 / 2), ("Toaster 3000", None, None)]
)
def test_device_name_says_which_device_it_is(name: str, cores: int | None, normalized: float | None) -> None:
    rows, device, warnings = loaded(f"{HEADER}256,64,128,npu_fused_attention,9,,\n", name)
    assert (device.name, device.cores, warnings) == (name, cores, [])
    expected = None if normalized is None else pytest.approx(rows[0]["tflops"] * normalized)
    assert rows[0]["normalized_tflops"] == expected


def test_a_plain_csv_without_the_published_baseline_is_of_no_known_device() -> None:
    rows, device, warnings = loaded(f"{HEADER}256,64,128,sdpa,9,,\n")
    assert (device.kind, device.name, device.cores, rows[0]["normalized_tflops"]) == ("cpu", "unknown", None, None)
    assert warnings == [ASSUMED]


GOOD = "128,1024,128,jit_flash,19.2,3.5362,67895040\n"


@pytest.mark.parametrize(
    "text",
    [
        (HEADER + GOOD).replace("\n", "\r\n"),
        HEADER + "\n" + GOOD + "\n",
        HEADER.replace(",", " , ") + GOOD.replace(",", " , "),
        "kernel,sq,sk,head_size,time_us,tflops,flops_total,extra\njit_flash,128,1024,128,19.2,3.5362,67895040,x\n",
        HEADER + '"128","1024","128","jit_flash","1.92e1","3.5362","67895040"\n',
        HEADER + "128,1024,128,jit_flash,19.2,,\n",
    ],
    ids=["CRLF", "blank lines", "spaces", "other order and more columns", "quotes", "empty rates"],
)
def test_csv_dialects_read_the_same(text: str) -> None:
    rows, _, warnings = loaded(text)
    assert [(r["sq"], r["kernel"], r["time_us"], r["flops_total"]) for r in rows] == [
        (128, "jit_flash", 19.2, 67895040)
    ]
    assert rows[0]["tflops"] == pytest.approx(67.89504 / 19.2)
    assert warnings == [ASSUMED]


@pytest.mark.parametrize("column", HEADER.strip().split(","))
def test_a_lacking_column_is_named(column: str) -> None:
    text = HEADER.replace(column, "other") + GOOD
    assert refusal(text) == f"x.csv lacks the column {column}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.csv is empty"),
        (HEADER, "x.csv has no rows below its header"),
        (HEADER + "\n\n", "x.csv has no rows below its header"),
        (HEADER + GOOD + "128,2048,128,jit\n", "x.csv, line 3 has 4 fields of 7: is it cut?"),
        (HEADER + GOOD.replace("\n", ",more\n"), "x.csv, line 2 has 8 fields of 7: is it cut?"),
        (HEADER + GOOD + GOOD, "x.csv, line 3: b1-h1-q128-k1024-d128-fp32 on jit_flash is there twice"),
        (HEADER + GOOD.replace("128,", ",", 1), "x.csv, line 2: sq is empty"),
        (HEADER + GOOD.replace("jit_flash", " "), "x.csv, line 2: kernel is empty"),
        (HEADER + GOOD.replace("19.2", ""), "x.csv, line 2: jit_flash has no time_us"),
        (HEADER + '"' + "9" * 200_000 + '",1,1,x,1,1,1\n', "x.csv, line 2"),
        (HEADER.replace("\n", ",causal\n") + GOOD.replace("\n", ",yes\n"), "causal is 'yes': must be true or false"),
        (HEADER.replace("\n", ",dtype\n") + GOOD.replace("\n", ",fp64\n"), "x.csv, line 2: dtype must be one of"),
        (HEADER.replace("\n", ",heads_kv\n") + GOOD.replace("\n", ",2\n"), "x.csv, line 2: heads_kv must divide"),
        (HEADER.replace("\n", ",status\n") + GOOD.replace("\n", ",FINE\n"), "x.csv, line 2: status is 'FINE'"),
        (HEADER.replace("\n", ",device\n") + GOOD.replace("\n", ",tpu\n"), "x.csv, line 2: device is 'tpu'"),
        (HEADER.replace("\n", ",status\n") + GOOD.replace("\n", ",OOM\n"), "jit_flash is OOM and has a time_us"),
    ],
)
def test_a_bad_csv_is_refused_with_its_line(text: str, message: str) -> None:
    assert message in refusal(text)


@pytest.mark.parametrize("column", ["sq", "sk", "head_size", "flops_total"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "1e3", "nan", "abc", "0x10", "1_0", "9" * 5000])
def test_counts_must_be_whole_numbers(column: str, value: str) -> None:
    fields = dict(zip(HEADER.strip().split(","), GOOD.strip().split(","))) | {column: value}
    assert refusal(f"{HEADER}{','.join(fields.values())}\n").startswith(f"x.csv, line 2: {column} is '{value[:9]}")


@pytest.mark.parametrize("column", ["time_us", "tflops"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "-inf", "1e999", "abc", "1,5"])
def test_times_must_be_numbers_above_0(column: str, value: str) -> None:
    fields = dict(zip(HEADER.strip().split(","), GOOD.strip().split(","))) | {column: f'"{value}"'}
    message = refusal(f"{HEADER}{','.join(fields.values())}\n")
    assert message == f"x.csv, line 2: {column} is {value!r}: must be a number above 0"


@pytest.mark.parametrize("column", ["tflops", "mean_us", "ci95_low_us", "normalized_tflops", "host_us", "pct_peak"])
def test_a_failed_row_with_a_number_is_refused(column: str) -> None:
    """A time, a TFLOP/s or a speedup exists only on PASSED."""
    values = row(failed(), DEVICE) | {column: 3.5}
    assert refusal(csv_text([values])) == f"x.csv, line 2: jit_flash is RUNTIME_ERROR and has a {column}"


def test_the_line_named_is_the_files_own() -> None:
    text = HEADER.replace("\n", ",reason\n") + GOOD.replace("\n", ',"two\nlines"\n') + "\n" + "128,x,128,a,1,1,1,\n"
    assert refusal(text).startswith("x.csv, line 5: sk is 'x'")


def test_rows_of_several_devices_are_refused() -> None:
    rows = [row(passed(), DEVICE), row(passed("sdpa"), dataclasses.replace(DEVICE, name="Other NPU"))]
    assert refusal(csv_text(rows)) == "x.csv holds rows of several devices"


@pytest.mark.parametrize(
    ("line", "warning"),
    [
        ("128,1024,128,a,19.2,3.6,67895040", "x.csv, line 2: tflops is 3.6, its time gives 3.536"),
        ("128,1024,128,a,19.2,3.5362,67108864", "flops_total is 67108864, the formula gives 67895040"),
    ],
)
def test_numbers_that_disagree_with_the_formula_are_a_warning_and_recomputed(line: str, warning: str) -> None:
    rows, _, warnings = loaded(f"{HEADER}{line}\n")
    assert [w for w in warnings if w.endswith(warning)]
    assert rows[0]["flops_total"] == 67_895_040
    assert rows[0]["tflops"] == pytest.approx(67.89504 / 19.2)


@pytest.mark.parametrize("tflops", ["3.52", "3.5362", "3.56"])
def test_rounded_tflops_are_no_warning(tflops: str) -> None:
    _, _, warnings = loaded(f"{HEADER}128,1024,128,a,19.2,{tflops},67895040\n")
    assert not [w for w in warnings if "tflops" in w]


def test_a_last_line_without_its_break_is_a_warning() -> None:
    rows, _, warnings = loaded(HEADER + GOOD.strip())
    assert len(rows) == 1
    assert "x.csv: the last line has no line break; it may be cut" in warnings


def test_a_column_that_stands_twice_is_refused():
    text = "sq,sk,head_size,kernel,time_us,tflops,flops_total,time_us\n128,1024,128,sdpa,1,1,1,2\n"
    with pytest.raises(AttnbenchError, match="has the column time_us twice"):
        load_csv(Path("two.csv"), text, None)


def test_a_plain_csv_with_dtypes_has_only_its_device_assumed() -> None:
    rows, _, warnings = loaded(HEADER.replace("\n", ",dtype\n") + GOOD.replace("\n", ",bf16\n"))
    assert rows[0]["dtype"] == "bf16"
    assert warnings == ["the CSV names no device: cpu is assumed; say otherwise with --device-name"]


@pytest.mark.parametrize("suffix", ["w1.5", "w0", "s1-2", "w-3", "s1e400", "s0", "w" + "9" * 5000])
def test_a_case_id_that_cannot_be_read_is_named_with_its_line(suffix: str) -> None:
    message = refusal(HEADER.replace("\n", ",case_id\n") + GOOD.replace("\n", f",b1-{suffix}\n"))
    assert message.startswith("x.csv, line 2: ")
    assert f"b1-{suffix}"[:30] in message or "softmax_scale" in message


@pytest.mark.parametrize("scale", [1e20, 1e-12, 0.3])
def test_every_softmax_scale_comes_back_from_the_case_id(scale: float) -> None:
    written = row(passed(problem={"softmax_scale": scale}), DEVICE)
    assert loaded(csv_text([written]))[0][0]["case_id"] == written["case_id"]


@pytest.mark.parametrize(
    ("column", "value", "fault"),
    [
        ("sq", "1" + "0" * 320, "must have at most 100 digits"),
        ("head_size", "1" + "0" * 700, "must have at most 100 digits"),
        ("sk", str(2**53), "must be below 2**53"),
        ("time_us", "1e-320", "must be between 1e-09 and 1e+15"),
        ("time_us", "1e16", "must be between 1e-09 and 1e+15"),
        ("tflops", "1e300", "must be between 1e-30 and 1e+30"),
    ],
)
def test_numbers_beyond_all_measure_are_refused(column: str, value: str, fault: str) -> None:
    fields = dict(zip(HEADER.strip().split(","), GOOD.strip().split(","))) | {column: value}
    message = refusal(f"{HEADER}{','.join(fields.values())}\n")
    assert message.startswith(f"x.csv, line 2: {column} is '{value[:9]}"[:40])
    assert message.endswith(fault)
    assert len(message) < 150


def test_a_size_beyond_a_problems_is_refused_with_its_line() -> None:
    assert refusal(HEADER + GOOD.replace("1024", str(2**41))) == "x.csv, line 2: seqlen_k must be at most 2**40"


def test_the_rates_of_the_smallest_and_the_largest_time_come_back() -> None:
    huge = {"batch": 2**40, "heads_q": 2**20, "seqlen_q": 2**20}
    written = [
        row(passed("slow", (1e15,), problem={"seqlen_q": 1, "seqlen_k": 1, "head_dim": 1}), DEVICE),
        row(passed("huge", (1e15,), problem=huge), DEVICE),
    ]
    read = loaded(csv_text(written))[0]
    assert [r["flops_total"] for r in read] == [r["flops_total"] for r in written]
    assert [r["gbps"] for r in read] == pytest.approx([r["gbps"] for r in written], rel=1e-8)
