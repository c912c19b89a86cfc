"""docs/: current where it is generated, its links and pages are there, and its commands are ones that parse."""

from __future__ import annotations

import enum
import functools
import inspect
import re
import runpy
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import ROOT, Answer

import attnbench
from attnbench import hookspecs, jit, store, testing
from attnbench.problem import load_suite
from attnbench.report.tables import DETAIL_COLUMNS, Tables
from attnbench.result import Status

DOCS = ROOT / "docs"
GENERATED = {"cli_docs": DOCS / "cli.md", "backends_docs": DOCS / "backends.md"}
"""Pages by the tool that makes them."""
PAGES = sorted(DOCS.rglob("*.md"))
WRITTEN = [page for page in (*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md") if page not in GENERATED.values()]
MADE_UP = ("/envs/", "reports/NAME", "RUN", "NAME", "OLD", "my_", "my-", ".toml")
"""What stands in a command for something of the reader's own, so that only its options can be tried."""


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```$|`[^`\n]+`", "", text(page), flags=re.MULTILINE | re.DOTALL)


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub and the site make it of plain words."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def commands(alone: bool) -> list[str]:
    """The attnbench commands that pages show, `alone` as lines of code, or else within a text."""
    found: set[str] = set()
    for page in WRITTEN:
        if not alone:
            found |= set(re.findall(r"`(attnbench [a-z-][^`\n]*)`", text(page)))
            continue
        blocks = re.findall(r"^```(?:sh|console)?\n(.*?)^```$", text(page), re.MULTILINE | re.DOTALL)
        blocks += re.findall(r"^ {4}.*$", text(page), re.MULTILINE)
        for block in blocks:
            found |= set(re.findall(r"^(?: {4})?(?:\$ )?(?:\.venv/bin/)?(attnbench .+)$", block, re.MULTILINE))
    return sorted({re.split(r" {2,}| #| > ", line)[0] for line in found})


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="some backends say what they take of the GPU at hand")


@NO_GPU
@pytest.mark.parametrize("tool", GENERATED)
def test_a_generated_page_is_current(tool: str) -> None:
    made = runpy.run_path(str(ROOT / "tools" / f"{tool}.py"))["page"]()
    assert text(GENERATED[tool]) == made, f"run python tools/{tool}.py"


@NO_GPU
@pytest.mark.parametrize("tool", GENERATED)
def test_a_stale_generated_page_is_exit_1_with_a_hint(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = runpy.run_path(str(ROOT / "tools" / f"{tool}.py"))["main"]
    monkeypatch.setattr("sys.argv", [f"{tool}.py", "--check"])
    main()
    page = tmp_path / "page.md"
    monkeypatch.setitem(main.__globals__, "PAGE", page)
    for stale in (None, "# Stale\n"):
        if stale is not None:
            page.write_text(stale)
        with pytest.raises(SystemExit, match=rf"run python tools/{tool}\.py"):  # sys.exit of text is exit code 1
            main()
    monkeypatch.setattr("sys.argv", [f"{tool}.py"])
    main()
    assert text(page) == text(GENERATED[tool])


@pytest.mark.parametrize("page", [*WRITTEN, *GENERATED.values()], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_points_to_something(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists(), target
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.+)$", text(found), re.MULTILINE)), target
        if page.is_relative_to(DOCS):
            assert found.is_relative_to(DOCS), f"{target} is not on the site"


@pytest.mark.parametrize("page", [*WRITTEN, *GENERATED.values()], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_run_that_a_page_cites_is_committed(page: Path) -> None:
    """A folder of reports/ that only this machine has, since git ignores new ones, is not evidence."""
    cited = set(re.findall(r"`reports/([\w-]+)", text(page))) - {"NAME"}
    listing = subprocess.run(("git", "ls-files", "reports"), cwd=ROOT, capture_output=True, text=True, check=True)
    assert cited <= {line.split("/")[1] for line in listing.stdout.splitlines()}


def test_every_page_is_in_the_navigation_once_and_nothing_else_is() -> None:
    nav = re.search(r"^nav:\n((?:  .*\n)+)", text(ROOT / "mkdocs.yml"), re.MULTILINE)
    assert nav is not None
    named = re.findall(r"([\w/-]+\.md)$", nav[1], re.MULTILINE)
    assert sorted(named) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


def test_there_are_commands_to_try() -> None:
    assert {"attnbench list", "attnbench run --suite smoke"} <= set(commands(alone=True))
    assert "attnbench cache show" in commands(alone=False)


@pytest.mark.parametrize("line", commands(alone=True))
def test_every_command_line_shown_is_one_that_parses(line: str, cli: Callable[..., Answer]) -> None:
    words = [str(ROOT / word) if word.startswith("reports/") else word for word in shlex.split(line)[1:]]
    made_up = any(part in line for part in MADE_UP)
    if words[0] == "run" and not made_up:
        answer = cli(*words, "--dry-run")
    elif words[0] == "report" and not made_up:
        answer = cli(*words)
    else:
        answer = cli(*words, "--help")
    assert answer.code in (0, None), answer.err
    assert answer.out


@pytest.mark.parametrize("words", commands(alone=False))
def test_every_command_named_in_a_text_has_the_options_it_is_named_with(words: str, cli: Callable[..., Answer]) -> None:
    answer = cli(*shlex.split(words)[1:], "--help")
    assert answer.code in (0, None), answer.err


@pytest.mark.parametrize(
    "block",
    [
        block
        for page in WRITTEN
        for block in re.findall(r"^```toml\n(.*?)^```$", text(page), re.MULTILINE | re.DOTALL)
        if "[[problems]]" in block
    ],
)
def test_every_suite_shown_loads(block: str, tmp_path: Path) -> None:
    path = tmp_path / "suite.toml"
    path.write_text(block, encoding="utf-8")
    assert len(load_suite(path)) >= 1


def test_the_table_on_the_first_page_is_the_committed_runs() -> None:
    comparison = Tables(store.load(ROOT / "reports" / "cpu-epyc")).comparisons[0]
    page = text(DOCS / "index.md")
    rows = [re.split(r" *\| *", line.strip("| ")) for line in re.findall(r"^\| +\d.*\|$", page, re.MULTILINE)]
    assert rows == comparison.cells[:4], "copy the rows of attnbench report reports/cpu-epyc"
    assert comparison.summary in page
    assert comparison.detectable in page


class _Written:
    """An annotation or a default as it stands in the source."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __repr__(self) -> str:
        return str(self._value).strip("\"'")


def signature(name: str, function: Callable[..., object]) -> str:
    """A signature as a person would write it, a parameter a line where it is long."""
    found = inspect.signature(function)
    shown = []
    for p in found.parameters.values():
        if p.kind is p.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        default = p.default
        if isinstance(default, enum.Enum):
            default = _Written(f"{type(default).__name__}.{default.name}")
        annotation = p.annotation if p.annotation is p.empty else _Written(p.annotation)
        shown.append(str(p.replace(annotation=annotation, default=default)))
    result = "" if found.return_annotation is found.empty else f" -> {_Written(found.return_annotation)!r}"
    line = f"{name}({', '.join(shown)}){result}"
    return line if len(line) <= 118 else "".join([f"{name}(\n", *(f"    {p},\n" for p in shown), f"){result}"])


def public_signatures() -> Iterator[str]:
    """Those of the hooks and of all that the public modules export."""
    yield signature("attnbench_backends", hookspecs.attnbench_backends)
    yield signature("attnbench_suites", hookspecs.attnbench_suites)
    for prefix, module in (("", attnbench), ("jit.", jit), ("testing.", testing)):
        for name in sorted(module.__all__):
            item = getattr(module, name)
            if inspect.isclass(item) and item is not testing.BackendConformance:
                if item is attnbench.Backend:  # a protocol, which nobody calls
                    yield from (f"Backend.{field}: {kind}" for field, kind in item.__annotations__.items())
                else:
                    yield signature(f"{prefix}{name}", item)
                for member, value in vars(item).items():
                    if member.startswith("_"):
                        continue
                    if inspect.isfunction(value):
                        yield signature(f"{prefix}{name}.{member}", value)
                    elif isinstance(value, classmethod):
                        yield signature(f"{prefix}{name}.{member}", getattr(item, member))
                    elif isinstance(value, (property, functools.cached_property)):
                        getter = value.fget if isinstance(value, property) else value.func
                        yield f"{prefix}{name}.{member}: {_Written(getter.__annotations__['return'])!r}"
            elif inspect.isfunction(item):
                yield signature(f"{prefix}{name}", item)


def test_the_page_on_plugins_promises_every_public_signature_as_it_is() -> None:
    promised = text(DOCS / "plugins.md").partition("## What is promised")[2]
    block = re.search(r"^```python\n(.*?)^```$", promised, re.MULTILINE | re.DOTALL)
    assert block is not None
    assert block[1].rstrip("\n") == "\n".join(public_signatures())


def test_every_status_column_and_public_name_is_explained() -> None:
    concepts, start, api = (text(DOCS / name) for name in ("concepts.md", "getting-started.md", "api.md"))
    assert set(re.findall(r"^\| ([A-Z_]+) \|", concepts, re.MULTILINE)) == {status.value for status in Status}
    cells = {cell for cells in re.findall(r"^\| ([^|]+) \|", start, re.MULTILINE) for cell in cells.split(", ")}
    assert set(DETAIL_COLUMNS) <= cells
    for name in attnbench.__all__:
        assert f"attnbench.{name}" in api
    for name in jit.__all__:
        assert f"attnbench.jit.{name}" in api
