"""attnbench.run and attnbench.load: DataFrames with results.csv's columns."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers import ASCEND_CSV

import attnbench
from attnbench.errors import AttnbenchError
from attnbench.rows import COLUMNS

TINY = {"seqlen_q": 16, "seqlen_k": [32, 48], "head_dim": 32}
QUICK = {"protocol": "fixed", "warmup": 1, "iters": 4}


def test_run_gives_a_frame_and_leaves_a_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--token", "hf_secret"])
    table = attnbench.run(["gemm_ref", "sdpa", "npu_fused"], **TINY, **QUICK, causal=True, out="r")
    assert list(table.columns) == list(COLUMNS)
    assert list(table["kernel"]) == ["gemm_ref", "sdpa", "npu_fused_attention"] * 2
    assert list(table["status"]) == ["PASSED", "PASSED", "UNAVAILABLE"] * 2
    assert [(sq, sk) for sq, sk in zip(table["sq"], table["sk"])] == [(16, 32)] * 3 + [(16, 48)] * 3
    assert table["causal"].all()
    assert {name: str(table[name].dtype) for name in ("sq", "time_us", "pct_peak", "n_samples", "causal")} == {
        "sq": "int64",
        "time_us": "float64",
        "pct_peak": "float64",
        "n_samples": "Int64",
        "causal": "bool",
    }
    assert list(table["n_samples"].fillna(0)) == [4, 4, 0] * 2
    done = table[table["status"] == "PASSED"]
    assert (done["time_us"] > 0).all()
    assert (done["tflops"] - done["flops_total"] / done["time_us"] / 1e6).abs().max() < 1e-12
    assert table["time_us"].isna().sum() == 2
    assert attnbench.load("r").equals(table)
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
        ({"iters": 0}, "--iters must be a whole number of at least 1, not 0"),
        ({"device": "tpu"}, "no device is called 'tpu'"),
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
