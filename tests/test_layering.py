"""Imports go down DESIGN's list and nowhere else, and what must start fast loads neither torch nor pandas."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT, python

import attnbench

PACKAGE = ROOT / "attnbench"

LAYERS = (
    ("errors", "settings", "stats", "text", "ledger", "seal", "contention", "processes", "sources"),
    ("problem", "result", "backend", "hookspecs", "blocks"),
    ("jit", "devices", "reference", "patches", "spot"),
    ("registry", "protocol", "roofline", "rows", "store", "environment", "watch"),
    ("plan", "worker", "wire", "keeper"),
    ("child",),
    ("serve", "isolation", "describe", "discovery"),
    ("turn", "runner"),
    ("report", "testing"),
    ("api", "options", "console", "scaffold"),
    ("running",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

RE_EXPORTS = {"": {"backend", "errors", "hookspecs", "problem", "api"}}
"""attnbench/__init__ stands above all layers: it re-exports the public API, and `api` only when asked for."""


def modules() -> list[str]:
    """Every module of the core, dotted, without the leading `attnbench`; the package itself is ''."""
    paths = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    paths = (path for path in paths if path.parts[0] != "templates")  # they are other packages, in waiting
    return sorted(".".join(path.parts).removesuffix("__init__").rstrip(".") for path in paths)


def source(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split(".")) if module else PACKAGE
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports(tree: ast.AST, *, lazy: bool = True) -> Iterator[str]:
    """The dotted names that run-time imports name: with `lazy` those in functions too, never those for types alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from imports(ast.Module(node.orelse, []), lazy=lazy)
        elif lazy or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from imports(node, lazy=lazy)


def imported(module: str, *, lazy: bool = True) -> set[str]:
    return set(imports(ast.parse(source(module).read_text(encoding="utf-8")), lazy=lazy))


def core(name: str) -> str | None:
    """The module of the core that an imported name stands for or stands in; None where it is another package's."""
    parts = name.split(".")
    if parts[0] != "attnbench":
        return None
    known = set(modules())
    while (found := ".".join(parts[1:])) not in known:
        parts.pop()
    return found


def layer(module: str) -> str:
    return module.split(".")[0]


def test_the_parser_sees_lazy_imports_and_leaves_out_those_for_types():
    tree = ast.parse(
        "import a\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import types_only\nelse:\n    import otherwise\n"
        "try:\n    from b import c\nexcept ImportError:\n    pass\n"
        "class K:\n    import d.e\n    def f(self):\n        from g import h\n"
    )
    everything = ["a", "typing.TYPE_CHECKING", "otherwise", "b.c", "d.e", "g.h"]
    assert list(imports(tree)) == everything
    assert list(imports(tree, lazy=False)) == everything[:-1]


def test_every_module_stands_in_one_layer():
    found = {layer(module) for module in modules()} - {""}
    assert found == set(LEVEL)
    assert sum(map(len, LAYERS)) == len(LEVEL)


@pytest.mark.parametrize("module", modules(), ids=lambda m: m or "attnbench")
def test_imports_go_only_down(module):
    found = {target for name in imported(module) if (target := core(name)) is not None}
    if module in RE_EXPORTS:
        assert found == RE_EXPORTS[module]
        return
    # A package may import its own modules; devices/__init__ does so lazily, so that no device needs another's SDK.
    others = {layer(target) for target in found} - {layer(module)}
    assert "" not in others, "the core imports its modules, not its public face"
    assert {target for target in others if LEVEL[target] > LEVEL[layer(module)]} == set()


def test_no_modules_import_each_other_in_a_circle():
    edges: dict[str, set[str]] = {name: set() for name in LEVEL}
    for module in filter(None, modules()):
        targets = {layer(target) for name in imported(module) if (target := core(name)) is not None}
        edges[layer(module)] |= targets - {layer(module)}
    done: set[str] = set()
    while ready := {name for name, targets in edges.items() if name not in done and targets <= done}:
        done |= ready
    assert done == set(edges)


@pytest.mark.parametrize("module", modules(), ids=lambda m: m or "attnbench")
def test_the_core_imports_no_plugin_and_no_kernel(module):
    tops = {name.split(".")[0] for name in imported(module)}
    assert tops & {"attnbench_plugins", "attnbench_kernels"} == set()
    assert "attnbench_plugins" not in source(module).read_text(encoding="utf-8")


@pytest.mark.parametrize("module", modules(), ids=lambda m: m or "attnbench")
def test_pandas_and_tabulate_live_only_in_report(module):
    tops = {name.split(".")[0] for name in imported(module)}
    assert not tops & {"pandas", "tabulate"} or layer(module) == "report"


@pytest.mark.parametrize("module", modules(), ids=lambda m: m or "attnbench")
def test_torch_is_imported_with_a_module_only_where_something_is_computed(module):
    devices = {"devices.cpu", "devices.cuda", "devices.npu", "devices.events", "devices.npu_graphs", "devices.peaks"}
    computes = {"reference", "patches", "spot", "worker", "testing.conformance"} | devices
    tops = {name.split(".")[0] for name in imported(module, lazy=False)}
    assert ("torch" in tops) is (module in computes)


@pytest.mark.parametrize("module", modules(), ids=lambda m: m or "attnbench")
def test_a_vendors_sdk_is_named_only_in_its_own_device(module):
    assert not {"torch_npu", "triton", "pynvml"} & {name.split(".")[0] for name in imported(module)}


HEAVY = "import sys; print(sorted({'torch', 'pandas', 'numpy', 'tabulate'} & set(sys.modules)))"

TABLE = "sq,sk,head_size,kernel,time_us,tflops,flops_total\n" + "".join(
    f"128,1024,128,{kernel},{time_us},{67895040 / time_us / 1e6},67895040\n"
    for kernel, time_us in (("npu_fused_attention", 20.0), ("jit_flash", 10.0))
)


def test_importing_attnbench_and_its_cli_loads_neither_torch_nor_pandas():
    assert python(f"import attnbench, attnbench.cli; {HEAVY}").out == "[]\n"


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["report", "--help"]], ids=" ".join)
def test_help_loads_neither_torch_nor_pandas(words):
    found = python(
        f"""
        import sys
        from attnbench.cli import main
        try:
            main({words!r})
        except SystemExit as end:
            assert not end.code
        {HEAVY}
        """
    )
    assert found.code == 0, found.err
    assert "Usage" in found.out
    assert found.out.splitlines()[-1] == "[]"


def test_a_report_of_a_csv_loads_no_torch(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text(TABLE)
    found = python(
        f"""
        import sys
        from attnbench.cli import main
        try:
            main(["report", sys.argv[1]])
        except SystemExit as end:
            assert not end.code
        {HEAVY}
        """,
        path,
    )
    assert found.code == 0, found.err
    assert "2.00×" in found.out
    loaded = found.out.splitlines()[-1]
    assert "torch" not in loaded
    assert "pandas" in loaded


def test_the_public_api_is_what_design_names():
    assert set(attnbench.__all__) == {"AttnbenchError", "Backend", "Problem", "Suite", "hookimpl", "load", "run"}
    assert all(callable(getattr(attnbench, name)) for name in attnbench.__all__)
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        attnbench.runn  # noqa: B018
