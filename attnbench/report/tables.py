"""Owns the tables: speedup over a baseline, and the details behind every number. Knows rows alone."""

from __future__ import annotations

import functools
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from attnbench import stats
from attnbench.errors import AttnbenchError
from attnbench.plan import BEST, DEFAULT_BASELINES, match
from attnbench.report import overview, text, warnings
from attnbench.report.text import NONE
from attnbench.result import CUDA_GRAPH, DEVICE_EVENTS, NPU_GRAPH, Result, speedup
from attnbench.rows import COLUMNS, FLOAT_COLUMNS, Row, csv_text
from attnbench.store import Record

LEVELS = f"verdicts at {stats.VERDICT_LEVEL:.0%}, intervals shown at {stats.SHOWN_LEVEL:.0%}"
SHORT_NAMES = {"npu_fused_attention": "Fused", "jit_flash": "JIT"}
"""How the published table names its two columns; every other backend goes by its own name."""
FIRST_CONTENDER = "jit_flash"
FALLBACK_BASELINES = ("npu_fused_attention", "gemm_ref")

DETAIL_COLUMNS = (
    *("case", "kernel", "status", "µs", "timed by", "95% interval", "n", "blocks"),
    *("vs baseline", "95% interval of it", "verdict", "detectable"),
    *("GEMM TFLOP/s", "GB/s", "% of peak", "host µs", "max error", "budget", "1e-3", "reason"),
)
DETAIL_TEXT_COLUMNS = ("case", "kernel", "status", "timed by", "verdict", "1e-3", "reason")
TIMED_SIDE_BY_SIDE = (frozenset({CUDA_GRAPH, DEVICE_EVENTS}), frozenset({NPU_GRAPH, DEVICE_EVENTS}))
"""Methods that one run may have: a call that no graph can hold is timed by events. No ratio is made of the two."""


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """The rows as a DataFrame with results.csv's columns; whole numbers that may be missing are Int64.

    Floats are float64 also where no row has one.
    """
    table = pd.DataFrame.from_records(list(rows), columns=list(COLUMNS))
    whole = ("n_samples", "n_blocks", "used_cores")
    return table.astype(dict.fromkeys(whole, "Int64") | dict.fromkeys(FLOAT_COLUMNS, "float64"))


@dataclass(frozen=True)
class Comparison:
    """One contender against the baseline, over the problems of one configuration."""

    contender: str
    baseline: str | None
    configuration: str
    """case_id without its lengths: b1-h1-d128-fp16."""
    rows: tuple[tuple[Row, Row | None], ...]
    """(contender's row, baseline's row) by problem."""
    ratios: tuple[stats.Ratio | None, ...]

    @property
    def headers(self) -> tuple[str, ...]:
        base = "Baseline" if self.baseline is None else SHORT_NAMES.get(self.baseline, self.baseline)
        name = SHORT_NAMES.get(self.contender, self.contender)
        base = "Best" if self.baseline == BEST else base
        return ("S0", "S1", f"{base} µs", f"{name} µs", "Speedup", f"{name} TFLOP/s", f"Normalized {name} TFLOP/s")

    @property
    def cells(self) -> list[list[str]]:
        return [
            [
                str(row["sq"]),
                str(row["sk"]),
                _number(base and base["time_us"], 3),
                _number(row["time_us"], 3),
                NONE if ratio is None else f"{ratio.value:.2f}×",
                _number(row["tflops"], 2),
                _number(row["normalized_tflops"], 2),
            ]
            for (row, base), ratio in zip(self.rows, self.ratios)
        ]

    @property
    def summary(self) -> str:
        """The geometric mean of the speedups, and how many problems went which way."""
        ratios = [ratio for ratio in self.ratios if ratio is not None]
        if not ratios:
            return f"{self.contender}: nothing to compare with"
        mean = stats.geometric_mean([ratio.value for ratio in ratios])
        counts = [(verdict, sum(r.verdict == verdict for r in ratios)) for verdict in ("faster", "tie", "slower")]
        words = ", ".join(f"{count} {verdict}" for verdict, count in counts if count)
        problems = text.counted(len(ratios), "problem")
        line = f"{self.contender} over {self.baseline}: geometric mean {mean:.2f}× on {problems}"
        return f"{line} ({words}; {LEVELS})" if words else line

    @property
    def detectable(self) -> str:
        """The smallest difference that could have been told from a tie, in words; empty without intervals."""
        found = [
            (ratio.detectable, row["case_id"])
            for (row, _), ratio in zip(self.rows, self.ratios)
            if ratio is not None and ratio.detectable is not None
        ]
        if not found:
            return ""
        median, (worst, case) = statistics.median(share for share, _ in found), max(found)
        line = f"smallest difference that could have been detected: {text.share(median, 1)}"
        return line if len(found) == 1 else f"{line} (median; worst {text.share(worst, 1)} at {case})"


class Tables:
    """The tables of one run or CSV, against one baseline."""

    def __init__(self, record: Record, baseline: str | None = None) -> None:
        """Raises AttnbenchError where the baseline is not in the record, or its times were taken in several ways."""
        self.record = record
        self._rows: Mapping[tuple[str, str], Row] = {(r["case_id"], r["kernel"]): r for r in record.rows}
        self._results: Mapping[tuple[str, str], Result] = {r.key: r for r in record.results}
        self._kernels = tuple(dict.fromkeys(row["kernel"] for row in record.rows))
        self._refuse_mixed_methods()
        self.baseline = self._choose_baseline(baseline)
        self.comparisons = self._compare()

    def _refuse_mixed_methods(self) -> None:
        timed = [row for row in self.record.rows if row["time_us"] is not None]
        methods = sorted({_method(row) for row in timed})
        ways = {(row["statistic"], row["cache"]) for row in timed}
        if len(methods) > 1 and (len(ways) > 1 or self._methods not in TIMED_SIDE_BY_SIDE):
            raise AttnbenchError(
                f"{self.record.source} mixes times taken in different ways: {' and '.join(methods)}",
                "one table holds one way of timing: split the file",
            )

    @functools.cached_property
    def _methods(self) -> set[str | None]:
        return {row["timing_method"] for row in self.record.rows if row["time_us"] is not None}

    def _choose_baseline(self, asked: str | None) -> str | None:
        """The baseline asked for, or else the run's own, or else the device's; one with a time where there is one."""
        own = self.record.header.get("baseline")  # of any type, and of no result yet where the run was interrupted
        if asked is None and own in (BEST, *self._kernels):
            return str(own)
        if asked is not None:
            miss = f"the baseline {asked!r} is not in {self.record.source}"
            return asked if asked == BEST else match(asked, self._kernels, also=(BEST,), miss=miss)
        if len(self._kernels) < 2:
            return None
        preferred = (DEFAULT_BASELINES[self.record.device.kind], *FALLBACK_BASELINES)
        others = [kernel for kernel in self._kernels if kernel != FIRST_CONTENDER]
        candidates: list[str] = [*(name for name in preferred if name in self._kernels), *others]
        timed = {row["kernel"] for row in self.record.rows if row["time_us"] is not None}
        if len(timed) == 1 and preferred[0] not in timed:  # it is the contender, and nothing to compare with has a time
            return next((name for name in candidates if name not in timed), candidates[0])
        return next((name for name in candidates if name in timed), candidates[0])

    def _compare(self) -> tuple[Comparison, ...]:
        contenders = [k for k in self._kernels if k != self.baseline] or list(self._kernels)
        contenders.sort(key=lambda kernel: kernel != FIRST_CONTENDER)
        found = []
        for contender in contenders:
            configurations: dict[str, list[tuple[Row, Row | None]]] = {}
            for (case, kernel), row in self._rows.items():
                if kernel == contender:
                    pair = (row, self._baseline_row(case, kernel))
                    configurations.setdefault(re.sub(r"-q\d+-k\d+", "", case), []).append(pair)
            for configuration, pairs in configurations.items():
                if any(row["time_us"] is not None for row, _ in pairs):
                    ratios = tuple(self._ratio(row, base) for row, base in pairs)
                    found.append(Comparison(contender, self.baseline, configuration, tuple(pairs), ratios))
        return tuple(found)

    def _baseline_row(self, case: str, contender: str) -> Row | None:
        """The row that a contender's is compared with; None where there is none that was timed as it was."""
        own = self._rows[case, contender]
        base = self._rival(case, contender)
        return None if base is None or _incomparable(own, base) else base

    def _rival(self, case: str, contender: str) -> Row | None:
        """The baseline's row, however it was timed; for BEST the fastest, if any of those timed as the contender."""
        if self.baseline == BEST:
            rivals = [self._rows.get((case, kernel)) for kernel in self._kernels if kernel != contender]
            timed = [row for row in rivals if row is not None and row["time_us"] is not None]
            own = self._rows[case, contender]
            return min(timed, key=lambda row: (_incomparable(own, row), float(row["time_us"])), default=None)
        if self.baseline is None or self.baseline == contender:
            return None
        return self._rows.get((case, self.baseline))

    def _ratio(self, row: Row, base: Row | None) -> stats.Ratio | None:
        if base is None or row["time_us"] is None or base["time_us"] is None:
            return None
        ours, theirs = (self._results.get((r["case_id"], r["kernel"])) for r in (row, base))
        if ours and theirs and ours.measurement and theirs.measurement:
            return speedup(theirs.measurement, ours.measurement)
        return stats.Ratio(base["time_us"] / row["time_us"])

    @property
    def detail_rows(self) -> list[list[str]]:
        """One row a (problem, backend), in DETAIL_COLUMNS."""
        return [self._details(key, row) for key, row in self._rows.items()]

    def _details(self, key: tuple[str, str], row: Row) -> list[str]:
        base = self._baseline_row(*key)
        ratio = self._ratio(row, base)
        result = self._results.get(key)
        rival = self._rival(*key)
        reason = row["reason"] or ""
        if rival is not None and _incomparable(row, rival):
            reason = f"no speedup: {rival['kernel']} was timed by {rival['timing_method']}"
        elif self.baseline == BEST and ratio is not None and rival is not None:
            reason = reason or f"beside {rival['kernel']}"
        classic = "" if result is None or result.check is None else ("ok" if result.check.classic_ok else "off")
        return [
            row["case_id"],
            row["kernel"],
            row["status"],
            _number(row["time_us"], 3),
            (row["timing_method"] or NONE) if len(self._methods) > 1 else NONE,
            _interval(row["ci95_low_us"], row["ci95_high_us"], 3),
            _number(row["n_samples"], 0),
            _number(row["n_blocks"], 0),
            NONE if ratio is None else f"{ratio.value:.2f}×",
            NONE if ratio is None or ratio.interval is None else _interval(*ratio.interval, 2),
            NONE if ratio is None or ratio.verdict == "-" else ratio.verdict,
            NONE if ratio is None or ratio.detectable is None else text.share(ratio.detectable, 1),
            _number(row["tflops_gemm"], 2),
            _number(row["gbps"], 1),
            _number(row["pct_peak"], 1),
            # On a CPU a call is over when it returns: that is its time, which stands there already.
            _number(None if row["timing_method"] == "host_clock" else row["host_us"], 1),
            _error(row["max_abs_err"]),
            _error(row["err_budget"]),
            classic or NONE,
            reason,
        ]

    def render(self, style: str = "github", details: bool = True) -> str:
        """All tables in a tabulate format, speedups first, an overview last; `csv` gives results.csv's text instead."""
        if style == text.CSV:
            return csv_text(self.record.rows)
        parts = []
        for comparison in self.comparisons:
            against = f" vs {comparison.baseline}" if comparison.baseline else ""
            title = f"{comparison.contender}{against} · {comparison.configuration} · {self.record.device.name}"
            parts.append(text.heading(title, style))
            parts.append(text.table(comparison.headers, comparison.cells, style))
            parts.append(text.paragraph(comparison.summary, style))
            if comparison.detectable:
                parts.append(text.paragraph(comparison.detectable, style))
        compared = bool(parts)
        if compared:
            parts += [text.paragraph(line, style) for line in self.captions]
        parts += [text.paragraph(line, style) for line in self.warnings]
        if details or not compared:
            parts.append(text.heading("Details", style))
            parts.append(_without_empty_columns(DETAIL_COLUMNS, self.detail_rows, style))
        parts += overview.parts(self._rows, self.record.device.name, self._ratio, style)  # last: a terminal shows it
        return "\n\n".join(parts)

    @functools.cached_property
    def warnings(self) -> tuple[str, ...]:
        """What to beware of in these numbers, and what to do about it."""
        return tuple(f"Warning: {warning}" for warning in warnings.of(self.record))

    @property
    def captions(self) -> list[str]:
        """What the numbers mean and what they do not."""
        timed = next(row for row in self.record.rows if row["time_us"] is not None)
        if len(self._methods) > 1:
            methods = " or ".join(sorted(map(str, self._methods)))
            timed = timed | {"timing_method": f"{methods} as the details say"}
        cores, name = self.record.device.cores, self.record.device.name
        projection = f"{cores} cores of {name}" if cores else f"cores of {name} (not known)"
        return [
            f"Times: {_method(timed)}. Speedup is the baseline's time over the contender's.{self._about_blocks}",
            "TFLOP/s counts 2·sq·sk·(d+e) for the two GEMMs, sq·sk for the scale and sq·(5·sk−2) for the softmax; "
            "masked pairs do not count.",
            f"Normalized TFLOP/s = TFLOP/s · ({projection}) / cores the problem occupies: a projection, not a "
            "measurement. % of peak in the details is measured: GEMM TFLOP/s over the device's peak.",
        ]

    @property
    def _about_blocks(self) -> str:
        """How times and intervals follow from the blocks; empty where nothing has an interval."""
        shown = [row for row in self.record.rows if row["ci95_low_us"] is not None]
        if not shown:
            return ""
        median = shown[0]["statistic"] == "median"
        over = (
            "the geometric mean of its blocks' medians, corrected for the machine's pace"
            if median
            else "the mean of all its calls"
        )
        return f" A time is {over}; {LEVELS}, both t-intervals over blocks."


def _without_empty_columns(headers: Sequence[str], rows: Sequence[Sequence[str]], style: str) -> str:
    """The details' table without the columns that say nothing of any row, as most are for a plain CSV."""
    kept = [index for index in range(len(headers)) if any(row[index] not in ("", NONE) for row in rows)]
    return text.table(
        [headers[index] for index in kept], [[row[index] for index in kept] for row in rows], style, DETAIL_TEXT_COLUMNS
    )


def check_table(results: Sequence[Result], style: str) -> str:
    """What `attnbench check` prints: every verdict with the error and the budget it had."""
    headers = ("case", "kernel", "status", "max error", "budget", "1e-3", "worst inputs", "rows", "reason")
    cells = []
    for result in results:
        check = result.check
        cells.append(
            [
                result.problem.case_id,
                result.backend,
                result.status.value,
                _error(check.max_abs_err if check else None),
                _error(check.err_budget if check else None),
                NONE if check is None else ("ok" if check.classic_ok else "off"),
                check.inputs if check else NONE,
                f"{check.rows_checked}/{check.rows_total}" if check else NONE,
                result.reason,
            ]
        )
    return text.table(headers, cells, style, ("case", "kernel", "status", "1e-3", "worst inputs", "reason"))


def json_text(rows: Sequence[Row]) -> str:
    """The rows as a JSON array of objects with results.csv's columns; null where there is no value."""
    return json.dumps(list(rows), indent=2, allow_nan=False)


def _incomparable(row: Row, other: Row) -> bool:
    """Whether both have times that were taken by different methods, so that their ratio means nothing."""
    timed = row["time_us"] is not None and other["time_us"] is not None
    return bool(timed and row["timing_method"] != other["timing_method"])


def _method(row: Row) -> str:
    """How a row was timed, in words."""
    parts = [row["statistic"], row["timing_method"], row["cache"] and f"{row['cache']} cache"]
    return ", ".join(part for part in parts if part) or "as published"


def _number(value: object, digits: int) -> str:
    return NONE if value is None or isinstance(value, str) else f"{value:.{digits}f}"


def _error(value: float | None) -> str:
    return NONE if value is None else f"{value:.2e}"


def _interval(low: float | None, high: float | None, digits: int) -> str:
    return NONE if low is None or high is None else f"{low:.{digits}f} to {high:.{digits}f}"
