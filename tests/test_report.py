"""attnbench.report: the published table to the digit, what a table may not show, and text that stays text."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
import math
import re
from pathlib import Path

import pytest
from helpers import ASCEND_CSV, DEVICE, HOSTILE, failed, passed
from tabulate import tabulate_formats

from attnbench import store
from attnbench.devices import DeviceInfo
from attnbench.errors import AttnbenchError, ExitCode
from attnbench.report import text
from attnbench.report.tables import DETAIL_COLUMNS, Comparison, Tables, check_table, frame, json_text
from attnbench.result import Result, Status
from attnbench.rows import COLUMNS, csv_text, row
from attnbench.store import Record
from attnbench.text import one_line

PUBLISHED = {
    (128, 1024): ["70.338", "19.200", "3.66×", "3.54", "84.87"],
    (2048, 8192): ["126.845", "107.780", "1.18×", "80.63", "120.95"],
}

SHOWN = [name for name in DETAIL_COLUMNS if name != "timed by"]
"""The details of a run whose times were all taken by one method."""


def record(*results: Result, device: DeviceInfo = DEVICE) -> Record:
    return Record(Path("a-run"), tuple(row(r, device) for r in results), device, results)


def at(seqlen_q: int, backend: str, *times: float, **fields: object) -> Result:
    """A result of one block a time."""
    return passed(backend, *((t,) for t in times), problem={"seqlen_q": seqlen_q}, **fields)


def published(*words: str, device_name: str | None = None) -> str:
    return Tables(store.load(ASCEND_CSV, device_name), *words).render()


def grid(rendered: str) -> list[list[list[str]]]:
    """The tables of a github rendering, each a list of rows of cells, headers first."""
    tables: list[list[list[str]]] = [[]]
    for line in rendered.splitlines():
        if line.startswith("|"):
            tables[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif tables[-1]:
            tables.append([])
    return [[table[0], *table[2:]] for table in tables if table]


# --- the published table ----------------------------------------------------------------------------------------------


def test_the_published_table_is_reproduced() -> None:
    table = grid(published())[0]
    assert table[0] == ["S0", "S1", "Fused µs", "JIT µs", "Speedup", "JIT TFLOP/s", "Normalized JIT TFLOP/s"]
    assert len(table) == 21
    assert {len(cells) for cells in table} == {7}
    by_shape = {(int(cells[0]), int(cells[1])): cells[2:] for cells in table[1:]}
    assert {shape: by_shape[shape] for shape in PUBLISHED} == PUBLISHED
    lengths = [(sq, sk) for sq in (128, 256, 512, 1024, 2048) for sk in (1024, 2048, 4096, 8192)]
    assert list(by_shape) == lengths


def test_every_published_cell_follows_from_the_csv() -> None:
    with open(ASCEND_CSV, newline="") as file:
        lines = list(csv.DictReader(file))
    times = {(int(r["sq"]), int(r["sk"]), r["kernel"]): float(r["time_us"]) for r in lines}
    ratios = []
    for cells in grid(published())[0][1:]:
        sq, sk = int(cells[0]), int(cells[1])
        fused, jit = times[sq, sk, "npu_fused_attention"], times[sq, sk, "jit_flash"]
        tflops = (4 * sq * sk * 128 + sq * sk + sq * (5 * sk - 2)) / jit / 1e6
        normalized = tflops * 24 / min(24, math.ceil(sq / 128))
        ratios.append(fused / jit)
        assert cells[2:] == [f"{fused:.3f}", f"{jit:.3f}", f"{fused / jit:.2f}×", f"{tflops:.2f}", f"{normalized:.2f}"]
    mean = math.prod(ratios) ** (1 / len(ratios))
    assert f"jit_flash over npu_fused_attention: geometric mean {mean:.2f}× on 20 problems\n" in published()


def test_the_published_report_says_what_its_numbers_are() -> None:
    shown = published()
    assert shown.startswith("### jit_flash vs npu_fused_attention · b1-h1-d128-fp16 · Ascend 910B2\n")
    assert "Times: as published." in shown
    assert "2·sq·sk·(d+e)" in shown
    assert "24 cores of Ascend 910B2" in shown
    assert "a projection, not a measurement" in shown
    details = grid(shown)[-1]
    assert details[0] == ["case", "kernel", "status", "µs", "vs baseline", "GEMM TFLOP/s", "GB/s", "% of peak"]
    assert len(details) == 41
    assert details[2][1:4] == ["jit_flash", "PASSED", "19.200"]
    gemm = 4 * 128 * 1024 * 128 / 19.2 / 1e6
    assert details[2][4] == "3.66×"
    assert details[2][5:] == [f"{gemm:.2f}", f"{2 * 2 * 1152 * 128 / 19.2 / 1e3:.1f}", f"{gemm / 353.9 * 100:.1f}"]


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("910B3", "70.72", f"{80.6308 * 20 / 16:.2f}"), ("Ascend 910B1", "84.87", "120.95"), ("Toaster", "—", "—")],
)
def test_device_name_changes_the_normalized_column_alone(name: str, first: str, last: str) -> None:
    table, before = grid(published(device_name=name))[0], grid(published())[0]
    assert [cells[:6] for cells in table] == [cells[:6] for cells in before]
    assert (table[1][6], table[20][6]) == (first, last)


@pytest.mark.parametrize("style", [s for s in text.FORMATS if s != text.CSV])
def test_every_tabulate_format_shows_the_published_numbers(style: str) -> None:
    shown = html.unescape(Tables(store.load(ASCEND_CSV)).render(style))
    for numbers in PUBLISHED.values():
        assert [n for n in numbers if n not in shown] == []
    assert "Normalized JIT TFLOP/s" in shown


def test_the_formats_are_tabulates_and_csv() -> None:
    assert (*tabulate_formats, "csv") == text.FORMATS


def test_csv_is_the_text_of_results_csv() -> None:
    loaded = store.load(ASCEND_CSV)
    assert Tables(loaded).render("csv") == csv_text(loaded.rows)
    assert len(list(csv.reader(io.StringIO(csv_text(loaded.rows))))) == 41


# --- baselines, headers, order ----------------------------------------------------------------------------------------


def test_other_backends_stand_under_their_own_names() -> None:
    tables = Tables(record(at(1, "sdpa", 10.0), at(1, "gemm_ref", 40.0), at(1, "jit_flash", 5.0)), "gemm_ref")
    assert [c.headers[2:] for c in tables.comparisons] == [
        ("gemm_ref µs", "JIT µs", "Speedup", "JIT TFLOP/s", "Normalized JIT TFLOP/s"),
        ("gemm_ref µs", "sdpa µs", "Speedup", "sdpa TFLOP/s", "Normalized sdpa TFLOP/s"),
    ]
    assert [c.cells[0][2:5] for c in tables.comparisons] == [
        ["40.000", "5.000", "8.00×"],
        ["40.000", "10.000", "4.00×"],
    ]


@pytest.mark.parametrize(
    "kernels", [("a", "jit_flash", "sdpa"), ("sdpa", "a", "jit_flash"), ("jit_flash", "sdpa", "a")]
)
def test_the_first_table_is_jit_flashs(kernels: tuple[str, ...]) -> None:
    tables = Tables(record(*(at(1, kernel, 10.0) for kernel in kernels)), "sdpa")
    assert [c.contender for c in tables.comparisons] == ["jit_flash", "a"]


@pytest.mark.parametrize(
    ("kind", "kernels", "baseline"),
    [
        ("npu", ("jit_flash", "sdpa", "npu_fused_attention"), "npu_fused_attention"),
        ("cuda", ("jit_flash", "npu_fused_attention", "sdpa"), "sdpa"),
        ("cpu", ("gemm_ref", "jit_flash", "sdpa"), "sdpa"),
        ("cpu", ("other", "jit_flash", "gemm_ref"), "gemm_ref"),
        ("cpu", ("jit_flash", "other", "another"), "other"),
        ("cpu", ("jit_flash",), None),
    ],
)
def test_the_default_baseline_is_the_devices(kind: str, kernels: tuple[str, ...], baseline: str | None) -> None:
    device = dataclasses.replace(DEVICE, kind=kind)
    results = [at(1, kernel, 10.0, device=kind) for kernel in kernels]
    assert Tables(record(*results, device=device)).baseline == baseline


@pytest.mark.parametrize(
    ("timed", "untimed", "baseline"),
    [
        (("jit_flash", "gemm_ref"), ("npu_fused_attention",), "gemm_ref"),
        (("jit_flash", "other"), ("npu_fused_attention", "gemm_ref", "sdpa"), "other"),
        (("jit_flash",), ("gemm_ref", "npu_fused_attention"), "npu_fused_attention"),
        (("gemm_ref",), ("npu_fused_attention",), "npu_fused_attention"),
        (("sdpa",), ("jit_flash",), "sdpa"),
        ((), ("gemm_ref", "npu_fused_attention"), "npu_fused_attention"),
    ],
)
def test_the_default_baseline_is_one_with_a_time(
    timed: tuple[str, ...], untimed: tuple[str, ...], baseline: str
) -> None:
    device = dataclasses.replace(DEVICE, kind="cpu")
    results = [*(failed(kernel, seqlen_q=1) for kernel in untimed), *(at(1, kernel, 10.0) for kernel in timed)]
    tables = Tables(record(*results, device=device))
    assert tables.baseline == baseline
    if "jit_flash" in timed:
        assert tables.comparisons[0].headers[2] == {"npu_fused_attention": "Fused µs"}.get(baseline, f"{baseline} µs")


def test_a_runs_own_baseline_is_the_default() -> None:
    plain = record(at(1, "jit_flash", 1.0), at(1, "sdpa", 2.0), at(1, "gemm_ref", 3.0))
    for own in ("gemm_ref", "best"):
        run = dataclasses.replace(plain, header={"baseline": own})
        assert Tables(run).baseline == own
        assert Tables(run, "sdpa").baseline == "sdpa"
    for other in (None, "interrupted_before_its_first", 5, ["sdpa"], {}, True):
        assert Tables(dataclasses.replace(plain, header={"baseline": other})).baseline == Tables(plain).baseline


def test_one_backend_alone_has_times_and_no_speedup() -> None:
    comparison = Tables(record(at(1, "jit_flash", 10.0))).comparisons[0]
    assert comparison.headers[2] == "Baseline µs"
    assert comparison.cells[0][2:5] == ["—", "10.000", "—"]
    assert comparison.summary == "jit_flash: nothing to compare with"


def test_best_is_the_fastest_other_of_each_problem() -> None:
    results = [
        *(at(1, "a", 10.0), at(1, "b", 20.0), at(1, "jit_flash", 5.0)),
        *(at(2, "a", 30.0), at(2, "b", 15.0), at(2, "jit_flash", 60.0)),
        *(at(3, "a", 8.0), failed("b", seqlen_q=3), at(3, "jit_flash", 8.0)),
    ]
    comparisons = Tables(record(*results), "best").comparisons
    assert comparisons[0].headers[2] == "Best µs"
    assert [c[2:5] for c in comparisons[0].cells] == [
        ["10.000", "5.000", "2.00×"],
        ["15.000", "60.000", "0.25×"],
        ["8.000", "8.000", "1.00×"],
    ]
    assert [c[2:5] for c in comparisons[1].cells] == [
        ["5.000", "10.000", "0.50×"],
        ["15.000", "30.000", "0.50×"],
        ["8.000", "8.000", "1.00×"],
    ]
    assert [c.contender for c in comparisons] == ["jit_flash", "a", "b"], "with best, every backend is a contender"
    details = [
        [row[DETAIL_COLUMNS.index(name)] for name in ("kernel", "reason")]
        for row in Tables(record(*results), "best").detail_rows
    ]
    assert details[:3] == [["a", "beside jit_flash"], ["b", "beside jit_flash"], ["jit_flash", "beside a"]]
    assert details[3:6] == [["a", "beside b"], ["b", "beside a"], ["jit_flash", "beside b"]]


def test_a_baseline_that_is_not_there_is_refused() -> None:
    with pytest.raises(AttnbenchError) as caught:
        Tables(record(at(1, "a", 1.0), at(1, "b", 1.0)), "sdpa")
    assert (caught.value.message, caught.value.hint) == ("the baseline 'sdpa' is not in a-run", "there are a, b, best")
    assert caught.value.exit_code == ExitCode.USAGE


def test_a_baseline_is_named_by_a_unique_prefix_too() -> None:
    found = record(*(at(1, kernel, 1.0) for kernel in ("flash", "flash_attn", "flex")))
    chosen = [Tables(found, word).baseline for word in ("flash", "flash_", "fle", "best")]
    assert chosen == ["flash", "flash_attn", "flex", "best"]
    with pytest.raises(AttnbenchError, match="backend 'fl' could be flash, flash_attn, flex"):
        Tables(found, "fl")
    with pytest.raises(AttnbenchError) as caught:
        Tables(found, "flsh")
    assert caught.value.hint == "did you mean flash?"


def test_a_baseline_that_failed_leaves_the_contenders_times() -> None:
    tables = Tables(record(failed("sdpa", seqlen_q=1), at(1, "jit_flash", 5.0), at(2, "jit_flash", 6.0)), "sdpa")
    assert [c[2:5] for c in tables.comparisons[0].cells] == [["—", "5.000", "—"], ["—", "6.000", "—"]]


def test_a_contender_that_failed_shows_no_number() -> None:
    tables = Tables(record(at(1, "sdpa", 9.0), failed(seqlen_q=1), at(2, "sdpa", 9.0), at(2, "jit_flash", 3.0)), "sdpa")
    assert [c[2:] for c in tables.comparisons[0].cells] == [
        ["9.000", "—", "—", "—", "—"],
        ["9.000", "3.000", "3.00×", *tables.comparisons[0].cells[1][5:]],
    ]
    assert tables.comparisons[0].summary == "jit_flash over sdpa: geometric mean 3.00× on 1 problem"


def test_every_configuration_has_a_table_of_its_own() -> None:
    results = [
        passed(kernel, (time,), problem={"seqlen_q": sq, **shape})
        for shape in ({}, {"causal": True}, {"dtype": "bf16"}, {"heads_q": 8, "heads_kv": 2})
        for sq in (1, 2)
        for kernel, time in (("sdpa", 8.0), ("jit_flash", 4.0))
    ]
    comparisons = Tables(record(*results)).comparisons
    names = ["b1-h1-d128-fp16", "b1-h1-d128-fp16-causal", "b1-h1-d128-bf16", "b1-h8x2-d128-fp16"]
    assert [c.configuration for c in comparisons] == names
    assert [[cells[0] for cells in c.cells] for c in comparisons] == [["1", "2"]] * 4
    assert Tables(record(*results)).render().count("Speedup |") == 4


def test_nothing_passed_shows_details_only() -> None:
    tables = Tables(record(failed("sdpa", Status.OOM, "no room"), failed(reason="broke")))
    assert tables.comparisons == ()
    for details in (True, False):
        shown = tables.render(details=details)
        assert shown.startswith("### Details\n")
        assert "Speedup" not in shown
        case = "b1-h1-q128-k1024-d128-fp16"
        assert grid(shown)[0] == [
            ["case", "kernel", "status", "reason"],
            [case, "sdpa", "OOM", "no room"],
            [case, "jit_flash", "RUNTIME_ERROR", "broke"],
        ]


@pytest.mark.parametrize(
    "timing", [{"statistic": "mean"}, {"timing_method": "host_clock"}, {"cache": "cold"}], ids=lambda t: next(iter(t))
)
def test_one_table_never_mixes_ways_of_timing(timing: dict[str, str]) -> None:
    with pytest.raises(AttnbenchError) as caught:
        Tables(record(at(1, "a", 1.0), at(1, "b", 1.0, timing=timing)))
    assert "a-run mixes times taken in different ways: " in caught.value.message
    words = "median, device_events, hot cache"
    assert words in caught.value.message
    assert Tables(record(at(1, "a", 1.0), failed("b", seqlen_q=1))).captions[0].startswith(f"Times: {words}.")


GRAPH = {"timing_method": "cuda_graph"}


def mixed(baseline: str | None = None) -> Tables:
    """Of three backends `b` is timed by events, since its call cannot be captured."""
    results = [
        *(at(sq, "a", 6.0, 6.0, timing=GRAPH) for sq in (1, 2)),
        *(at(sq, "b", 3.0, 3.0, timing={"fallback": "it waits for the device"}) for sq in (1, 2)),
        *(at(sq, "c", 12.0, 12.0, timing=GRAPH) for sq in (1, 2)),
    ]
    return Tables(record(*results), baseline)


def test_times_of_graphs_and_of_events_stand_in_one_run_and_no_ratio_is_made_of_them() -> None:
    tables = mixed("a")
    assert {c.contender: [cells[2:5] for cells in c.cells] for c in tables.comparisons} == {
        "b": [["—", "3.000", "—"]] * 2,
        "c": [["6.000", "12.000", "0.50×"]] * 2,
    }
    assert tables.comparisons[0].summary == "b: nothing to compare with"
    at_ = {name: DETAIL_COLUMNS.index(name) for name in ("kernel", "timed by", "vs baseline", "verdict", "reason")}
    details = {row[at_["kernel"]]: [row[index] for index in at_.values()] for row in tables.detail_rows}
    assert details == {
        "a": ["a", "cuda_graph", "—", "—", ""],
        "b": ["b", "device_events", "—", "—", "no speedup: a was timed by cuda_graph"],
        "c": ["c", "cuda_graph", "0.50×", "slower", ""],
    }
    assert tables.captions[0].startswith("Times: median, cuda_graph or device_events as the details say, hot cache.")
    assert any("it waits for the device" in line for line in tables.warnings)


def test_the_best_of_the_others_is_one_that_was_timed_as_the_contender() -> None:
    shown = {c.contender: [cells[2:5] for cells in c.cells] for c in mixed("best").comparisons}
    assert shown == {
        "a": [["12.000", "6.000", "2.00×"]] * 2,
        "b": [["—", "3.000", "—"]] * 2,
        "c": [["6.000", "12.000", "0.50×"]] * 2,
    }


def test_a_run_of_one_method_does_not_say_so_in_every_row() -> None:
    tables = Tables(record(at(1, "a", 1.0, timing=GRAPH), at(1, "b", 1.0, timing=GRAPH)))
    assert {row[DETAIL_COLUMNS.index("timed by")] for row in tables.detail_rows} == {"—"}
    assert tables.captions[0].startswith("Times: median, cuda_graph, hot cache.")


@pytest.mark.parametrize("timing", [{"statistic": "mean"}, {"cache": "cold"}], ids=lambda t: next(iter(t)))
def test_what_two_methods_may_not_hide(timing: dict[str, str]) -> None:
    with pytest.raises(AttnbenchError, match="mixes times taken in different ways"):
        Tables(record(at(1, "a", 1.0, timing=GRAPH), at(1, "b", 1.0, timing=timing)))


# --- intervals and verdicts -------------------------------------------------------------------------------------------

T_975_3 = 3.182446305284263
T_995_3 = 5.840909309733355
"""Student's t with 3 degrees of freedom, from a table."""


@pytest.mark.parametrize(
    ("contender", "verdict"),
    [((5.0, 5.1, 4.9, 5.0), "faster"), ((20.0, 21.0, 19.0, 20.0), "slower"), ((10.0, 11.0, 9.5, 9.9), "tie")],
)
def test_a_speedup_whose_interval_includes_1_is_a_tie(contender: tuple[float, ...], verdict: str) -> None:
    baseline = (10.0, 10.2, 9.9, 10.1)
    tables = Tables(record(at(1, "sdpa", *baseline), at(1, "jit_flash", *contender)), "sdpa")
    ratio = tables.comparisons[0].ratios[0]
    assert ratio is not None
    logs = [math.log(b / c) for b, c in zip(baseline, contender)]
    mean = sum(logs) / 4
    half = T_975_3 * math.sqrt(sum((v - mean) ** 2 for v in logs) / 3) / 2
    value = math.exp(mean)
    assert ratio.value == pytest.approx(value)
    assert ratio.interval == pytest.approx((value * math.exp(-half), value * math.exp(half)), rel=1e-9)
    assert ratio.detectable == pytest.approx(math.expm1(half * T_995_3 / T_975_3))
    assert ratio.verdict == verdict
    row, base = tables.comparisons[0].rows[0]
    assert base is not None
    assert ratio.value == pytest.approx(base["time_us"] / row["time_us"]), "the ratio of the times that are printed"
    details = dict(zip(DETAIL_COLUMNS, tables.detail_rows[1]))
    assert details["verdict"] == verdict
    assert tables.comparisons[0].cells[0][4] == f"{value:.2f}×"
    assert details["95% interval of it"] == f"{value * math.exp(-half):.2f} to {value * math.exp(half):.2f}"
    assert dict(zip(DETAIL_COLUMNS, tables.detail_rows[0]))["vs baseline"] == "—", "the baseline is not its own rival"


def test_noise_that_both_shared_cancels() -> None:
    """Blocks are paired: a machine twice as slow in one round says nothing about the speedup."""
    noise = (1.0, 2.0, 1.0, 1.5)
    tables = Tables(
        record(at(1, "sdpa", *(10 * n for n in noise)), at(1, "jit_flash", *(9 * n for n in noise))), "sdpa"
    )
    ratio = tables.comparisons[0].ratios[0]
    assert ratio is not None
    assert (ratio.interval, ratio.verdict) == (pytest.approx((10 / 9, 10 / 9)), "faster")


def test_the_summary_is_the_geometric_mean_with_its_verdicts() -> None:
    results = []
    for sq, ours in enumerate((5.0, 20.0, 2.5, 10.0), 1):
        results += [at(sq, "sdpa", 10.0, 10.0, 10.1), at(sq, "jit_flash", ours, ours, ours * (1.0 + (sq == 4) * 0.2))]
    summary = Tables(record(*results), "sdpa").comparisons[0].summary
    assert summary == (
        "jit_flash over sdpa: geometric mean 1.40× on 4 problems "
        "(2 faster, 1 tie, 1 slower; verdicts at 99%, intervals shown at 95%)"
    )


def test_the_smallest_difference_that_could_have_been_detected_stands_below_each_table() -> None:
    """Log ratios of ±step around their mean have a standard deviation of step·√(4/3)."""
    results = []
    for sq, step in enumerate((0.001, 0.002, 0.01), 1):
        base = [10 * math.exp(step * sign) for sign in (1, -1, 1, -1)]
        results += [at(sq, "sdpa", *base), at(sq, "jit_flash", 5.0, 5.0, 5.0, 5.0)]
    tables = Tables(record(*results), "sdpa")
    low, middle, high = (math.expm1(T_995_3 * step * math.sqrt(4 / 3) / 2) for step in (0.001, 0.002, 0.01))
    line = f"detected: {middle:.1%} (median; worst {high:.1%} at b1-h1-q3-k1024-d128-fp16)"
    assert line == "detected: 0.7% (median; worst 3.4% at b1-h1-q3-k1024-d128-fp16)"
    assert tables.comparisons[0].detectable == f"smallest difference that could have been {line}"
    below = tables.render("plain").split("\n\n")[2:4]
    assert below == [tables.comparisons[0].summary, tables.comparisons[0].detectable]
    details = [dict(zip(DETAIL_COLUMNS, cells))["detectable"] for cells in tables.detail_rows]
    assert details == ["—", f"{low:.1%}", "—", f"{middle:.1%}", "—", f"{high:.1%}"]


def test_of_one_problem_the_detectable_difference_is_its_own_and_without_intervals_there_is_none() -> None:
    pair = (at(1, "sdpa", 10.0, 10.0), at(1, "jit_flash", 5.0, 5.0))
    line = "smallest difference that could have been detected: 0.0%"
    assert Tables(record(*pair), "sdpa").comparisons[0].detectable == line
    assert Tables(store.load(ASCEND_CSV)).comparisons[0].detectable == ""
    assert "smallest difference" not in published()


@pytest.mark.parametrize(
    ("statistic", "words"),
    [
        ("median", "the geometric mean of its blocks' medians, corrected for the machine's pace"),
        ("mean", "the mean of all its calls"),
    ],
)
def test_the_caption_says_what_a_time_is_and_which_levels_hold(statistic: str, words: str) -> None:
    tables = Tables(record(at(1, "sdpa", 10.0, 10.1, timing={"statistic": statistic})))
    assert tables.captions[0].endswith(
        f"A time is {words}; verdicts at 99%, intervals shown at 95%, both t-intervals over blocks."
    )
    assert "verdicts" not in published()


def test_a_difference_that_95_percent_would_show_and_99_percent_does_not_is_a_tie() -> None:
    baseline = [10 * math.exp(0.02 + 0.02 * sign) for sign in (1, -1, 1, -1)]
    tables = Tables(record(at(1, "sdpa", *baseline), at(1, "jit_flash", 9.8, 9.8, 9.8, 9.8)), "sdpa")
    (ratio,) = tables.comparisons[0].ratios
    assert ratio is not None
    assert ratio.interval is not None
    assert ratio.interval[0] > 1
    assert ratio.verdict == "tie"


def test_a_csv_has_no_blocks_and_so_no_verdict() -> None:
    details = [dict(zip(DETAIL_COLUMNS, cells)) for cells in Tables(store.load(ASCEND_CSV)).detail_rows]
    assert (details[1]["vs baseline"], details[1]["verdict"], details[1]["95% interval of it"]) == ("3.66×", "—", "—")


def test_details_show_error_budget_and_the_classic_verdict() -> None:
    off = dataclasses.replace(passed().check, classic_ok=False)
    tables = Tables(record(dataclasses.replace(passed(), check=off), passed("sdpa"), failed("x", reason="why")))
    details = [dict(zip(DETAIL_COLUMNS, cells)) for cells in tables.detail_rows]
    assert [d["1e-3"] for d in details] == ["off", "ok", "—"]
    assert [d["max error"] for d in details] == ["1.00e-04", "1.00e-04", "—"]
    assert [d["budget"] for d in details] == ["4.00e-04", "4.00e-04", "—"]
    assert [d["reason"] for d in details] == ["", "", "why"]
    assert (details[0]["n"], details[0]["host µs"], details[2]["n"]) == ("4", "5.0", "—")


# --- hostile text -----------------------------------------------------------------------------------------------------

HOSTILE_RECORD = record(
    at(1, "jit_flash", 5.0, 5.1),
    *(failed(f"k{n}", reason=words, seqlen_q=1) for n, words in enumerate(HOSTILE)),
    *(at(1, words, 5.0, 5.1) for words in HOSTILE),
    device=dataclasses.replace(DEVICE, name="".join(HOSTILE)),
)


def hostile(style: str) -> str:
    return Tables(HOSTILE_RECORD, HOSTILE[0]).render(style)


@pytest.mark.parametrize("style", text.FORMATS)
def test_no_format_lets_control_codes_through(style: str) -> None:
    shown = hostile(style)
    assert {c for c in shown if not c.isprintable()} <= {"\n", "\t"}
    assert "two lines more" in html.unescape(shown).replace("\\", "")


def test_markdown_keeps_its_columns_and_shows_text_as_it_is() -> None:
    shown = hostile("github")
    assert "<" not in shown
    assert not re.search(r"(?<!\\)(`|\][(\[:])", shown)
    assert [{len(cells) for cells in table} for table in grid(shown)] == [
        *[{7}] * len(HOSTILE),
        {len(SHOWN)},
        {2},
    ]
    details, overview = grid(shown)[-2:]
    assert details[0] == SHOWN
    reasons = [re.sub(r"\\(.)", r"\1", html.unescape(cells[-1])) for cells in details[2 : 2 + len(HOSTILE)]]
    names = [re.sub(r"\\(.)", r"\1", html.unescape(cells[0])) for cells in overview[-len(HOSTILE) :]]
    expected = [one_line(words) for words in HOSTILE]
    assert reasons == names == expected


@pytest.mark.parametrize("style", ["html", "unsafehtml"])
def test_html_has_no_tag_but_the_tables_own(style: str) -> None:
    shown = hostile(style)
    tags = set(re.findall(r"<\s*/?\s*([^\s>/]+)", shown))
    assert tags == {"table", "thead", "tbody", "tr", "th", "td", "h3", "p"}
    assert set(re.findall(r"<\w+([^>]*)>", shown)) <= {"", ' style="text-align: right;"'}
    assert "<script>alert(1)</script>" in html.unescape(shown)


@pytest.mark.parametrize("style", [s for s in text.FORMATS if s.startswith("latex")])
def test_latex_has_no_command_but_the_tables_own(style: str) -> None:
    shown = "\n".join(line for line in hostile(style).splitlines() if not line.startswith("%"))
    own = {"begin", "end", "hline", "toprule", "midrule", "bottomrule", "endhead", "textbackslash", "ensuremath"}
    commands = set(re.findall(r"\\([A-Za-z]+)", shown))
    assert commands <= own | {"textasciitilde", "textasciicircum", "approx", "star"}
    assert "textbackslash" in commands
    assert not re.search(r"(?<!\\)[$#_%^~]", shown)
    # {T}} and the like would close what they did not open.
    assert all(line.count("{") == line.count("}") for line in re.sub(r"\\[{}]", "", shown).splitlines())


def test_latex_prose_is_all_comments() -> None:
    prose = [p for p in hostile("latex_raw").split("\n\n") if "begin{tabular}" not in p]
    assert prose
    assert all(line.startswith("% ") for p in prose for line in p.splitlines())


@pytest.mark.parametrize("style", [s for s in text.FORMATS if s.startswith("latex")])
def test_latex_has_its_own_sign_for_a_tie(style: str) -> None:
    names = ("sdpa", "jit_flash", "a", "b")
    times = ((10.0, 11.0), (11.0, 10.0), (20.0, 21.0), (30.0, 31.0))
    shown = Tables(record(*(at(1, name, *us) for name, us in zip(names, times))), "sdpa").render(style)
    assert re.search(r"\\ensuremath\{\\approx\} \d+", shown)
    assert not [line for line in shown.splitlines() if "≈" in line and not line.startswith("% ")]


def test_jira_macros_links_and_images_are_escaped() -> None:
    shown = hostile("jira")
    assert "\\{html\\}" in shown
    cells = re.sub(r"\\.", "", shown)
    assert not re.search(r"[\[\]{}!]", cells)
    before, overview = cells.split("Overview")
    for line in before.splitlines():
        if line.startswith("| "):
            assert line.count("|") == 1 + (7 if line.count("|") < 10 else len(SHOWN))
    assert {line.count("|") for line in overview.splitlines() if line.startswith("| ")} == {1 + 2}


def test_mediawiki_templates_links_and_tags_are_escaped() -> None:
    shown = hostile("mediawiki")
    body = shown.replace('{| class="wikitable" style="text-align: left;"', "").replace("|}", "")
    assert not re.search(r"\{\{|\[|<(?!!-- caption -->)|''", body)
    assert "&#123;&#123;T&#125;&#125;" in body


def test_hostile_csv_is_harmless_cells() -> None:
    lines = list(csv.reader(io.StringIO(hostile("csv"))))
    assert {len(line) for line in lines} == {len(COLUMNS)}
    assert not [cell for line in lines[1:] for cell in line if cell[:1] in ("=", "+", "@")]


def test_markup_in_plain_styles_is_left_as_it_is() -> None:
    """Nothing here goes through rich or a browser: brackets are letters."""
    assert "[bold]x[/bold]" in hostile("plain")


# --- check, json, frame -----------------------------------------------------------------------------------------------


def test_the_check_table_shows_verdict_error_and_inputs() -> None:
    table = grid(check_table([dataclasses.replace(passed(), measurement=None), failed(reason="a|b")], "github"))[0]
    assert table[0] == ["case", "kernel", "status", "max error", "budget", "1e-3", "worst inputs", "rows", "reason"]
    assert table[1][1:] == ["jit_flash", "PASSED", "1.00e-04", "4.00e-04", "ok", "normal", "128/128", ""]
    assert table[2][1:] == ["jit_flash", "RUNTIME_ERROR", "—", "—", "—", "—", "—", "a\\|b"]


def test_json_has_the_columns_and_null_for_nothing() -> None:
    data = json.loads(json_text(record(passed("jit_flash", (20.0,), (20.0,)), failed("x")).rows))
    assert [list(entry) for entry in data] == [list(COLUMNS)] * 2
    assert (data[0]["time_us"], data[1]["time_us"], data[1]["reason"], data[0]["causal"]) == (
        20.0,
        None,
        "it broke",
        False,
    )


FLOATS = (
    *("time_us", "tflops", "mean_us", "median_us", "p10_us", "p90_us", "ci95_low_us", "ci95_high_us", "host_us"),
    *("tflops_gemm", "gbps", "pct_peak", "normalized_tflops", "max_abs_err", "err_budget", "clock_mhz"),
)


@pytest.mark.parametrize(
    "results",
    [(passed(), failed("x")), (passed(timing={"clock_mhz": None}, used_cores=None),), (failed("x"), failed("y"))],
    ids=["mixed", "some columns empty", "nothing passed"],
)
def test_a_frames_types_do_not_depend_on_its_values(results: tuple[Result, ...]) -> None:
    table = frame(record(*results).rows)
    assert list(table.columns) == list(COLUMNS)
    assert {str(table[c].dtype) for c in FLOATS} == {"float64"}
    assert {str(table[c].dtype) for c in ("n_samples", "n_blocks", "used_cores")} == {"Int64"}
    whole = ("sq", "sk", "head_size", "flops_total", "batch", "heads_q", "heads_kv", "head_dim_v", "schema_version")
    assert {str(table[c].dtype) for c in whole} == {"int64"}
    assert str(table["causal"].dtype) == "bool"
    assert list(table["kernel"]) == [r.backend for r in results]
    assert list(table["time_us"].isna()) == [r.measurement is None for r in results]


def test_a_comparison_without_a_ratio_has_seven_cells() -> None:
    only = record(passed()).rows[0]
    comparison = Comparison("jit_flash", "sdpa", "c", ((only, None),), (None,))
    assert len(comparison.headers) == len(comparison.cells[0]) == 7


@pytest.mark.parametrize("style", ["github", "pipe"])
@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("- x", "\\- x"),
        ("+ x", "\\+ x"),
        ("# x", "\\# x"),
        ("* x", "\\* x"),
        ("> x", "&gt; x"),
        ("1. x", "1\\. x"),
        ("12) x", "12\\) x"),
        ("~~~ x", "\\~\\~\\~ x"),
        ("&lt;b&gt;", "&amp;lt;b&amp;gt;"),
        ("3.66× on 1. x", "3.66× on 1. x"),
        ("jit_flash: x", "jit_flash: x"),
    ],
)
def test_prose_in_markdown_begins_no_list_and_no_heading(style: str, line: str, shown: str) -> None:
    assert text.paragraph(line, style) == shown


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("*a* `b` |c| d_ e_f \\g", "\\*a\\* \\`b\\` \\|c\\| d\\_ e_f \\\\g"),
        (".. raw:: html", "\\.. raw:: html"),
        ("- x", "\\- x"),
        ("a. x", "a\\. x"),
        ("jit_flash", "jit_flash"),
    ],
)
def test_rst_markup_is_escaped_in_prose_and_cells(words: str, shown: str) -> None:
    assert text.paragraph(words, "rst") == shown
    assert shown in text.table(("a", "b"), [["x", words]], "rst")


def test_a_tsv_cell_is_no_formula() -> None:
    assert "'=1+1" in text.table(("a", "b"), [["x", "=1+1"]], "tsv")


@pytest.mark.parametrize(
    ("words", "shown"), [("a\nb", "`a b`"), ("a`b", "`` a`b ``"), ("<b> [x](y)", "`<b> [x](y)`"), ("``", "``` `` ```")]
)
def test_code_is_one_span(words: str, shown: str) -> None:
    assert text.code(words) == shown


def test_json_on_a_terminal_is_ascii() -> None:
    shown = json_text(record(failed("x", reason="\x9b31m \u202e µ")).rows)
    assert shown.isascii()
    assert json.loads(shown)[0]["reason"] == "\x9b31m \u202e µ"


def test_the_usual_baseline_stays_it_where_every_contender_failed() -> None:
    """The one time that there is is the baseline's, and the reader's kernel is what has none."""
    tables = Tables(record(passed("npu_fused_attention"), failed("mine", Status.INCORRECT)))
    assert tables.baseline == "npu_fused_attention"
    assert "vs" not in tables.render().split("### Details")[0]
    assert "INCORRECT" in tables.render()


def test_a_share_that_means_nothing_is_not_spelled_out() -> None:
    assert (text.share(0.106, 1), text.share(10.0, 0), text.share(2.1e65, 1)) == ("10.6%", "1000%", "over 1000%")
