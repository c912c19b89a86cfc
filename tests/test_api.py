"""attnbench.run and attnbench.load: DataFrames with results.csv's columns."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers import ASCEND_CSV

import attnbench
from attnbench import api
from attnbench.errors import AttnbenchError
from attnbench.rows import COLUMNS

TINY = {"seqlen_q": 16, "seqlen_k": [32, 48], "head_dim": 32}
QUICK = {"protocol": "fixed", "warmup": 1, "iters": 4}


def test_run_gives_a_frame_and_leaves_a_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--token", "hf_secret"])
    table = attnbench.run(["gemm_ref", "sdpa", "npu_fused"], **TINY, **QUICK, causal=True, out="r", isolate=False)
    assert list(table.columns) == list(COLUMNS)
    written, table = table, table.sort_values(["sk", "kernel"])  # a result is written as soon as it is final
    assert list(table["kernel"]) == ["gemm_ref", "npu_fused_attention", "sdpa"] * 2
    assert list(table["status"]) == ["PASSED", "UNAVAILABLE", "PASSED"] * 2
    assert [(sq, sk) for sq, sk in zip(table["sq"], table["sk"])] == [(16, 32)] * 3 + [(16, 48)] * 3
    assert table["causal"].all()
    assert {name: str(table[name].dtype) for name in ("sq", "time_us", "pct_peak", "n_samples", "causal")} == {
        "sq": "int64",
        "time_us": "float64",
        "pct_peak": "float64",
        "n_samples": "Int64",
        "causal": "bool",
    }
    assert list(table["n_samples"].fillna(0)) == [4, 0, 4] * 2
    done = table[table["status"] == "PASSED"]
    assert (done["time_us"] > 0).all()
    assert (done["tflops"] - done["flops_total"] / done["time_us"] / 1e6).abs().max() < 1e-12
    assert table["time_us"].isna().sum() == 2
    assert attnbench.load("r").equals(written)
    assert sorted(p.name for p in (folder / "r").iterdir()) == ["report.md", "results.csv", "results.jsonl", "run.json"]
    recorded = json.loads((folder / "r" / "run.json").read_text())
    assert (recorded["seed"], recorded["protocol"]["iters"]) == (0, 4)
    assert "hf_secret" not in json.dumps(recorded), "what else the process was started with is nobody's business"


def test_run_prints_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    attnbench.run("gemm_ref", "smoke", **QUICK)
    assert capfd.readouterr() == ("", "")
    (made,) = (folder / "reports").iterdir()
    assert made.name.endswith("-cpu-smoke")
    assert len(attnbench.load(made)) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"backends": "spda"}, "no backend is called 'spda'"),
        ({"suite": "smokey"}, "no suite is called 'smokey'"),
        ({"seqlen_q": 0}, "--seqlen-q must be whole numbers of at least 1, not '0'"),
        ({"seqlen_q": 5, "suite": "smoke"}, "--seqlen-q and --suite exclude each other"),
        ({"iters": 0}, "--iters must be a whole number from 1 to 1,000,000, not 0"),
        ({"device": "tpu"}, "no device is called 'tpu'"),
        ({"seqlen_q": 5, "timeout_s": 0}, "--timeout must be a number of seconds above 0, not 0"),
        ({"suite": Path("none.toml")}, "cannot read suite none.toml"),
    ],
)
def test_run_raises_what_cannot_be_run(words: dict, message: str, folder: Path) -> None:
    with pytest.raises(attnbench.AttnbenchError, match="^" + message):
        attnbench.run(**words)
    assert list(folder.iterdir()) == []


def test_load_reads_a_plain_csv() -> None:
    table = attnbench.load(ASCEND_CSV)
    assert list(table.columns) == list(COLUMNS)
    assert len(table) == 40
    first = table[(table["sq"] == 128) & (table["sk"] == 1024) & (table["kernel"] == "jit_flash")].iloc[0]
    assert first["time_us"] == 19.2
    assert round(first["normalized_tflops"], 2) == 84.87
    assert set(table["device_name"]) == {"Ascend 910B2"}
    assert set(attnbench.load(str(ASCEND_CSV), "910B3")["device_name"]) == {"910B3"}
    assert table["mean_us"].isna().all()
    assert str(table["mean_us"].dtype) == "float64"


def test_load_raises_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(AttnbenchError, match="is not a run"):
        attnbench.load(tmp_path)


def test_the_public_names_are_there() -> None:
    names = ["AttnbenchError", "Backend", "Problem", "Suite", "hookimpl", "load", "run"]
    assert attnbench.__all__ == names
    assert all(getattr(attnbench, name) for name in names)
    with pytest.raises(AttributeError, match="no attribute 'bogus'"):
        attnbench.bogus  # noqa: B018


def test_a_misspelt_parameter_is_a_type_error_that_names_it() -> None:
    with pytest.raises(TypeError, match=r"run\(\) got an unexpected keyword argument 'seqlen_qq'"):
        attnbench.run("gemm_ref", seqlen_qq=5)


@pytest.mark.parametrize("isolate", [True, False])
def test_isolate_reaches_execute(isolate: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got = {}

    def execute(_: object, how: api.Settings, *__: object, **___: object) -> None:
        got["isolate"] = how.isolate
        raise AttnbenchError("enough")

    monkeypatch.setattr(api, "execute", execute)
    with pytest.raises(AttnbenchError, match="enough"):
        attnbench.run("gemm_ref", suite=Path("smoke"), isolate=isolate)
    assert got["isolate"] is isolate


def test_two_runs_in_the_same_second_have_a_folder_each(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.time, "strftime", lambda *_: "now")
    (folder / "reports" / "now-cpu-smoke").mkdir(parents=True)  # another run, about to write its first file
    attnbench.run("npu_fused", "smoke", isolate=False)
    attnbench.run("npu_fused", "smoke", isolate=False)
    assert sorted(p.name for p in (folder / "reports").iterdir()) == [f"now-cpu-smoke{n}" for n in ("", "-2", "-3")]
    assert list((folder / "reports" / "now-cpu-smoke").iterdir()) == []


def test_the_report_page_shows_names_and_command_as_they_are() -> None:
    header = {
        "suite": {"name": "smoke"},
        "device": {"name": "<b>x</b> [y](z)\n# h"},
        "command": ["attnbench", "run", "--out", "`r`\n# x"],
        "started": "now",
        "protocol": {"name": "fixed", "cache": "hot"},
        "seed": 0,
    }
    page = api._report_page(header, "tables").split("\n\n")
    assert page[0] == r"# attnbench: smoke on &lt;b&gt;x&lt;/b&gt; [y\](z) # h"
    assert page[1] == "`` attnbench run --out `r` # x ``, now, protocol fixed, hot cache, seed 0"
