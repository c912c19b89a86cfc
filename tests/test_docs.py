"""docs/: current where it is generated, its links and pages are there, and its commands are ones that parse."""

from __future__ import annotations

import enum
import functools
import inspect
import json
import re
import runpy
import shlex
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BUILT_IN, ROOT, Answer

import attnbench
from attnbench import hookspecs, jit, store, testing
from attnbench.problem import DEVICE_KINDS, Problem, load_suite
from attnbench.report.tables import DETAIL_COLUMNS, Tables
from attnbench.result import Status
from attnbench_plugins import jax_xla

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

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


def backend_rows(which: int) -> dict[tuple[str, str], dict[str, str]]:
    """The rows of docs/backends.md by backend and device: of each device's first table, or its second."""
    found = {}
    for device, section in zip(DEVICE_KINDS, text(GENERATED["backends_docs"]).split("\n## ")[1:]):
        head, _, *lines = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)[which].splitlines()
        names = head.strip("| ").split(" | ")
        for line in lines:
            row = dict(zip(names, (cell.strip() for cell in line.strip("|").split(" | "))))
            found[re.sub(r"^\[(.+)\]\(.+\)$", r"\1", row["backend"]), device] = row
    return found


@pytest.fixture
def tool() -> dict[str, Any]:
    """What tools/backends_docs.py has, as the one namespace of its functions."""
    return runpy.run_path(str(ROOT / "tools" / "backends_docs.py"))["page"].__globals__


class Made(attnbench.Backend):
    """A backend with limits by dtype, and without libraries."""

    name, device = "made", "cpu"

    def unsupported(self, problem: Problem) -> str | None:
        most, step = (1024, 4) if problem.dtype == "fp32" else (2**20, 8)
        if problem.head_dim % step or problem.head_dim > most or problem.dtype == "fp16":
            return "head size"
        if (problem.head_dim, problem.head_dim_v) == (128, 64):
            return "192×128 alone"
        return "keys" if problem.dtype == "fp32" and problem.seqlen_k > 1024 else None


def test_the_page_of_backends_counts_every_failure_of_a_committed_run() -> None:
    listing = subprocess.run(("git", "ls-files", "reports"), cwd=ROOT, capture_output=True, text=True, check=True)
    ended: dict[tuple[str, str], Counter[str]] = {}
    for name in listing.stdout.splitlines():
        for line in text(ROOT / name).splitlines() if name.endswith("results.jsonl") else ():
            result = json.loads(line)
            ended.setdefault((result["backend"], result["device"]), Counter())[result["status"]] += 1
    assert ended["openvino", "cpu"]["INCORRECT"], "there is one to count"
    for key, row in backend_rows(0).items():
        cell, told = row["verified"].replace("\\", ""), Counter[str]()
        for passed, total, failed in re.findall(r"(\d+) of (\d+) results PASSED((?:, \d+ [A-Z_]+)*) on ", cell):
            told["PASSED"] += int(passed)
            for count, status in re.findall(r"(\d+) ([A-Z_]+)", failed):
                told[status] += int(count)
            assert int(total) == int(passed) + sum(int(n) for n in re.findall(r"(\d+) [A-Z]", failed))
        counted = ended.get(key, Counter())
        del counted["UNSUPPORTED"]
        assert told == counted, key
        assert bool(counted) != ("no committed run" in cell) or cell == "tests", key


def test_a_run_is_told_by_machine_and_by_the_version_of_the_interpreter_it_was_in(
    tool: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = []
    environment = {
        "libraries": {"torch": "2.13", "ovens": "1.2"},
        "libraries_of_other_interpreters": {
            "there on cpu": {"torch": "2.6", "ovens": "0.9"},
            "third on cpu": {"torch": "2.7"},
        },
    }
    for folder, libraries, statuses in (
        ("a", environment, ("PASSED", "INCORRECT", "UNSUPPORTED")),
        ("b", environment, ("PASSED", "RUNTIME_ERROR")),
        ("c", {"libraries": {}}, ("CRASHED",)),
        ("d", environment, ("UNSUPPORTED",)),
    ):
        header = {"device": {"kind": "cpu", "name": "M"}, "environment": libraries}
        results = [{"backend": name, "status": s} for name in ("here", "there", "third") for s in statuses]
        path = tmp_path / folder
        path.mkdir()
        (path / "run.json").write_text(json.dumps(header))
        (path / "results.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
        headers.append(path / "run.json")
    monkeypatch.setitem(tool, "_committed_headers", lambda: headers)
    both = "2 of 4 results PASSED, 1 INCORRECT, 1 RUNTIME\\_ERROR on M, {} (`reports/a`, `reports/b`)"
    crashed = "0 of 1 results PASSED, 1 CRASHED on M, version not recorded (`reports/c`)"
    for name, libraries, versions in (
        ("here", {"ovens": "1"}, "ovens 1.2"),
        ("here", {}, "torch 2.13"),
        ("there", {"ovens": "1"}, "ovens 0.9"),
        ("there", {}, "torch 2.6"),
        ("third", {"ovens": "1"}, "version not recorded"),
        ("third", {}, "torch 2.7"),
    ):
        backend = types.SimpleNamespace(name=name, device="cpu", libraries=libraries)
        told = list(tool["_results"](backend))
        if versions == "version not recorded":
            assert told == [
                "2 of 5 results PASSED, 1 CRASHED, 1 INCORRECT, 1 RUNTIME\\_ERROR on M, version not recorded "
                "(`reports/a`, `reports/b`, `reports/c`)"
            ]
        else:
            assert told == [both.format(versions), crashed]


def test_what_has_no_committed_run_says_what_was_read_and_where_checks_are_told_of() -> None:
    rows = {key: row["verified"] for key, row in backend_rows(0).items()}
    pinned = re.search(r"^torch==(.+)$", text(ROOT / "constraints.txt"), re.MULTILINE)
    assert pinned is not None
    assert rows["gemm_ref", "npu"] == f"no committed run; read: torch {pinned[1]}"
    link = "[what was checked on an H100](kernels/flash_attn.md#what-was-checked-on-an-h100)"
    assert rows["flash_attn", "cuda"].startswith("no committed run; read: ")
    assert rows["flash_attn", "cuda"].endswith(f"; {link}")
    assert "H100" not in rows["triton_flash", "npu"], "its page tells of a GPU"
    assert rows["pto_demo_flash", "npu"] == "no committed run"
    assert backend_rows(0)["pto_demo_flash", "npu"]["library"] == "the user's PTO library"
    for page in (DOCS / "kernels").glob("*.md"):
        _, found, section = text(page).partition("\n## What was checked on ")
        assert not found or "no record is committed" in " ".join(section.split()), page


def test_tests_are_claimed_of_what_is_under_the_kit_alone(tool: dict[str, Any]) -> None:
    assert "tests" not in tool["_verified"]("made_module", Made(), None)
    of_cpu = {name for name, device in backend_rows(0) if device == "cpu"}
    assert {key for key, row in backend_rows(0).items() if row["verified"].endswith("tests")} == {
        (name, "cpu") for name in of_cpu
    }


def test_limits_are_told_by_dtype_and_no_further_than_they_were_found(tool: dict[str, Any]) -> None:
    _, dtypes, head_dims, refused = tool["_features"](Made())
    assert dtypes == "bf16, fp32"
    assert head_dims == "multiples of 8 in bf16, multiples of 4 up to 1024 in fp32"
    assert refused == "head sizes 128×64, 8192 keys in fp32"


def test_every_extra_that_installs_a_backends_library_stands_beside_it() -> None:
    rows = {key: row["extra"].strip("`") for key, row in backend_rows(0).items()}
    assert rows["ggml", "cpu"] == "ggml"
    assert (rows["jax_xla", "cpu"], rows["jax_cudnn", "cuda"], rows["jax_pallas", "cuda"]) == (
        *("jax", "jax-cuda", "jax-cuda"),
    )
    assert rows["pto_flash_attention", "npu"] == "", "the extra npu has a later torch-npu than it is built for"
    there = set(tomllib.loads(text(ROOT / "pyproject.toml"))["project"]["optional-dependencies"])
    assert set(rows.values()) - {""} == there - {"cuda", "docs", "peers", "test"}
    pages = {key: re.findall(r"\]\((.+)\)", row["backend"])[0] for key, row in backend_rows(0).items()}
    for key, extra in rows.items():
        page = text(DOCS / ("npu.md" if extra == "npu" else pages[key]))
        assert not extra or f"attnbench[{extra}]" in page or f"`{extra}`" in page, key


def test_a_failure_of_a_committed_run_is_told_on_the_page_of_its_backend() -> None:
    listing = subprocess.run(("git", "ls-files", "reports"), cwd=ROOT, capture_output=True, text=True, check=True)
    rows = backend_rows(0)
    failed = 0
    for name in listing.stdout.splitlines():
        for line in text(ROOT / name).splitlines() if name.endswith("results.jsonl") else ():
            result = json.loads(line)
            if result["status"] in ("PASSED", "UNSUPPORTED"):
                continue
            failed += 1
            page = re.search(r"\((kernels/\w+\.md)\)", rows[result["backend"], result["device"]]["backend"])
            assert page is not None
            told = " ".join(text(DOCS / page[1]).split())
            assert f"`{Path(name).parent}`" in told
            assert result["status"] in told
            for number in re.findall(r"\d\.\d+e-\d+", result["reason"]):
                assert number in told
    assert failed


def test_the_page_of_jax_says_of_times_what_the_source_has() -> None:
    ours, theirs = (
        [float(time) for time in re.findall(r"\d+\.\d", line)]
        for line in re.findall(r"^    (?:here|dot_product_attention) .+$", jax_xla.__doc__ or "", re.MULTILINE)
    )
    slower = [b / a for a, b in zip(ours, theirs) if b > a]
    words = f"of five shapes four took {min(slower):.1f} to {max(slower):.0f} times as long, and one, of 16 queries and"
    assert (len(ours), len(slower)) == (5, 4)
    assert words in " ".join(text(DOCS / "kernels" / "jax.md").split())


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


def test_the_changelog_has_every_backend_and_contributing_every_generated_page() -> None:
    named = set(re.findall(r"`(\w+)`", text(ROOT / "CHANGELOG.md")))
    assert set(BUILT_IN) <= named
    made_by = re.findall(r"`docs/(\S+)` (?:is made )?by `python tools/(\w+)\.py`", text(ROOT / "CONTRIBUTING.md"))
    assert made_by == [(page.name, tool) for tool, page in GENERATED.items()]


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
