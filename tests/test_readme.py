"""README.md: its plugin is run as it stands there, and its table is the committed run's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from attnbench import store
from attnbench.report.tables import Tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMITTED_RUN = ROOT / "reports" / "cpu-epyc"


def _block(language: str) -> str:
    (code,) = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return code


def test_the_plugin_is_about_twenty_lines() -> None:
    assert len([line for line in _block("python").splitlines() if line.strip()]) <= 20


def test_the_plugin_runs_and_passes(tmp_path: Path) -> None:
    (tmp_path / "my_attention.py").write_text(_block("python"))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "attnbench.cli",
            "run",
            "--backends",
            "my_attention.py:MyAttention",
            "--suite",
            "smoke",
            "--budget",
            "0.1",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "reports").iterdir()
    assert [row["status"] for row in store.load(run).rows] == ["PASSED", "PASSED", "UNSUPPORTED"]


def test_the_table_is_the_committed_runs() -> None:
    comparison = Tables(store.load(COMMITTED_RUN)).comparisons[0]
    assert len(comparison.cells) == 20
    for cells in comparison.cells:
        assert re.search(r"\| +" + r" \| +".join(map(re.escape, cells)) + r" \|", README), cells


@pytest.mark.parametrize("line", re.findall(r"^    \.venv/bin/(attnbench .*?)(?: +#.*)?$", README, re.MULTILINE))
def test_every_command_shown_is_one_that_parses(line: str, tmp_path: Path) -> None:
    words = line.split()[1:]
    if words[0] == "run":
        words.append("--dry-run")
    if words[0] == "check":
        words.append("--help")
    if words[0] == "report":
        words[1] = str(ROOT / words[1])
    done = subprocess.run(
        [sys.executable, "-m", "attnbench.cli", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
