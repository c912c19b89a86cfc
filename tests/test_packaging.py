"""The distribution: what it lists is what lies there, and what it installs works away from the checkout."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from helpers import BUILT_IN, BareVenv

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
FOLDERS = {"attnbench": "attnbench", "plugins": "attnbench_plugins", "kernels": "attnbench_kernels"}


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_package_list_is_the_folders(pyproject: dict) -> None:
    found = set()
    for folder, package in FOLDERS.items():
        for module in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *module.parent.relative_to(ROOT / folder).parts]))
    assert set(pyproject["tool"]["setuptools"]["packages"]) == found
    assert pyproject["tool"]["setuptools"]["package-dir"] == {package: folder for folder, package in FOLDERS.items()}


def test_every_kernel_source_is_package_data(pyproject: dict) -> None:
    patterns = pyproject["tool"]["setuptools"]["package-data"]["attnbench_kernels"]
    packed = {path for pattern in patterns for path in (ROOT / "kernels").glob(pattern)}
    sources = {p for p in (ROOT / "kernels").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert sources
    assert packed == sources


def test_the_cores_sources_and_templates_are_package_data(pyproject: dict) -> None:
    core = ROOT / "attnbench"
    files = {p for p in core.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    sources = {p for p in files if p.suffix in (".cpp", ".h", ".cu") and core / "templates" not in p.parents}
    assert sources == {core / "devices" / "cpu_peak.cpp"}
    patterns = pyproject["tool"]["setuptools"]["package-data"]["attnbench"]
    packed = {path for pattern in patterns for path in core.glob(pattern) if path.is_file()}
    assert packed - {core / "py.typed"} == {p for p in files if core / "templates" in p.parents}
    assert pyproject["tool"]["setuptools"]["package-data"]["attnbench.devices"] == ["cpu_peak.cpp"]


def test_every_plugin_module_with_a_hook_is_an_entry_point(pyproject: dict) -> None:
    entries = pyproject["project"]["entry-points"]["attnbench.backends"]
    hooked = {p for p in (ROOT / "plugins").rglob("*.py") if "@hookimpl" in p.read_text()}
    modules = {p.relative_to(ROOT / "plugins").with_suffix("").as_posix().replace("/", ".") for p in hooked}
    names = {module.removesuffix(".__init__") for module in modules}
    assert entries == {name: f"attnbench_plugins.{name}" for name in names}


def test_a_vendors_package_is_an_extra_and_never_a_default(pyproject: dict) -> None:
    assert pyproject["project"]["optional-dependencies"]["cuda"] == [
        "nvidia-cuda-nvrtc>=13; sys_platform == 'linux'",
        "nvidia-ml-py",
    ]
    assert not any(need.startswith("nvidia") for need in pyproject["project"]["dependencies"])
    assert any(need.startswith("torch-npu") for need in pyproject["project"]["optional-dependencies"]["npu"])
    assert not any(need.startswith("torch-npu") for need in pyproject["project"]["dependencies"])
    for peer in ("jax", "onnx", "onnxruntime", "openvino", "xllamacpp"):
        assert any(need.startswith(f"{peer}>") for need in needs_of(pyproject, "peers"))
        assert not any(need.startswith(peer) for need in pyproject["project"]["dependencies"])


def needs_of(pyproject: dict, extra: str) -> list[str]:
    """What an extra installs, and the extras in it."""
    found: list[str] = []
    for need in pyproject["project"]["optional-dependencies"][extra]:
        own = re.fullmatch(r"attnbench\[([\w,]+)\]", need)
        found += [n for inner in own[1].split(",") for n in needs_of(pyproject, inner)] if own else [need]
    return found


def test_what_make_installs_is_pinned(pyproject: dict) -> None:
    pins = {
        line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    assert "attnbench[peers]" in pyproject["project"]["optional-dependencies"]["test"], "not installed, not tested"
    for need in (*pyproject["project"]["dependencies"], *needs_of(pyproject, "test"), *needs_of(pyproject, "docs")):
        name = need.partition(">")[0].partition(";")[0].partition("[")[0].strip().lower()
        assert name in pins or "python_version < " in need, need


def test_every_extra_that_a_backend_tells_to_install_is_there(pyproject: dict) -> None:
    told = set()
    for source in (ROOT / "plugins").rglob("*.py"):
        text = source.read_text(encoding="utf-8")
        told |= set(re.findall(r"attnbench\[([\w-]+)\]", text))
        told |= set(re.findall(r"\b(?:missing\(.+?, |not_installed\()\"([\w-]+)\"\)", text))
    assert {"npu", "flash-attn", "jax-cuda", "transformer-engine"} <= told
    assert told <= set(pyproject["project"]["optional-dependencies"])


def test_a_wheel_built_from_the_sdist_runs_in_a_bare_venv(bare: BareVenv, tmp_path: Path) -> None:
    where = bare.run("python", "-c", "import attnbench_kernels; print(attnbench_kernels.__file__)", cwd=tmp_path).out
    assert str(ROOT) not in where

    listed = bare.run("attnbench", "list", cwd=tmp_path).out
    assert {line.split()[0] for line in listed.splitlines()[2:]} >= set(BUILT_IN)

    ours = ("--backends", "gemm_ref,sdpa,jit_flash")  # and not what other tests have installed
    table = bare.run("attnbench", "run", *ours, "--suite", "smoke", "--budget", "0.5", cwd=tmp_path).out
    assert "jit_flash vs sdpa" in table
    (record,) = (tmp_path / "reports").glob("*/results.csv")
    statuses = [line for line in record.read_text().splitlines() if ",jit_flash," in line]
    assert len(statuses) == 3
    assert all(",PASSED," in line for line in statuses)
