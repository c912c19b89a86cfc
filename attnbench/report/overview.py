"""Owns the overview: all problems on all backends in one table, the fastest of each marked. Knows rows and ratios."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from attnbench import stats
from attnbench.report import text
from attnbench.report.text import FASTEST, NONE, TIE
from attnbench.result import DEVICE_EVENTS
from attnbench.rows import Row

FROM_BACKENDS = 4
"""With a time. Three have two speedup tables, one below the other, which say as much."""
DIGITS = 3
"""Of the fastest time; the others of its problem have as many decimals."""
MOST_DECIMALS = 3
"""What a time has elsewhere."""
COLUMN_GAP = 3
"""Between the texts of two columns: a space, a bar, a space."""
SHORT = {
    "UNSUPPORTED": "UNSUP.",
    "UNAVAILABLE": "UNAVAIL.",
    "IMPLAUSIBLE": "IMPLAUS.",
    "COMPILE_ERROR": "COMPILE",
    "RUNTIME_ERROR": "RUNTIME",
}
"""The statuses that would take the width of several columns."""
PARTS = 7
"""Of a case_id: batch, heads, two lengths, head size, dtype, and all suffixes."""
LENGTHS = (2, 3)
"""Where the query and key length stand in a case_id, which every label has."""


def parts(
    rows: Mapping[tuple[str, str], Row], device: str, ratio: Callable[[Row, Row], stats.Ratio | None], style: str
) -> list[str]:
    """A heading, the table and its legend in a tabulate format; nothing of fewer than FROM_BACKENDS backends.

    `rows` by case_id and backend; `ratio` gives a row's speedup over another's. A row is a problem or, where that is
    narrower, a backend; the parts of the problems' names then stand one below the other.
    """
    if len({row["kernel"] for row in rows.values() if row["time_us"] is not None}) < FROM_BACKENDS:
        return []
    cases, kernels = (list(dict.fromkeys(key[index] for key in rows)) for index in (0, 1))
    columns = [_cells([rows.get((case, kernel)) for kernel in kernels], ratio) for case in cases]
    common, labels = _labels(cases)
    by_problem = [["problem", *kernels]]
    by_problem += [["-".join(filter(None, label)), *cells] for label, cells in zip(labels, columns)]
    by_backend = [["" if index else "backend", *line] for index, line in enumerate(zip(*labels))]
    by_backend += [[kernel, *cells] for kernel, *cells in zip(kernels, *columns)]
    headers, *body = min(by_problem, by_backend, key=_width)
    legend = f"{FASTEST} is the fastest of its problem"
    if any(TIE in cell for cells in columns for cell in cells):
        legend += f", {TIE} ties with it at {stats.VERDICT_LEVEL:.0%}"
    if any("(" in cell for cells in columns for cell in cells):
        legend += "; what stands in parentheses was timed by events, may hold launch gaps, and is not ranked"
    return [
        text.heading(" · ".join(filter(None, ["Overview, µs", common, device])), style),
        text.table(headers, body, style, headers[:1]),
        text.paragraph(f"{legend}.", style),
    ]


def _cells(rows: Sequence[Row | None], ratio: Callable[[Row, Row], stats.Ratio | None]) -> list[str]:
    """What a problem's backends have to show, in their order."""
    timed = [row for row in rows if row is not None and row["time_us"] is not None]
    ranked = [row for row in timed if row["timing_method"] != DEVICE_EVENTS] or timed
    best = min(ranked, key=lambda row: float(row["time_us"]), default=None)
    decimals = 0 if best is None else min(max(DIGITS - 1 - math.floor(math.log10(best["time_us"])), 0), MOST_DECIMALS)

    def cell(row: Row | None) -> str:
        if row is None:
            return NONE
        if best is None or row["time_us"] is None:
            status = str(row["status"])
            return SHORT.get(status, status)
        time = f"{row['time_us']:.{decimals}f}"
        if row is best:
            return f"{FASTEST} {time}"
        if row["timing_method"] != best["timing_method"]:
            return f"({time})"
        found = ratio(row, best)
        return f"{TIE} {time}" if found is not None and found.verdict == "tie" else time

    return [cell(row) for row in rows]


def _labels(cases: Sequence[str]) -> tuple[str, list[list[str]]]:
    """What all case_ids share, and of each the parts that differ and the lengths, as many of each."""
    split = [(case.split("-", PARTS - 1) + [""] * PARTS)[:PARTS] for case in cases]
    kept = [index for index in range(PARTS) if index in LENGTHS or len({words[index] for words in split}) > 1]
    common = "-".join(word for index, word in enumerate(split[0]) if word and index not in kept)
    return common, [[words[index] for index in kept] for words in split]


def _width(table: Sequence[Sequence[str]]) -> int:
    return sum(max(map(len, column)) + COLUMN_GAP for column in zip(*table))
