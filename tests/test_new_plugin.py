"""attnbench new-plugin: every kind installs and passes its tests; a person's path from nothing to a table is short."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from helpers import BareVenv

from attnbench import scaffold
from attnbench.discovery import discover
from attnbench.errors import AttnbenchError
from attnbench.sources import digest

MINUTES = 10
"""What the path from nothing to a published table may take."""
TINY = ("--seqlen-q", "64", "--seqlen-k", "128", "--head-dim", "64", "--protocol", "fixed", "--iters", "4")

DEVICES = {"torch": ["cpu", "cuda", "npu"], "cpp": ["cpu"], "cuda": ["cuda"], "triton": ["cuda"], "pto": ["npu"]}
WHY_NOT = {
    "cuda": r"torch sees no CUDA device|this torch is built without CUDA",
    "triton": r"torch sees no CUDA device",
    "pto": r"torch_npu is not installed",
}
"""Why a backend of that kind is not available on a machine that has a CPU alone."""


def test_a_persons_path_from_nothing_to_a_table_takes_less_than_ten_minutes(bare: BareVenv, tmp_path: Path) -> None:
    """Install, new-plugin, list, run, conformance, report: as the README and the generated one say."""
    before = len(bare.steps)
    bare.run("attnbench", "new-plugin", "my-flash", cwd=tmp_path)
    package = tmp_path / "my-flash"
    said = re.search(r"^```sh\n(.*?)^```$", (package / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert said is not None
    commands = [shlex.split(line, comments=True) for line in said[1].splitlines()]
    assert [words[0] for words in commands] == ["pip", "attnbench", "pytest", "attnbench", "attnbench"]
    assert commands.pop() == [*commands[3], "--watch"]  # which ends with a person; tests/test_cli.py tries it
    _, listed, tests, table = (bare.run(*words, cwd=package).out for words in commands)
    assert "my_flash" in listed
    assert re.search(r"\d+ passed", tests)
    assert "### my_flash vs sdpa" in table
    assert "FAILED" not in bare.run("attnbench", "plugins", "check", "my_flash", cwd=package).out
    (run,) = (package / "reports").iterdir()
    assert "### my_flash vs sdpa" in bare.run("attnbench", "report", run, cwd=package).out
    rows = (run / "results.csv").read_text().splitlines()
    assert sum(",my_flash," in row and ",PASSED," in row for row in rows) == 3

    path = [*bare.steps[:2], *bare.steps[before:]]
    print(*(f"{seconds:6.1f} s  {step}" for step, seconds in path), sep="\n")
    assert sum(seconds for _, seconds in path) < MINUTES * 60


@pytest.mark.parametrize("kind", [kind for kind in scaffold.KINDS if kind != "torch"])
def test_every_kind_installs_runs_and_passes_its_tests(bare: BareVenv, tmp_path: Path, kind: str) -> None:
    name = f"my_{kind}"
    bare.run("attnbench", "new-plugin", f"my-{kind}", "--kind", kind, cwd=tmp_path)
    bare.run("python", "-m", "pip", "install", "-q", f"./my-{kind}[test]", cwd=tmp_path)
    listed = [b for b in json.loads(bare.run("attnbench", "list", "--json", cwd=tmp_path).out) if b["name"] == name]
    assert [b["device"] for b in listed] == DEVICES[kind]
    assert {b["distribution"] for b in listed} == {f"my-{kind}"}
    bare.run("python", "-m", "pytest", "-q", cwd=tmp_path / f"my-{kind}")
    out = tmp_path / "run"
    if kind not in WHY_NOT:
        bare.run("attnbench", "run", "--backends", name, *TINY, "--out", out, cwd=tmp_path)
        assert ",PASSED," in (out / "results.csv").read_text()
        return
    (backend,) = listed
    assert not backend["available"]
    assert re.search(WHY_NOT[kind], backend["reason"])
    ended = bare.run("attnbench", "run", "--backends", name, *TINY, "--out", out, cwd=tmp_path, code=3)
    assert f"{name} UNAVAILABLE" in ended.err
    assert re.search(WHY_NOT[kind], (out / "results.csv").read_text())


@pytest.mark.parametrize("kind", scaffold.KINDS)
def test_an_edit_of_any_source_changes_what_a_run_records(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--watch and --resume go by it."""
    monkeypatch.setenv("PYTHONPATH", str(folder / "site"))
    scaffold.create(f"{kind}-own", kind, Path())
    shutil.copytree(f"{kind}-own/{kind}_own", f"site/{kind}_own")
    info = Path("site", f"{kind}_own-1.dist-info")
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {kind}-own\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[attnbench.backends]\n{kind}_own = {kind}_own.backend\n")
    (plugin,) = (p for p in discover().plugins if p.source.name == f"{kind}_own")
    assert plugin.error is None
    for path in Path("site", f"{kind}_own").iterdir():
        before = digest(plugin.sources)
        path.write_text(path.read_text() + "\n")
        assert digest(plugin.sources) != before, path


@pytest.mark.parametrize("kind", scaffold.KINDS)
@pytest.mark.parametrize(("name", "module", "title"), [("own2-kernel", "own2_kernel", "Own2Kernel"), ("x", "x", "X")])
def test_a_package_bears_its_own_name_everywhere(folder: Path, kind: str, name: str, module: str, title: str) -> None:
    written = scaffold.create(name, kind, Path())
    assert written == sorted(path for path in Path(name).rglob("*") if path.is_file())
    assert {Path(name, "pyproject.toml"), Path(name, "tests", f"test_{module}.py")} <= set(written)
    assert Path(name, module, "backend.py") in written
    for path in written:
        text = path.read_text()
        assert not re.search(r"my[-_]?flash", text, re.IGNORECASE)
        if path.suffix == ".py":
            ast.parse(text)
    backend = Path(name, module, "backend.py").read_text()
    assert f"class {title}(Backend):" in backend
    assert f'name = "{module}"' in backend
    assert f'{module} = "{module}.backend"' in Path(name, "pyproject.toml").read_text()


def test_a_package_has_the_modes_of_any_new_folder(folder: Path) -> None:
    Path("mine").mkdir()
    scaffold.create("my-flash", "torch", Path())
    assert Path("my-flash").stat().st_mode == Path("mine").stat().st_mode


@pytest.mark.parametrize("name", ["My-Flash", "2flash", "my flash", "", "-x", "my--flash", "x/y", "..", "flash_"])
def test_a_name_that_no_package_can_have_is_refused(cli, name: str) -> None:
    answer = cli("new-plugin", "--", name)
    assert answer.code == 2
    assert "cannot be a plugin's name" in answer.problem
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("name", ["torch", "class", "attnbench", "json"])
def test_a_name_that_python_has_already_is_refused(cli, name: str) -> None:
    answer = cli("new-plugin", name)
    assert answer.code == 2
    assert f"Python has something called {name} already" in answer.problem


@pytest.mark.parametrize("name", ["jit-flash", "sdpa", "gemm_ref"])
def test_a_name_that_a_plugin_has_already_is_refused(cli, name: str) -> None:
    answer = cli("new-plugin", name)
    assert answer.code == 2
    assert f"a plugin called {name.replace('-', '_')} is installed already" in answer.problem


def test_a_folder_that_is_there_stays_as_it_is(cli) -> None:
    Path("my-flash").mkdir()
    Path("my-flash", "own.txt").write_text("mine")
    answer = cli("new-plugin", "my-flash")
    assert answer.code == 2
    assert "my-flash is there already" in answer.problem
    assert [path.name for path in Path("my-flash").iterdir()] == ["own.txt"]


def test_an_unknown_kind_is_told_the_closest(cli) -> None:
    answer = cli("new-plugin", "my-flash", "--kind", "cudda")
    assert answer.code == 2
    assert "no kind is called 'cudda'" in answer.problem
    assert "cuda" in answer.err
    assert list(Path().iterdir()) == []


def test_a_package_that_cannot_be_written_whole_leaves_nothing(folder: Path, monkeypatch) -> None:
    rename = os.rename

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(AttnbenchError, match="No space left"):
        scaffold.create("my-flash", "cpp", Path())
    assert list(Path().iterdir()) == []
    monkeypatch.setattr(os, "rename", rename)
    scaffold.create("my-flash", "cpp", Path())
    assert [path.name for path in Path().iterdir()] == ["my-flash"]
