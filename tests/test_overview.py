"""attnbench.report.overview: all problems on all backends in one table, which is the fastest, and what ties with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import ASCEND_CSV, DEVICE, failed, passed

from attnbench import store
from attnbench.report import text
from attnbench.report.tables import Tables
from attnbench.result import Result, Status
from attnbench.rows import row
from attnbench.store import Record

GRAPH = {"timing_method": "cuda_graph"}


def tables(*results: Result) -> Tables:
    return Tables(Record(Path("a-run"), tuple(row(r, DEVICE) for r in results), DEVICE, results), "sdpa")


def at(problem: dict[str, object], backend: str, *times: float, **fields: object) -> Result:
    """A result of one block a time."""
    return passed(backend, *((t,) for t in times), problem=problem, **fields)


def shown(*results: Result, style: str = "github") -> list[str]:
    """The lines of the overview, from its heading on."""
    rendered = tables(*results).render(style)
    return rendered[rendered.index("### Overview") :].splitlines() if "### Overview" in rendered else []


def cells(lines: list[str]) -> list[list[str]]:
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    return [found[0], *found[2:]]


FOUR = ("sdpa", "a", "b", "jit_flash")


@pytest.mark.parametrize(("timed", "there"), [(3, False), (4, True)])
def test_the_overview_is_the_last_table_of_four_backends_with_a_time(timed: int, there: bool) -> None:
    results = [at({}, name, 10.0, 10.0) for name in FOUR[:timed]]
    rendered = tables(*results, failed("none"), failed("neither")).render()
    titles = [line for line in rendered.splitlines() if line.startswith("### ")]
    assert titles[timed - 1] == "### Details"
    assert titles[timed:] == (["### Overview, µs · b1-h1-d128-fp16 · Test NPU"] if there else [])


def test_the_fastest_of_each_problem_and_its_ties_are_marked() -> None:
    long, tiny = {"seqlen_q": 1024, "seqlen_k": 4096}, {"seqlen_q": 1}
    results = [
        *(at(long, "sdpa", 781.2, 781.4), at(long, "a", 790.0, 760.0), at(long, "b", 13490.8, 13490.8)),
        failed("jit_flash", **long),
        *(at(tiny, "sdpa", 10.04, 10.04), at(tiny, "a", 9.999, 9.999), at(tiny, "b", 13.0, 13.0)),
        at(tiny, "jit_flash", 0.02, 0.02),
        at({}, "sdpa", 50.0),
    ]
    lines = shown(*results)
    assert lines[0] == "### Overview, µs · b1-h1-d128-fp16 · Test NPU"
    assert list(zip(*cells(lines))) == [
        ("backend", "", "sdpa", "a", "b", "jit_flash"),
        ("q1024", "k4096", "≈ 781", "★ 775", "13491", "RUNTIME"),
        ("q1", "k1024", "10.040", "9.999", "13.000", "★ 0.020"),
        ("q128", "k1024", "★ 50.0", "—", "—", "—"),
    ]
    assert lines[-1] == "★ is the fastest of its problem, ≈ ties with it at 99%."


def test_problems_are_rows_where_that_is_narrower() -> None:
    problems = [{"seqlen_q": 2**n, "causal": causal} for n in range(4) for causal in (False, True)]
    lines = shown(*(at(problem, name, 20.0 + index) for problem in problems for index, name in enumerate(FOUR)))
    labels = [f"q{2**n}-k1024{causal}" for n in range(4) for causal in ("", "-causal")]
    assert cells(lines) == [["problem", *FOUR], *([label, "★ 20.0", "21.0", "22.0", "23.0"] for label in labels)]
    assert [line.index(" q") for line in lines[4:12]] == [1] * 8, "names are at the left"


def test_backends_are_rows_where_that_is_narrower_and_problems_names_stand_upright() -> None:
    names = [*FOUR, "a_backend_with_a_long_name", "c", "d"]
    problems: list[dict[str, object]] = [{"causal": True, "heads_q": 8, "heads_kv": 2}, {"dtype": "bf16"}]
    lines = shown(*(at(problem, name, 20.0 + index) for problem in problems for index, name in enumerate(names)))
    assert lines[0] == "### Overview, µs · b1-d128 · Test NPU"
    assert cells(lines) == [
        ["backend", "h8x2", "h1"],
        ["", "q128", "q128"],
        ["", "k1024", "k1024"],
        ["", "fp16", "bf16"],
        ["", "causal", ""],
        ["sdpa", "★ 20.0", "★ 20.0"],
        *([name, f"{20 + index}.0", f"{20 + index}.0"] for index, name in enumerate(names) if index),
    ]
    assert lines[2].startswith("| backend "), "names are at the left"
    assert lines[-1] == "★ is the fastest of its problem."
    (one,) = problems[1:]
    labels = [line[1] for line in cells(shown(*(at(one, name, 20.0) for name in names)))[:2]]
    assert labels == ["q128", "k1024"], "also a single problem has its lengths"


def test_what_events_took_beside_a_graph_is_shown_and_not_ranked() -> None:
    graphs = [at({}, name, 6.0, 6.0, timing=GRAPH) for name in FOUR[:3]]
    events = at({}, "jit_flash", 3.0, 3.0, timing={"fallback": "it waits for the device"})
    only = [at({"seqlen_q": 1}, name, 3.0, 3.0) for name in FOUR[:2]]
    lines = shown(*graphs, events, *only)
    assert list(zip(*cells(lines)))[1:] == [
        ("q128", "k1024", "★ 6.00", "≈ 6.00", "≈ 6.00", "(3.00)"),
        ("q1", "k1024", "★ 3.00", "≈ 3.00", "—", "—"),
    ]
    assert lines[-1].endswith(
        "; what stands in parentheses was timed by events, may hold launch gaps, and is not ranked."
    )


def test_a_status_takes_no_more_than_a_time() -> None:
    statuses = [status for status in Status if status is not Status.PASSED]
    results = [failed(f"k{index}", status) for index, status in enumerate(statuses)]
    found = cells(shown(*(at({}, name, 1.0) for name in FOUR), *results))
    words = {line[0]: line[1] for line in found}
    for index, status in enumerate(statuses):
        word = words[f"k{index}"]
        assert len(word) <= len("INCORRECT")
        assert status.value.startswith(word.rstrip("."))
    assert words["k0"] == "UNSUP."


def test_a_published_csv_of_two_backends_has_none() -> None:
    assert "Overview" not in Tables(store.load(ASCEND_CSV)).render()


@pytest.mark.parametrize("style", [s for s in text.FORMATS if s.startswith("latex")])
def test_latex_has_its_own_sign_for_the_fastest(style: str) -> None:
    rendered = tables(*(at({}, name, 9.0 + index) for index, name in enumerate(FOUR))).render(style)
    assert r"\ensuremath{\star} 9.00" in rendered
    assert not [line for line in rendered.splitlines() if "★" in line and not line.startswith("% ")]
