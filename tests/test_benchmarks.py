"""benchmarks/: the scripts start, sum up what they are given, and tell a missed limit. No test here times anything."""

from __future__ import annotations

import csv
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnbench import jit
from attnbench.problem import Problem

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted({*FOLDER.glob("cpu_*.py"), *FOLDER.glob("cuda_*.py")} - {FOLDER / "cpu_bounds.py"})


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(FOLDER)
    import cpu_bounds

    return cpu_bounds


def _peers(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, FOLDER / "cpu_peers.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _write(folder: Path, *times_us: tuple[str, int, str, float | None]) -> Path:
    """A results.csv of (dtype, sq, kernel, µs; None: it did not pass)."""
    folder.mkdir()
    with (folder / "results.csv").open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["sq", "kernel", "time_us", "dtype", "device", "status", "case_id"])
        for dtype, sq, kernel, time_us in times_us:
            status, time = ("INCORRECT", "") if time_us is None else ("PASSED", time_us)
            writer.writerow([sq, kernel, time, dtype, "cpu", status, f"q{sq}-{dtype}"])
    return folder


def _cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_comes_without_torch(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = f"""
import runpy, sys
sys.argv = [{str(script)!r}, "--help"]
sys.path.insert(0, {str(FOLDER)!r})
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert "torch" not in sys.modules and "pandas" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Printed: " in done.stdout


def test_peers_keeps_its_limits(tmp_path: Path) -> None:
    one = _write(
        tmp_path / "one",
        *(("fp32", 1, "jit_flash", 10.0), ("fp32", 1, "sdpa", 20.0), ("fp32", 1, "gemm_ref", 15.0)),
        *(("fp32", 2, "jit_flash", 10.0), ("fp32", 2, "sdpa", None), ("fp32", 2, "gemm_ref", 60.0)),
        *(("fp32", 3, "jit_flash", 10.0), ("fp32", 3, "sdpa", None)),  # no peer to compare with
    )
    # The same shapes, on another day: what is faster there is no peer of the run before.
    two = _write(tmp_path / "two", ("fp32", 1, "jit_flash", 5.0), ("fp32", 1, "sdpa", 5.0))
    done = _peers(one, two / "results.csv")
    assert done.returncode == 0, done.stderr
    _, _, mean, minimum = _cells(done.stdout)
    assert mean == ["fp32", "sdpa, gemm_ref", "3", "gemm_ref 2, sdpa 1", "geometric mean", "2.08×", "≥ 1.15×", "ok"]
    assert minimum[-3:] == ["1.00×", "≥ 1.00×", "ok"]


def test_peers_tells_which_limit_is_missed(tmp_path: Path) -> None:
    run = _write(
        tmp_path / "run",
        *(("bf16", 1, "jit_flash", 10.0), ("bf16", 1, "sdpa", 40.0)),
        *(("bf16", 2, "jit_flash", 10.0), ("bf16", 2, "sdpa", 11.0)),
        *(("fp16", 1, "jit_flash", 10.0), ("fp16", 1, "sdpa", 30.0), ("fp16", 1, "sdpa_upcast", 10.4)),
    )
    done = _peers(run)
    assert done.returncode == 1
    claims, shapes = done.stdout.split("\n\n")
    assert [row[4:] for row in _cells(claims)[2:]] == [
        ["geometric mean", "2.10×", "≥ 1.60×", "ok"],
        ["minimum", "1.10×", "≥ 1.20×", "MISSED"],
        ["geometric mean", "3.00×", "≥ 2.30×", "ok"],
        ["minimum", "3.00×", "≥ 1.00×", "ok"],
        ["geometric mean", "1.04×", "≥ 1.05×", "MISSED"],
        ["minimum", "1.04×", "≥ 1.00×", "ok"],
    ]
    assert _cells(shapes)[2:] == [["q2-bf16", "sdpa", "1.10×", "≥ 1.20×", "MISSED"]]
    assert _peers(run, "--dtype", "bf16").stdout.count("MISSED") == 2


def test_peers_counts_what_jit_flash_did_not_pass_as_missed(tmp_path: Path) -> None:
    run = _write(
        tmp_path / "run",
        *(("fp32", 1, "jit_flash", 10.0), ("fp32", 1, "sdpa", 40.0)),
        *(("fp32", 2, "jit_flash", None), ("fp32", 2, "sdpa", 11.0)),
    )
    done = _peers(run)
    assert done.returncode == 1
    assert _cells(done.stdout)[-1] == ["q2-fp32", "sdpa", "not passed", "≥ 1.00×", "MISSED"]


def test_peers_refuses_to_sum_up_nothing(tmp_path: Path) -> None:
    alone = _peers(_write(tmp_path / "alone", ("fp32", 1, "jit_flash", 10.0)))
    assert alone.returncode == 1
    assert alone.stderr.startswith("nothing to compare")
    assert _peers(tmp_path / "missing").returncode == 2
    (tmp_path / "other.csv").write_text("sq,sk\n1,2\n")
    assert "not the results.csv of a run" in _peers(tmp_path / "other.csv").stderr


def test_a_round_goes_there_and_back(bounds) -> None:
    taken = []

    def sample(name: str) -> float:
        taken.append(name)
        return len(taken)

    rates = bounds.in_turn(2, lambda: sample("a"), lambda: sample("b"), lambda: sample("c"))
    assert taken == list("abccba") * 2
    assert rates == [[3.5, 9.5], [3.5, 9.5], [3.5, 9.5]]  # a steady drift falls on all alike


def test_a_spread_is_median_and_quartiles(bounds) -> None:
    spread = bounds.Spread.of_ratios([1.0, 4.0, 9.0, 16.0, 50.0], [1.0, 2.0, 3.0, 4.0, 10.0])
    assert spread.text("{:.1f}") == "3.0 (2.0 to 4.0)"


def test_a_table_counts_the_limits_missed(bounds) -> None:
    table = bounds.Table("What", form="{:.1f}")
    table.add("read only", value=9.0)
    table.add("enough", value=2.0, at_least=2.0)
    table.add("too little", value=1.9, at_least=2.0)
    table.add("too much", value=2.1, at_most=2.0)
    assert table.missed == 2
    assert _cells(str(table))[2:] == [
        ["read only", "", ""],
        ["enough", "≥ 2.0", "ok"],
        ["too little", "≥ 2.0", "MISSED"],
        ["too much", "≤ 2.0", "MISSED"],
    ]


@pytest.mark.skipif(jit.missing(jit.cpp_toolchain) is not None, reason="no C++ compiler")
def test_the_bounds_compile_with_the_kernels_headers(bounds) -> None:
    assert bounds.fp32_gflops(2, us=100) > 0
    assert bounds.micro_gflops(2, bf16=False, us=100) > 0
    assert bounds.micro_gflops(1, bf16=True, us=100) > 0
    assert bounds.read_gbps(torch.ones(1 << 20), threads=2, passes=2) > 0
    assert (bounds.bf16_gflops(1, us=100) > 0) == (bounds.isa() in ("avx512_bf16", "amx_bf16"))


def test_decoding_takes_more_than_four_caches(bounds) -> None:
    decode = runpy.run_path(str(FOLDER / "cpu_decode.py"))
    *large, small = decode["problems"]("bf16", 32 << 20)
    assert all(128 << 20 < decode["kv_bytes"](problem) <= decode["MOST_BYTES"] for problem in large)
    assert decode["kv_bytes"](small) == 16 << 20
    problem = Problem(batch=2, seqlen_q=1, seqlen_k=3, heads_q=4, heads_kv=2, head_dim=8, dtype="fp32")
    q, k, v = decode["tensors"](problem, torch.zeros(decode["kv_bytes"](problem), dtype=torch.uint8))
    assert (q.shape, k.shape, v.shape) == (problem.q_shape, problem.k_shape, problem.v_shape)
    assert k.data_ptr() + k.nbytes == v.data_ptr()
    assert torch.equal(k[0, 0], v[1, 1])
    assert k.abs().min() > 0


@pytest.fixture
def cuda_timing(monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.syspath_prepend(FOLDER)
    return runpy.run_path(str(FOLDER / "cuda_timing.py"))


def _ncu(*durations: tuple[str, str, str]) -> str:
    rows = [f'"{number}","kernel","{name}","{unit}","{value}"' for number, (name, unit, value) in enumerate(durations)]
    return "\n".join(["==PROF== Connected", '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"', *rows])


def test_ncus_kernels_are_summed_up_by_call(cuda_timing) -> None:
    parse, calls = cuda_timing["parse"], cuda_timing["CALLS"]
    name = cuda_timing["METRIC"]
    pair = [(name, "ns", "12,500"), (name, "us", "2.5"), ("other", "ns", "1")]
    found = parse(_ncu(*pair * calls))
    assert (found.call_us, found.kernels) == (15.0, 2)
    assert parse(_ncu(*[(name, "msecond", "1.5")] * calls)).call_us == 1500.0
    for text in (_ncu(), _ncu(*pair), "==ERROR== no permission"):
        with pytest.raises(ValueError, match=r"kernels in \d+ calls"):
            parse(text)


def test_a_graphs_time_is_held_to_ncus_from_10_us_on(cuda_timing) -> None:
    profile = cuda_timing["Profile"]
    ratios = [(9.9, 12.0), (10.0, 10.29), (100.0, 97.2), (100.0, 96.0), (50.0, 52.0)]
    table = cuda_timing["table_of"]([(f"at {ncu}", graph, profile(ncu, 1)) for ncu, graph in ratios])
    assert [row[-2:] for row in _cells(str(table))[2:]] == [
        ["", ""],
        ["≤ 1.03", "ok"],
        ["≤ 1.03", "ok"],
        ["≤ 1.03", "MISSED"],
        ["≤ 1.03", "MISSED"],
    ]
    assert table.missed == 2


def test_without_a_gpu_or_ncu_the_reason_is_exit_2(cuda_timing) -> None:
    if not torch.cuda.is_available():
        done = subprocess.run([sys.executable, FOLDER / "cuda_timing.py"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert "torch" in done.stderr
    with pytest.raises(ValueError, match="/no/ncu cannot be started: No such file"):
        cuda_timing["profile"]("/no/ncu", "softmax")


def test_configurations_of_the_cuda_kernel_are_chosen_by_a_model_that_meets_what_was_measured() -> None:
    done = subprocess.run([sys.executable, FOLDER / "cuda_configs.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = _cells(done.stdout)
    assert len(rows) == (2 + 60 + 2 + 2) + (2 + 30 + 2 + 2)
    for last in (66, 102):
        assert [row[-1] for row in rows[last - 2 : last]] == ["ok", "ok"]


@pytest.mark.parametrize("name", ["sm90", "sm80"])
def test_a_model_that_misses_what_was_measured_is_told_of(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    import cuda_configs

    kernel = cuda_configs.kernels()[name]
    measured = cuda_configs.read(kernel, kernel.data)
    times = {case: {config: us * 1.3 for config, us in found.items()} for case, found in measured.items()}
    choices, both = cuda_configs.tables(kernel, times)
    assert [row[-1] for row in both.rows] == ["MISSED", "ok"]
    slow = {case: {each: us * each.keys * each.parts for each, us in of.items()} for case, of in measured.items()}
    choices, _ = cuda_configs.tables(kernel, slow)
    assert choices.missed > 0
    cuda_configs.write(tmp_path / "times.csv", ((case, *pair) for case in times for pair in times[case].items()))
    assert cuda_configs.read(kernel, tmp_path / "times.csv") == {
        case: {config: pytest.approx(us, abs=1e-3) for config, us in found.items()} for case, found in times.items()
    }


def test_timing_configurations_needs_to_know_of_which_kernel(tmp_path: Path) -> None:
    words = [sys.executable, FOLDER / "cuda_configs.py", "--time", tmp_path / "times.csv"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--time needs --kernel" in done.stderr
