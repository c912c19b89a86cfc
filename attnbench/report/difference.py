"""Owns what changed between two runs, as a table: times, speedups, how cases ended. Knows no file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from attnbench import stats
from attnbench.report import text
from attnbench.report.tables import Tables
from attnbench.report.text import NONE
from attnbench.rows import Row

COLUMNS = ("case", "kernel", "before", "now", "vs baseline before", "now", "change", "verdict")
TEXT_COLUMNS = ("case", "kernel", "verdict")
PASSED = "PASSED"


@dataclass(frozen=True)
class _Case:
    row: Row
    ratio: stats.Ratio | None

    @property
    def shown(self) -> str:
        """Its time, or how it ended without one."""
        time_us = self.row["time_us"]
        return str(self.row["status"]) if time_us is None else f"{time_us:.3f} µs"


def difference(before: Tables, now: Tables) -> str:
    """The cases of `now` beside the same ones of `before`, in plain text.

    A change is that of the speedup over the baseline, since the machine itself changes from run to run; of a case
    without a speedup it is that of the time, which has no verdict.
    """
    old, new = _cases(before), _cases(now)
    cells, changes = [], []
    for key, case in new.items():
        was = old.get(key)
        change = None if was is None else _change(was, case)
        if change is not None:
            changes.append(change)
        cells.append(
            [
                *key,
                NONE if was is None else was.shown,
                case.shown,
                _ratio(was.ratio if was else None),
                _ratio(case.ratio),
                NONE if change is None else f"{change.value - 1:+.1%}",
                _verdict(was, case, change),
            ]
        )
    return "\n\n".join([text.table(COLUMNS, cells, "simple", TEXT_COLUMNS), _summary(changes)])


def _cases(tables: Tables) -> Mapping[tuple[str, str], _Case]:
    """Every case but the baseline's own, which stands in the others' speedups."""
    ratios = {
        (row["case_id"], comparison.contender): ratio
        for comparison in tables.comparisons
        for (row, _), ratio in zip(comparison.rows, comparison.ratios)
    }
    rows = {(row["case_id"], row["kernel"]): row for row in tables.record.rows}
    others = {key: row for key, row in rows.items() if key[1] != tables.baseline}
    return {key: _Case(row, ratios.get(key)) for key, row in (others or rows).items()}


def _change(before: _Case, now: _Case) -> stats.Ratio | None:
    """How many times faster it is than before; None where one of the two has no time, or was timed by other means."""
    if before.row["timing_method"] != now.row["timing_method"]:
        return None
    if before.ratio is not None and now.ratio is not None:
        halves = [
            None if None in pair else math.hypot(*pair)  # type: ignore[arg-type]
            for pair in (
                (before.ratio.half, now.ratio.half),
                (before.ratio.verdict_half, now.ratio.verdict_half),
            )
        ]
        return stats.Ratio(now.ratio.value / before.ratio.value, *halves)
    times = before.row["time_us"], now.row["time_us"]
    return None if None in times else stats.Ratio(times[0] / times[1])


def _ratio(ratio: stats.Ratio | None) -> str:
    return NONE if ratio is None else f"{ratio.value:.2f}×"


def _verdict(before: _Case | None, now: _Case, change: stats.Ratio | None) -> str:
    if before is None:
        return "new"
    if now.row["status"] != before.row["status"]:
        return (
            "mended"
            if now.row["status"] == PASSED
            else "broken"
            if before.row["status"] == PASSED
            else "failed otherwise"
        )
    return NONE if change is None or change.verdict == "-" else change.verdict


def _summary(changes: list[stats.Ratio]) -> str:
    if not changes:
        return "compared with the last run: no case has a time in both"
    mean = stats.geometric_mean([change.value for change in changes])
    return f"compared with the last run: geometric mean {mean:.3f}×{''.join(_counts(changes))}"


def _counts(changes: list[stats.Ratio]) -> Iterator[str]:
    for verdict in ("faster", "tie", "slower"):
        count = sum(change.verdict == verdict for change in changes)
        if count:
            yield f", {count} {verdict}"
