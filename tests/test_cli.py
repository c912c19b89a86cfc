"""attnbench.cli: exit codes, one clear line for each bad input, and stdout that is data alone."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import (
    ASCEND_CSV,
    BUILT_IN,
    OFF_CPU,
    PLUGIN_HEAD,
    QUICK,
    SCRIPT,
    TINY,
    Answer,
    PluginFolder,
    attnbench,
    python,
)

from attnbench import discovery, store
from attnbench.errors import ExitCode
from attnbench.rows import COLUMNS

Cli = Callable[..., Answer]
CASE = "b1-h1-q16-k32-d32-fp32"
OWN = ("--no-plugin", "jit_flash")
FAST = (*QUICK, "--no-isolate")
"""For tests that ask nothing of isolation, whose processes take seconds to start."""


def cells(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# --- exit codes -------------------------------------------------------------------------------------------------------


def test_exit_codes_are_the_contracts() -> None:
    codes = {code.name: int(code) for code in ExitCode}
    expected = {"OK": 0, "FAILED": 1, "USAGE": 2, "NOTHING_PASSED": 3, "PLUGIN_FAILED": 4, "INTERRUPTED": 130}
    assert codes == expected


def test_a_run_with_an_unavailable_backend_is_fine_and_has_its_rows(cli: Cli, folder: Path) -> None:
    answer = cli("run", "--backends", "jit_flash,npu_fused", *TINY, *QUICK, "--out", "r")
    assert answer.code == 0
    rows = cells(folder / "r" / "results.csv")
    rows.sort(key=lambda r: r["kernel"])  # a result is written as soon as it is final
    assert [(r["kernel"], r["status"]) for r in rows] == [
        ("jit_flash", "PASSED"),
        ("npu_fused_attention", "UNAVAILABLE"),
    ]
    assert "torch_npu" in rows[1]["reason"]
    assert (rows[0]["n_samples"], rows[0]["statistic"], rows[1]["time_us"]) == ("4", "mean", "")
    assert answer.out.startswith("### jit_flash vs npu_fused_attention · b1-h1-d32-fp32 · ")
    assert "| Fused µs |" in " ".join(answer.out.split())
    assert files(folder / "r") == ["report.md", "results.csv", "results.jsonl", "run.json"]
    assert answer.out.strip() in (folder / "r" / "report.md").read_text(encoding="utf-8")
    assert f"{CASE}: jit_flash " in answer.err


def test_a_run_in_which_nothing_passed_is_exit_3_and_shows_why(cli: Cli, folder: Path) -> None:
    answer = cli("run", "--backends", "npu_fused", *TINY, *FAST, "--out", "r")
    assert answer.code == 3
    assert answer.problem == "error: nothing passed, so there is no time to show"
    assert answer.out.startswith("### Details\n")
    assert "UNAVAILABLE" in answer.out
    assert [r["status"] for r in cells(folder / "r" / "results.csv")] == ["UNAVAILABLE"]


@pytest.mark.parametrize(
    ("call", "status"),
    [
        ("raise ValueError('my [bold]kernel[/bold] is \\x1b[31mill')", "RUNTIME_ERROR"),
        ("raise MemoryError", "OOM"),
        ("raise SystemExit(0)", "RUNTIME_ERROR"),
        ("return q * 0", "INCORRECT"),
        ("return 5", "INCORRECT"),
    ],
)
def test_a_failing_backend_is_exit_1_and_the_others_are_kept(
    call: str, status: str, cli: Cli, folder: Path, plugins: PluginFolder
) -> None:
    plugins.add(
        f"""
        def prepare(self, problem, q, k, v):
            def call():
                {call}
            return call
        Toy.prepare = prepare

        @attnbench.hookimpl
        def attnbench_backends():
            return [Toy("toy")]
        """
    )
    answer = cli("run", "--backends", "toy,gemm_ref", *TINY, *FAST, "--out", "r")
    assert answer.code == 1
    assert "Traceback" not in answer.err
    rows = cells(folder / "r" / "results.csv")
    assert [(r["kernel"], r["status"]) for r in rows] == [("toy", status), ("gemm_ref", "PASSED")]
    assert rows[0]["reason"]
    assert rows[0]["time_us"] == rows[0]["tflops"] == ""
    assert f"toy: {rows[0]['reason']}" in answer.err
    if "kernel" in call:
        assert "my [bold]kernel[/bold] is ill (fake_plugin" in rows[0]["reason"], "neither markup nor terminal codes"


def test_a_requested_plugin_that_failed_is_exit_4(cli: Cli, folder: Path, plugins: PluginFolder) -> None:
    plugins.add("raise RuntimeError('no licence')", entry="broken")
    for command in ("run", "check"):
        answer = cli(command, "--backends", "broken", *TINY)
        assert (answer.code, answer.out) == (4, "")
        assert answer.problem == "error: plugin broken of toy-dist failed to load: RuntimeError: no licence"
        assert "hint: attnbench plugins shows its traceback" in answer.err
    assert files(folder) == []
    shown = cli("plugins")
    assert shown.code == 0
    assert "RuntimeError: no licence" in shown.out
    assert "raise RuntimeError('no licence')" in shown.err
    assert cli("list").code == 0
    assert cli("run", "--backends", "gemm_ref", *TINY, "--dry-run").code == 0


BAD = {
    "unknown backend": (["--backends", "jit_flahs"], "no backend is called 'jit_flahs'", "did you mean jit_flash?"),
    "far backend": (["--backends", "zzz"], "no backend is called 'zzz'", "there are cudnn_frontend, flash_attn, "),
    "empty backend": (["--backends", "sdpa,,gemm_ref"], "--backends has an empty name", "single commas"),
    "unknown baseline": (["--baseline", "spda"], "no backend is called 'spda'", "did you mean sdpa?"),
    "baseline of elsewhere": (
        ["--baseline", "npu_fused"],
        "the baseline npu_fused_attention is not available: it runs on npu, and this run is on cpu",
        "attnbench list",
    ),
    "skipped baseline": (["--baseline", "sdpa", "--skip", "sdpa"], "--skip leaves the baseline sdpa out", "of the two"),
    "unknown skip": (["--skip", "spda"], "no backend is called 'spda'", "did you mean sdpa?"),
    "unknown suite": (["--suite", "smokey"], "no suite is called 'smokey'", "did you mean smoke?"),
    "suite file": (["--suite", "none.toml"], "cannot read suite none.toml", None),
    "unknown device": (["--device", "tpu"], "no device is called 'tpu'", "choose auto, cpu, cuda, npu"),
    "unknown dtype": (["--dtype", "fp61"], "no dtype is called 'fp61'", "did you mean fp16?"),
    "unknown protocol": (["--protocol", "fix"], "no protocol is called 'fix'", "choose adaptive or fixed"),
    "unknown cache": (["--cache", "warm"], "no cache is called 'warm'", "choose hot or cold"),
    "unknown causal": (["--causal", "maybe"], "no --causal value is called 'maybe'", "there are false, true"),
    "no iterations": (["--iters", "0"], "--iters must be a whole number from 1 to 1,000,000, not 0", None),
    "iterations no number": (["--iters", "x"], "'--iters'", "attnbench run --help"),
    "negative warm-up": (["--warmup", "-1"], "--warmup must be a whole number from 0 to 1,000,000, not -1", None),
    "count and adaptive": (["--protocol", "adaptive", "--iters", "5"], "--iters belongs to --protocol fixed", None),
    "no budget": (["--budget", "0"], "--budget must be a number of seconds above 0, not 0", None),
    "no time": (["--timeout", "0", *TINY], "--timeout must be a number of seconds above 0, not 0", None),
    "no length": (["--seqlen-q", "0"], "--seqlen-q must be whole numbers of at least 1, not '0'", "128,1k"),
    "negative length": (["--seqlen-q", "-5"], "--seqlen-q must be whole numbers of at least 1, not '-5'", "128,1k"),
    "length no number": (["--seqlen-q", "abc"], "--seqlen-q must be whole numbers of at least 1, not 'abc'", "128,1k"),
    "fraction": (["--head-dim", "1.5"], "--head-dim must be whole numbers of at least 1, not '1.5'", None),
    "empty length": (["--seqlen-k", ""], "--seqlen-k has an empty name", None),
    "heads": (["--heads", "5x2"], "heads_kv must divide heads_q, and 2 does not divide 5", None),
    "suite and shapes": (["--suite", "smoke", "--seqlen-q", "5"], "--seqlen-q and --suite exclude each other", None),
    "unknown option": (["--bogus"], "No such option", "attnbench run --help"),
    "stray word": (["bogus"], "bogus", "attnbench run --help"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_argument_is_one_line_a_hint_and_exit_2(what: str, cli: Cli, folder: Path) -> None:
    words, message, hint = BAD[what]
    answer = cli("run", *words)
    assert (answer.code, answer.out) == (2, "")
    assert message in answer.problem
    assert hint is None or hint in answer.err.split("hint: ")[1]
    assert files(folder) == [], "nothing is written"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Missing command"),
        (["cache"], "Missing command"),
        (["bogus"], "No such command 'bogus'"),
        (["--bogus"], "No such option"),
        (["report"], "Missing argument"),
        (["report", "none.csv"], "cannot read none.csv: No such file or directory"),
        (["report", "."], ". is not a run: it has no run.json"),
        (["report", str(ASCEND_CSV), "--format", "githbu"], "no format is called 'githbu'"),
        (["report", str(ASCEND_CSV), "--baseline", "sdpa"], "the baseline 'sdpa' is not in"),
        (["list", "--device", "tpu"], "no device is called 'tpu'"),
        (["check", "--backends", "spda"], "no backend is called 'spda'"),
        (["check", "--timeout", "-1", *TINY], "--timeout must be a number of seconds above 0"),
    ],
)
def test_bad_usage_of_any_command_is_exit_2(words: list[str], message: str, cli: Cli) -> None:
    answer = cli(*words)
    assert (answer.code, answer.out) == (2, "")
    assert message in answer.problem


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.csv", b"", "empty.csv is empty"),
        ("short.csv", b"sq,sk,head_size\n1,2,3\n", "short.csv lacks the column kernel"),
        ("binary.csv", b"\xff\x00\xfe", "binary.csv is not UTF-8 text"),
    ],
)
def test_an_unreadable_csv_is_exit_2(name: str, data: bytes, message: str, cli: Cli, folder: Path) -> None:
    (folder / name).write_bytes(data)
    answer = cli("report", name)
    assert (answer.code, answer.out, answer.problem) == (2, "", f"error: {message}")


def test_a_file_name_cannot_write_terminal_codes_or_more_lines(cli: Cli) -> None:
    answer = cli("report", "evil\x1b[31m\nerror: two.csv")
    assert answer.problem.startswith("error: cannot read evil error: two.csv: ")
    assert "\x1b" not in answer.err


def test_an_out_that_is_no_run_is_refused_before_anything_runs(cli: Cli, folder: Path) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.tex").write_text("x")
    answer = cli("run", "--backends", "gemm_ref", *TINY, *QUICK, "--out", "mine")
    assert (answer.code, answer.out, answer.problem) == (2, "", "error: mine exists and is not a run")
    assert "--out" in answer.err
    assert files(folder) == ["mine", "mine/thesis.tex"]


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_taken_out_is_refused_before_the_machine_is_looked_at(
    more: list[str], cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "mine").write_text("x")
    monkeypatch.setattr(discovery, "discover", None)
    assert cli("run", "--out", "mine", *more).problem == "error: mine exists and is not a run"


def test_an_out_below_a_file_is_refused(cli: Cli, folder: Path) -> None:
    (folder / "file").write_text("")
    answer = cli("run", "--backends", "gemm_ref", *TINY, *QUICK, "--out", "file/run")
    assert (answer.code, answer.problem) == (2, "error: cannot make file/run: Not a directory")


# --- what is chosen ---------------------------------------------------------------------------------------------------


def test_dry_run_prints_the_plan_and_writes_nothing(cli: Cli, folder: Path) -> None:
    words = ("--backends", "gemm,npu_fused", "--seqlen-q", "1,1k", "--seqlen-k", "2k", "--causal", "true,false")
    answer = cli("run", *words, "--dry-run", "--out", "r")
    assert answer.code == 0
    assert [line.split()[:3] for line in answer.out.splitlines()[2:]] == [
        [f"b1-h1-q{sq}-k2048-d128-fp32{causal}", kernel, state]
        for causal in ("-causal", "")
        for sq in (1, 1024)
        for kernel, state in (("gemm_ref", "to"), ("npu_fused_attention", "UNAVAILABLE"))
    ]
    assert files(folder) == []


def test_without_names_all_that_are_available_run_and_skip_removes(cli: Cli) -> None:
    def kernels(*words: str) -> list[str]:
        return [line.split()[1] for line in cli("run", *TINY, "--dry-run", *words).out.splitlines()[2:]]

    on_cpu = [name for name in BUILT_IN if name not in OFF_CPU]
    assert kernels() == on_cpu
    assert kernels("--skip", "jit,sdpa") == [name for name in on_cpu if name not in ("jit_flash", "sdpa")]
    others = [word for name in on_cpu if name != "gemm_ref" for word in ("--no-plugin", name)]
    assert kernels(*others) == ["gemm_ref"]
    assert kernels("--backends", "sdpa,gemm_ref,sdpa") == ["sdpa", "gemm_ref"]
    assert kernels("--backends", "jit", "--baseline", "gemm") == ["gemm_ref", "jit_flash"]


def test_nothing_left_to_run_is_exit_3(cli: Cli) -> None:
    answer = cli("run", *TINY, "--backends", "sdpa", "--skip", "sdpa")
    assert (answer.code, answer.problem) == (3, "error: no backend is left to run on cpu")


def test_attnbench_plugins_empty_leaves_no_backend(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNBENCH_PLUGINS", "")
    assert json.loads(cli("list", "--json").out) == []
    assert json.loads(cli("plugins", "--json").out) == []
    assert cli("run", *TINY).code == 3


def test_the_default_is_the_pto_suite_into_reports(cli: Cli, folder: Path) -> None:
    cases = [line.split()[0] for line in cli("run", "--backends", "sdpa", "--dry-run").out.splitlines()[2:]]
    assert cases == [
        f"b1-h1-q{sq}-k{sk}-d128-fp32" for sq in (128, 256, 512, 1024, 2048) for sk in (1024, 2048, 4096, 8192)
    ]
    answer = cli("run", "--backends", "gemm_ref", *TINY, "--budget", "0.05", "--no-isolate")
    assert answer.code == 0
    (made,) = (folder / "reports").iterdir()
    assert made.name.endswith("-cpu-custom")
    assert f"the run is in reports/{made.name}" in answer.err
    assert cells(made / "results.csv")[0]["statistic"] == "median"
    assert "protocol adaptive, hot cache, at most 0.05 s of timing for each; gemm_ref" in answer.err
    assert "fp32" in answer.err, "the header says which dtype auto is"


# --- data -------------------------------------------------------------------------------------------------------------


def test_list_json_has_exactly_the_contracts_keys(cli: Cli, plugins: PluginFolder) -> None:
    plugins.add("raise RuntimeError('no licence')", entry="broken")
    answer = cli("list", "--json")
    data = json.loads(answer.out)
    names = {"name", "device", "available", "reason", "distribution", "version", "summary"}
    assert {frozenset(entry) for entry in data} == {frozenset(names)}
    by_key = {(entry["name"], entry["device"]): entry for entry in data}
    assert by_key["sdpa", "cpu"]["available"] is True
    assert by_key["sdpa", "cpu"]["reason"] is None
    npu = by_key["npu_fused_attention", "npu"]
    assert (npu["available"], npu["distribution"], npu["version"]) == (False, "attnbench", "0.1.0")
    assert "pip install 'attnbench[npu]'" in npu["reason"]
    assert "note: plugin broken of toy-dist failed to load: RuntimeError: no licence" in answer.err
    assert {entry["device"] for entry in json.loads(cli("list", "--json", "--device", "npu").out)} == {"npu"}


def test_list_groups_by_device_and_shows_which_library_is_installed(cli: Cli, plugins: PluginFolder) -> None:
    plugins.add(
        """
        Toy.libraries = {"pluggy": "1.0", "no-such-library": "2"}

        @attnbench.hookimpl
        def attnbench_backends():
            return [Toy("one", "npu"), Toy("two", "cpu")]
        """
    )
    plugins.backends('[Toy("bare")]', entry="bare")
    lines = cli("list").out.splitlines()[2:]
    devices = [line.split()[1] for line in lines]
    assert devices == sorted(devices), "cpu, cuda, npu"
    shown = {line.split()[0]: line for line in lines}
    version = importlib.metadata.version("pluggy")
    for name in ("one", "two"):
        assert f"pluggy {version}" in shown[name]
        assert "no-such-library" not in shown[name]
        assert "torch 2" not in shown[name], "it calls others, and what it names is told"
    for name in ("bare", "sdpa"):
        assert shown[name].split()[5:7] == ["torch", importlib.metadata.version("torch")], "it calls torch alone"


def test_plugins_shows_load_times_and_with_trace_what_was_called(cli: Cli, plugins: PluginFolder) -> None:
    plugins.backends('[Toy("one"), Toy("two")]', entry="good")
    plain, traced = cli("plugins"), cli("plugins", "--trace")
    head, line = (next(ln for ln in plain.out.splitlines() if ln.startswith(start)) for start in ("entry", "good "))
    assert "load s" in head
    assert re.search(r" \d+\.\d\d +loaded$", line)
    assert "attnbench_backends()" not in plain.err + plain.out
    assert "attnbench_backends() → [one on cpu, two on cpu] (" in traced.err
    assert "one on cpu: unavailable() → None (" in traced.err


def test_plugins_json_has_exactly_the_contracts_keys(cli: Cli, plugins: PluginFolder) -> None:
    plugins.backends('[Toy("one"), Toy("two")]', entry="good")
    plugins.add("raise RuntimeError('no licence')", entry="broken")
    data = json.loads(cli("plugins", "--json").out)
    names = {"distribution", "version", "entry_point", "backends", "error"}
    assert {frozenset(entry) for entry in data} == {frozenset(names)}
    assert [entry["entry_point"] for entry in data] == [*BUILT_IN, "broken", "good"]
    broken, good = data[-2:]
    assert good | {"version": "1.5"} == {
        "distribution": "toy-dist",
        "version": "1.5",
        "entry_point": "good",
        "backends": ["one", "two"],
        "error": None,
    }
    assert broken["backends"] == []
    assert broken["error"].startswith("Traceback")


def test_run_json_is_results_csv_as_json(cli: Cli, folder: Path) -> None:
    answer = cli("run", "--backends", "gemm_ref,npu_fused", *TINY, *FAST, "--out", "r", "--json")
    data = sorted(json.loads(answer.out), key=lambda entry: entry["kernel"])
    written = sorted(cells(folder / "r" / "results.csv"), key=lambda r: r["kernel"])
    assert [list(entry) for entry in data] == [list(COLUMNS)] * 2
    assert [entry["status"] for entry in data] == ["PASSED", "UNAVAILABLE"]
    assert data[0]["time_us"] == pytest.approx(float(written[0]["time_us"]), rel=1e-8)
    assert data[1]["time_us"] is None


def test_check_json_has_every_verdict_and_writes_nothing(cli: Cli, folder: Path) -> None:
    answer = cli("check", "--backends", "gemm_ref,npu_fused", *TINY, "--json")
    assert answer.code == 0
    data = sorted(json.loads(answer.out), key=lambda entry: entry["backend"])
    names = {"problem", "backend", "device", "status", "reason", "check", "measurement", "used_cores"}
    assert {frozenset(entry) for entry in data} == {frozenset(names)}
    assert [(entry["backend"], entry["status"], entry["measurement"]) for entry in data] == [
        ("gemm_ref", "PASSED", None),
        ("npu_fused_attention", "UNAVAILABLE", None),
    ]
    assert 0 <= data[0]["check"]["max_abs_err"] <= data[0]["check"]["err_budget"]
    assert files(folder) == []
    table = cli("check", "--backends", "gemm_ref", *TINY, "--no-isolate")
    assert table.out.startswith("| case ")
    assert cli("check", "--backends", "npu_fused", *TINY).code == 3


def test_check_of_a_wrong_backend_is_exit_1(cli: Cli, plugins: PluginFolder) -> None:
    plugins.backends('[Toy("toy")]')
    assert cli("check", "--backends", "toy", *TINY).code == 0
    answer = cli("check", "--backends", "toy", *TINY, "--causal", "true", "--no-isolate")  # Toy knows no mask
    assert answer.code == 1
    assert "INCORRECT" in answer.out


def test_env_json_is_an_allow_list(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "/home/me/secret path")
    monkeypatch.setenv("OMP_PROC_BIND", "close")
    answer = cli("env", "--json")
    facts = json.loads(answer.out)
    assert facts["variables"].get("OMP_PROC_BIND") == "close"
    assert "secret" not in answer.out
    assert os.uname().nodename not in answer.out.split('"')
    assert "torch" in cli("env").out


def test_report_of_a_run_is_what_the_run_printed(cli: Cli, folder: Path) -> None:
    printed = cli("run", "--backends", "gemm_ref,sdpa", *TINY, *FAST, "--out", "r").out
    assert cli("report", "r") == Answer(0, printed, "")
    assert cli("report", "r", "--format", "csv").out == (folder / "r" / "results.csv").read_text(encoding="utf-8")


def test_report_of_the_published_csv(cli: Cli) -> None:
    answer = cli("report", ASCEND_CSV)
    assert answer.code == 0
    line = next(line for line in answer.out.splitlines() if line.split("|")[1:3] == ["  128 ", " 1024 "])
    assert line.split() == [
        "|",
        "128",
        "|",
        "1024",
        "|",
        "70.338",
        "|",
        "19.200",
        "|",
        "3.66×",
        "|",
        "3.54",
        "|",
        "84.87",
        "|",
    ]
    assert answer.err == ("note: taken for an Ascend 910B2 (24 cores, one for every 128 queries); see --device-name\n")
    assert cli("report", ASCEND_CSV, "--device-name", "910B3").err == ""


def test_a_cut_record_is_reported_with_a_note(cli: Cli, folder: Path) -> None:
    cli("run", "--backends", "gemm_ref,sdpa", *TINY, *FAST, "--out", "r")
    record = folder / "r" / "results.jsonl"
    record.write_bytes(record.read_bytes()[:-5])
    answer = cli("report", "r")
    assert answer.code == 0
    assert answer.err == "note: r/results.jsonl: the last line is cut and was dropped\n"
    assert "sdpa" not in answer.out


# --- interrupts in-process --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["list", "plugins", "check", "run"])
def test_an_interrupt_anywhere_is_130_and_one_line(command: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(discovery, "discover", interrupt)
    answer = cli(command)
    assert (answer.code, answer.out, answer.problem) == (130, "", "error: interrupted")


def test_an_interrupt_before_the_first_problem_ends_leaves_no_table(cli: Cli, plugins: PluginFolder) -> None:
    plugins.add(
        "def prepare(*_):\n    raise KeyboardInterrupt\nToy.prepare = prepare\n"
        "@attnbench.hookimpl\ndef attnbench_backends():\n    return [Toy('toy')]\n"
    )
    answer = cli("run", "--backends", "toy", *TINY, *FAST, "--out", "r", "--json")
    assert (answer.code, answer.out) == (130, "[]\n")
    assert answer.problem == "error: interrupted: nothing was finished"


# --- real processes ---------------------------------------------------------------------------------------------------


def test_help_and_report_do_not_import_torch() -> None:
    code = """
        import sys
        from attnbench.cli import main
        for words in (["--help"], ["run", "--help"], ["cache", "show"], ["report", sys.argv[1]]):
            try:
                main(words)
            except SystemExit as end:
                assert end.code == 0
            assert "torch" not in sys.modules, words
            assert words[0] == "report" or "pandas" not in sys.modules, words
    """
    answer = python(code, ASCEND_CSV)
    assert answer.code == 0, answer.err
    assert "70.338" in answer.out
    assert "--seqlen-q" in answer.out


@pytest.mark.parametrize(
    ("words", "notes"),
    [(("report", ASCEND_CSV), ["note: taken for an Ascend 910B2"]), (("list",), [])],
    ids=["more than a buffer", "less than a buffer"],
)
def test_a_reader_that_leaves_early_is_no_error(words: tuple[str, ...], notes: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    environment = os.environ | {"ATTNBENCH_PLUGINS": ""}
    try:
        done = subprocess.run([SCRIPT, *words], stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    finally:
        os.close(write)
    assert done.returncode == 0
    assert [line.partition(" (")[0] for line in done.stderr.splitlines()] == notes


def test_the_module_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "attnbench.cli", "report"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: Missing argument")


NOISE = """
import os, sys
print("import: print")
os.write(1, b"import: fd 1\\n")

def noisy(where):
    print(where, "print")
    os.write(1, where.encode() + b" fd 1\\n")
    os.system("echo " + where + " from a child")

class Noisy(Toy):
    def unavailable(self):
        noisy("unavailable")
    def prepare(self, problem, q, k, v):
        noisy("prepare")
        call = super().prepare(problem, q, k, v)
        def loud():
            noisy("call")
            return call()
        return loud

@attnbench.hookimpl
def attnbench_backends():
    noisy("hook")
    return [Noisy("noisy")]
"""


WATCHED = """
import torch
from attnbench import Backend

class Mine(Backend):
    name, device = "mine", "cpu"

    def prepare(self, problem, q, k, v):
        return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=problem.softmax_scale) + ERROR
"""


def test_watch_runs_again_at_each_change_and_tells_the_difference(folder: Path) -> None:
    """It goes on where a change breaks the plugin, tells what the next one mended, and ends with Ctrl-C."""
    file = folder / "mine.py"
    file.write_text(WATCHED.replace("ERROR", "0"))
    command = [str(SCRIPT), "run", "--backends", f"{file}:Mine,sdpa", *TINY, *QUICK, "--watch"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert child.stdout is not None
    lines: list[str] = []
    watchdog = threading.Timer(300, child.kill)  # a line that never comes must not be waited for
    watchdog.start()

    def until(words: str) -> str:
        """What it prints up to a line with these words."""
        start = len(lines)
        for line in child.stdout or ():
            lines.append(line)
            if words in line:
                return "".join(lines[start:])
        raise AssertionError("".join(lines))

    try:
        assert "mine vs sdpa" in until("; Ctrl-C ends it")
        file.write_text("import nothing_of_that_name\n")
        broken = until("; Ctrl-C ends it")
        assert "changed: mine.py" in broken
        assert "No module named 'nothing_of_that_name'" in broken
        file.write_text(WATCHED.replace("ERROR", "1"))
        wrong = until("; Ctrl-C ends it")
        assert re.search(r"mine +\d+\.\d+ µs +INCORRECT .* broken", wrong)
        file.write_text(WATCHED.replace("ERROR", "0"))
        mended = until("; Ctrl-C ends it")
        assert re.search(r"mine +INCORRECT +\d+\.\d+ µs .* mended", mended)
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 130
    finally:
        watchdog.cancel()
        child.kill()
        child.wait()
        child.stdout.close()
    assert len(list((folder / "reports").iterdir())) == 3


def test_watch_of_a_backend_without_the_devices_baseline_goes_on(folder: Path) -> None:
    (folder / "mine.py").write_text(WATCHED.replace("ERROR", "0"))
    command = [str(SCRIPT), "run", "--backends", "mine.py:Mine", *TINY, *QUICK, "--watch"]
    child = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(120, child.kill)
    watchdog.start()
    assert child.stderr is not None
    try:
        assert any("watching 1 files; Ctrl-C ends it" in line for line in child.stderr)
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 130
    finally:
        watchdog.cancel()
        child.kill()
        child.wait()
        child.stderr.close()


@pytest.mark.parametrize("option", [("--out", "x"), ("--resume", "x"), ("--dry-run",), ("--json",), ("--no-isolate",)])
def test_watch_refuses_what_is_for_one_run(cli: Cli, option: tuple[str, ...]) -> None:
    answer = cli("run", "--watch", *option)
    assert answer.code == 2
    assert "--watch makes one run after another" in answer.problem


def test_stdout_is_data_alone_and_only_pythonpath_brings_plugins(folder: Path, plugins: PluginFolder) -> None:
    """One process for three claims: noise goes to stderr, PYTHONPATH counts, the current folder does not."""
    plugins.add(NOISE)
    here = PluginFolder(folder)
    here.backends('[Toy("from_here")]', entry="from_here", distribution="here-dist")
    (folder / "typer.py").write_text("raise RuntimeError('imported from the current folder')\n")
    answer = attnbench("run", "--backends", "noisy", *TINY, *QUICK, "--json", "--out", folder / "r")
    assert answer.code == 0, answer.err
    assert [(entry["kernel"], entry["status"]) for entry in json.loads(answer.out)] == [("noisy", "PASSED")]
    for where in ("import:", "hook", "unavailable", "prepare", "call"):
        assert f"{where} print\n" in answer.err
        assert f"{where} fd 1\n" in answer.err
    assert "call from a child\n" in answer.err
    assert "\x1b" not in answer.err, "no colour where there is no terminal"
    recorded = json.loads((folder / "r" / "run.json").read_text())
    assert recorded["environment"]["plugins"] == {"attnbench": "0.1.0", "toy-dist": "1.5"}
    assert recorded["command"][-1] == "r", "a path is cut to its last part"


SLOW = """
import time

class Slow(Toy):
    def prepare(self, problem, q, k, v):
        if problem.seqlen_q > 16:
            print("now", flush=True)
            time.sleep(60)
        return super().prepare(problem, q, k, v)

@attnbench.hookimpl
def attnbench_backends():
    return [Slow("slow")]
"""


def test_ctrl_c_in_the_middle_keeps_and_reports_what_was_finished(folder: Path, plugins: PluginFolder) -> None:
    plugins.add(SLOW)
    words = ("run", "--backends", "gemm_ref,slow", "--seqlen-q", "16,17,18", *TINY[2:], *QUICK, "--out", "r")
    process = subprocess.Popen([SCRIPT, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    told = ""
    for line in process.stderr:
        told += line
        if line == "now\n":
            assert f"[1/3] {CASE}: gemm_ref " in told
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, told + err
    assert "Traceback" not in err
    assert "error: interrupted: what was finished is kept and shown\n" in err
    assert [(r.problem.case_id, r.backend) for r in store.load(folder / "r").results] == [
        (CASE, "gemm_ref"),
        (CASE, "slow"),
    ]
    assert [(r["case_id"], r["kernel"]) for r in cells(folder / "r" / "results.csv")] == [
        (CASE, "gemm_ref"),
        (CASE, "slow"),
    ]
    assert out.startswith("### slow vs gemm_ref · b1-h1-d32-fp32 · ")
    assert out.strip() in (folder / "r" / "report.md").read_text(encoding="utf-8")


def test_a_file_size_limit_in_the_middle_is_one_error_and_keeps_whole_lines(folder: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (12000, 12000))

    sizes = ",".join(str(n) for n in range(16, 36))
    words = ("--backends", "gemm_ref", "--seqlen-q", sizes, *TINY[2:], *FAST, "--out", "r")
    answer = attnbench("run", *words, *OWN, preexec_fn=limit)
    assert answer.code == 2, answer.err
    assert answer.problem.startswith(("error: cannot write r/results.", "error: cannot write r/blocks."))
    assert answer.problem.endswith(": File too large")
    lines = (folder / "r" / "results.jsonl").read_text().split("\n")
    assert lines.pop() == ""
    assert 3 <= len(lines) < 20
    assert [json.loads(line)["problem"]["seqlen_q"] for line in lines] == [16 + n for n in range(len(lines))]
    assert not [name for name in files(folder / "r") if name.startswith(".")]
    assert len(store.load(folder / "r").results) == len(lines)


def test_the_fake_backend_of_these_tests_is_a_backend() -> None:
    """Guards the tests above: what they call a good plugin must stay one."""
    from attnbench.backend import faults

    scope: dict[str, type] = {}
    exec(PLUGIN_HEAD, scope)
    assert faults(scope["Toy"]("toy")) == []


def test_no_plugin_of_a_name_that_is_not_there_is_an_error(cli):
    answer = cli("list", "--no-plugin", "jit_flsh")
    assert answer.code == 2
    assert "no plugin is called 'jit_flsh'" in answer.err
    assert "jit_flash" in answer.err


def test_a_run_takes_no_device_name(cli, folder):
    assert cli("run", *OWN, *TINY, *FAST, "--out", "run").code == 0
    answer = cli("report", "run", "--device-name", "910B3")
    assert answer.code == 2
    assert "which names its device itself" in answer.err


def test_dry_run_json_is_the_plan_as_json(cli: Cli, folder: Path) -> None:
    answer = cli("run", "--backends", "gemm_ref,npu_fused", *TINY, "--dry-run", "--json")
    data = json.loads(answer.out)
    assert [list(entry) for entry in data] == [["case_id", "kernel", "status", "reason"]] * 2
    assert data[0] == {"case_id": CASE, "kernel": "gemm_ref", "status": None, "reason": None}
    assert data[1]["status"] == "UNAVAILABLE"
    assert "npu" in data[1]["reason"]
    assert files(folder) == []


def test_a_dry_run_refuses_what_the_run_would(cli: Cli) -> None:
    answer = cli("run", *TINY, "--timeout", "0", "--dry-run")
    assert (answer.code, answer.out) == (2, "")
    assert answer.problem == "error: --timeout must be a number of seconds above 0, not 0"


def test_report_compares_with_the_runs_own_baseline(cli: Cli, folder: Path) -> None:
    words = ("--backends", "gemm_ref,sdpa", "--baseline", "gemm_ref", *TINY, *FAST, "--out", "r")
    printed = cli("run", *words).out
    assert printed.startswith("### sdpa vs gemm_ref ")
    assert cli("report", "r").out == printed
    assert cli("report", "r", "--baseline", "sdpa").out.startswith("### gemm_ref vs sdpa ")


def test_a_run_on_a_device_that_is_not_there_says_so_in_each_row(cli: Cli) -> None:
    answer = cli("run", "--device", "cuda", "--backends", "sdpa,jit_flash", *TINY, "--out", "r")
    assert answer.code == 3
    assert answer.err.count("Traceback") == 0
    rows = list(csv.DictReader(Path("r", "results.csv").read_text().splitlines()))
    assert [(row["kernel"], row["status"]) for row in rows] == [("sdpa", "UNAVAILABLE"), ("jit_flash", "UNAVAILABLE")]
    assert all("torch" in row["reason"] for row in rows)


def test_a_name_that_is_too_long_is_one_clear_error(cli: Cli) -> None:
    answer = cli("report", "x" * 5000)
    assert (answer.code, answer.out) == (2, "")
    assert answer.problem.endswith("xxx: File name too long")


def test_json_reaches_a_terminal_without_control_characters(cli: Cli, plugins: PluginFolder) -> None:
    plugins.add(
        """
        @attnbench.hookimpl
        def attnbench_backends():
            toy = Toy("toy")
            toy.summary = "a\\u202eb\\x9bc"
            return [toy]
        """
    )
    answer = cli("list", "--json")
    assert answer.out.isascii()
    assert [entry["summary"] for entry in json.loads(answer.out) if entry["name"] == "toy"] == ["a\u202eb\x9bc"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", [("report", ASCEND_CSV), ("list",)], ids=["more than a buffer", "less than a buffer"])
def test_a_full_disk_below_stdout_is_one_clear_error(words: tuple[object, ...]) -> None:
    with open("/dev/full", "w") as full:
        environment = os.environ | {"ATTNBENCH_PLUGINS": ""}
        done = subprocess.run([SCRIPT, *words], stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 2
    answer = Answer(done.returncode, "", done.stderr)
    assert answer.problem == "error: cannot write to stdout: No space left on device"


def test_nobody_reading_stderr_ends_no_run(folder: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    words = ("run", "--backends", "gemm_ref", "--seqlen-q", "16,17", *TINY[2:], *FAST, "--out", "r")
    try:
        done = subprocess.run([SCRIPT, *words, *OWN], stdout=subprocess.PIPE, stderr=write, text=True)
    finally:
        os.close(write)
    assert done.returncode == 0
    assert len(store.load(folder / "r").results) == 2
    assert done.stdout.strip() in (folder / "r" / "report.md").read_text(encoding="utf-8")


def test_what_plugins_print_reaches_stdout_never_also_where_nobody_reads_stderr(
    folder: Path, plugins: PluginFolder
) -> None:
    plugins.add("print('noise')\n@attnbench.hookimpl\ndef attnbench_backends():\n    return []\n")
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([SCRIPT, "list", "--json", *OWN], stdout=subprocess.PIPE, stderr=write, text=True)
    finally:
        os.close(write)
    assert done.returncode == 0
    assert "noise" not in done.stdout
    assert json.loads(done.stdout)


def test_a_run_without_room_for_any_file_leaves_no_folder(folder: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    answer = attnbench("run", "--backends", "gemm_ref", *TINY, *FAST, *OWN, "--out", "r", preexec_fn=limit)
    assert answer.code == 2
    assert answer.problem == "error: cannot write r/run.json: File too large"
    assert "hint: nothing was run; name another folder with --out" in answer.err
    assert files(folder) == []


def test_without_a_compiler_on_path_jit_flash_is_unavailable_and_says_what_helps(cli, folder, monkeypatch):
    monkeypatch.setenv("PATH", str(folder))
    answer = cli("run", "--backends", "jit_flash,gemm_ref", *TINY, "--no-isolate", "--out", "run")
    assert answer.code == 0
    rows = {row["kernel"]: row for row in cells(folder / "run" / "results.csv")}
    assert rows["gemm_ref"]["status"] == "PASSED"
    assert rows["jit_flash"]["status"] == "UNAVAILABLE"
    assert rows["jit_flash"]["reason"].startswith("no C++ compiler on PATH: install g++")


def test_the_shell_completion_that_is_offered_completes_commands(tmp_path):
    shown = subprocess.run(
        [sys.executable, "-c", "from attnbench.cli import main; main()"],
        env=os.environ | {"_ATTNBENCH_COMPLETE": "complete_bash", "COMP_WORDS": "attnbench re", "COMP_CWORD": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert shown.stdout.split() == ["report"]
