"""Makes docs/backends.md from the plugins and the committed runs. Run: python tools/backends_docs.py, or with --check.

What a backend takes is found by asking its `unsupported`; how it ended, where and at which version, in reports/.
"""

from __future__ import annotations

import argparse
import ast
import bisect
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from packaging.requirements import Requirement

from attnbench import Problem
from attnbench.backend import Backend
from attnbench.problem import DEVICE_KINDS, Dtype
from attnbench.result import Status
from attnbench_plugins.jit_flash.cpu import ISAS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "backends.md"
DTYPES: tuple[Dtype, ...] = ("fp16", "bf16", "fp32")
HEAD_DIMS = range(1, 577)
MOST_HEAD_DIM = 2**17
DEVICES = {"cpu": "CPU", "cuda": "NVIDIA GPU", "npu": "Ascend NPU"}
PLAIN: dict[str, Any] = {"seqlen_q": 128, "seqlen_k": 1024, "head_dim": 128}
ONE_QUERY = {**PLAIN, "seqlen_q": 1}
"""For what decodes alone."""
FEATURES: dict[str, dict[str, Any]] = {
    "causal with as many queries as keys": {"seqlen_q": 1024, "causal": True},
    "causal with fewer": {"causal": True},
    "a window": {"window": 64},
    "a causal window": {"causal": True, "window": 64},
    "grouped heads": {"heads_q": 8, "heads_kv": 2},
    "head sizes 128×64": {"head_dim": 128, "head_dim_v": 64},
    "head sizes 192×128": {"head_dim": 192, "head_dim_v": 128},
    "8192 keys": {"seqlen_k": 8192},
    "queries that see no key": {"seqlen_q": 1024, "seqlen_k": 128, "causal": True},
    "one query": {"seqlen_q": 1},
    "odd lengths": {"seqlen_q": 77, "seqlen_k": 131},
}
"""What is asked of a backend beyond one plain problem, as fields of Problem."""
INTRO = """# Backends

<!-- made by: python tools/backends_docs.py -->
Every attention that comes with attnbench. What each takes was found by asking it, in each dtype, about head sizes,
causal masks (as many queries as keys, and fewer), windows, both, grouped heads, values of another size than keys (of
64 beside keys of 128, and of 128 beside 192), 8192 keys, queries that see no key (more of them than keys, and
causal), one query, and odd lengths; each by itself, with 1024 keys of head size 128. One head size for q, k and v
was asked for from 1 to 576; where they are taken at even steps that far, their end was looked for up to 131,072.
Where this page says no, a run says UNSUPPORTED and why.

*Verified* counts the results, but for UNSUPPORTED, of all runs that are committed under `reports/`, by the machine
and the version that the library had there; attnbench gives a time only to what agrees with the float64 oracle.
*tests* means the conformance kit in the tests, which CI runs. Where there is neither, *read* is the version whose
interface was read, and a link leads to what was checked without a run that is committed, or could not be.

`pip install '.[EXTRA]'` in a clone installs the library of one, where it has an extra; where two cannot share an
environment, run one of them with `--python NAME=EXE`. Without `--backends`, `attnbench run` takes all that are
available on the device."""
INSTRUCTION_SETS = [isa.name for isa in ISAS]
NOT_ON_HARDWARE = """This project has not run any of these on an Ascend NPU: see [Ascend NPUs](npu.md)."""
ON_PTO = {("jit_flash", "npu"), ("pto_demo_flash", "npu")}
"""What is compiled against the user's PTO library, which is no distribution."""


def project() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def backends() -> Iterator[tuple[str, Backend]]:
    """Every backend of this checkout, with its plugin's module."""
    with mock.patch.dict(os.environ, {"KERNELS_CACHE": os.devnull}):  # what this machine has of the Hub is no matter
        for value in project()["entry-points"]["attnbench.backends"].values():
            for backend in importlib.import_module(value).attnbench_backends():
                yield value, backend


def page() -> str:
    """The text of docs/backends.md."""
    found = sorted(backends(), key=lambda pair: pair[1].name)
    sections = [INTRO]
    for device in DEVICE_KINDS:
        of_device = [(module, backend) for module, backend in found if backend.device == device]
        sections.append(f"## {DEVICES[device]}")
        if device == "npu":
            sections.append(NOT_ON_HARDWARE)
        sections.append(_table(("backend", "what it is", "library", "extra", "verified"), map(_origin, of_device)))
        features = [_features(backend) for _, backend in of_device]
        sections.append(_table(("backend", "dtypes", "head sizes", "does not take"), features))
    return "\n\n".join(sections) + "\n"


def _origin(pair: tuple[str, Backend]) -> tuple[str, ...]:
    module, backend = pair
    page = _page_of(module, backend)
    return (
        f"[{backend.name}](kernels/{page.name})" if page else backend.name,
        _plain(_summary(backend)),
        "the user's PTO library" if _on_pto(backend) else ", ".join(_libraries(backend)),
        _extra(backend),
        _verified(module, backend, page),
    )


def _on_pto(backend: Backend) -> bool:
    return (backend.name, backend.device) in ON_PTO


def _libraries(backend: Backend) -> Mapping[str, str]:
    """What it calls, with the version that was read: torch of the version that is pinned where it names nothing."""
    return backend.libraries or {"torch": _pins()["torch"]}


def _pins() -> dict[str, str]:
    """The versions of what the tests install."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower()
    return dict(re.findall(r"^([\w.-]+)==([^\s;]+)", lines, re.MULTILINE))


def _extra(backend: Backend) -> str:
    """The extra that installs one of its libraries in the version that was read; of several, the one for its device."""
    found = []
    for extra, needs in project()["optional-dependencies"].items():
        for need in () if extra in ("test", "docs") else map(Requirement, needs):
            read = backend.libraries.get(need.name)
            if read and need.specifier.contains(read, prereleases=True):
                found.append(extra)
    others = tuple(f"-{device}" for device in DEVICE_KINDS if device != backend.device)
    return max((f"`{extra}`" for extra in found if not extra.endswith(others)), key=len, default="")


def _summary(backend: Backend) -> str:
    """Its summary, less what it says of this machine."""
    return re.sub(rf" \((?:not yet run on hardware|{'|'.join(INSTRUCTION_SETS)})\)$", "", backend.summary)


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _page_of(module: str, backend: Backend) -> Path | None:
    """The page that names its source."""
    source = module.replace("attnbench_plugins.", "plugins/").replace(".", "/")
    wanted = {f"`{source}.py`", f"`{source}/{backend.device}.py`"}
    for candidate in sorted((ROOT / "docs" / "kernels").glob("*.md")):
        if any(words in candidate.read_text(encoding="utf-8") for words in wanted):
            return candidate
    return None


def _verified(module: str, backend: Backend, page: Path | None) -> str:
    places = list(_results(backend))
    if backend.device == "cpu" and _tested(module, backend):
        places.append("tests")
    if places:
        return "; ".join(places)
    words = ["no committed run"]
    if not _on_pto(backend):
        words.append(f"read: {_listed(_libraries(backend))}")
    heading = page and re.search(r"^## (What was checked on an? .+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    if page and heading and backend.device == "cuda":  # what such a page tells of is a GPU
        anchor = heading[1].lower().replace(" ", "-")
        words.append(f"[{heading[1][0].lower()}{heading[1][1:]}](kernels/{page.name}#{anchor})")
    return "; ".join(words)


def _results(backend: Backend) -> Iterator[str]:
    """How all that was asked of it in committed runs ended, a machine and version at a time: failures are told too."""
    counts: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    folders: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for header_file in _committed_headers():
        header = json.loads(header_file.read_text(encoding="utf-8"))
        if header["device"]["kind"] != backend.device:
            continue
        lines = (header_file.parent / "results.jsonl").read_text(encoding="utf-8").splitlines()
        results = [json.loads(line) for line in lines]
        ended = Counter(r["status"] for r in results if r["backend"] == backend.name)
        del ended[Status.UNSUPPORTED.value]
        if ended:
            versions = _listed(_versions_in(header["environment"], backend)) or "version not recorded"
            counts[header["device"]["name"], versions] += ended
            folders[header["device"]["name"], versions].append(f"`reports/{header_file.parent.name}`")
    for (machine, versions), ended in counts.items():
        passed, total = ended.pop(Status.PASSED.value, 0), ended.total()
        failed = "".join(f", {count} {_plain(status)}" for status, count in sorted(ended.items()))
        where = ", ".join(folders[machine, versions])
        yield f"{passed} of {passed + total} results PASSED{failed} on {machine}, {versions} ({where})"


def _versions_in(environment: Mapping[str, Any], backend: Backend) -> dict[str, str]:
    """The versions of its libraries in a run, in the interpreter that it was in there."""
    elsewhere = environment.get("libraries_of_other_interpreters", {})
    there = elsewhere.get(f"{backend.name} on {backend.device}", environment["libraries"])
    return {name: there[name] for name in _libraries(backend) if name in there}


def _committed_headers() -> list[Path]:
    """The run.json of every run that git knows: what lies in reports/ beside them is this machine's alone."""
    listing = subprocess.run(
        ("git", "ls-files", "-z", "--", "reports/*/run.json"), cwd=ROOT, capture_output=True, text=True, check=True
    )
    return sorted(ROOT / name for name in listing.stdout.split("\0") if name)


def _tested(module: str, backend: Backend) -> bool:
    """Whether the tests install its libraries, and have it under the conformance kit."""
    if not backend.libraries.keys() <= _pins().keys():
        return False
    names = {type(backend).__name__, module.rpartition(".")[2]}
    tests = ast.parse((ROOT / "tests" / "test_conformance.py").read_text(encoding="utf-8"))
    for kit in tests.body:
        if isinstance(kit, ast.ClassDef) and [ast.unparse(base) for base in kit.bases] == ["BackendConformance"]:
            called = {node.id for line in kit.body for node in ast.walk(line) if isinstance(node, ast.Name)}
            if names & called:
                return True
    return False


def _features(backend: Backend) -> tuple[str, ...]:
    for plain in (PLAIN, ONE_QUERY):
        taken = [dtype for dtype in DTYPES if _takes(backend, {**plain, "dtype": dtype})]
        if not taken:
            continue
        sizes: defaultdict[str, list[str]] = defaultdict(list)
        for dtype in taken:
            sizes[_head_dims(backend, {**plain, "dtype": dtype})].append(dtype)
        head_dims = (words if len(sizes) == 1 else f"{words} in {_and(of)}" for words, of in sizes.items())
        refused = []
        for name, fields in FEATURES.items():
            by = [dtype for dtype in taken if not _takes(backend, {**plain, "dtype": dtype, **fields})]
            if by:
                refused.append(name if by == taken else f"{name} in {_and(by)}")
        return (backend.name, ", ".join(taken), ", ".join(head_dims), ", ".join(refused))
    return (backend.name, *("as its kernel",) * 3)


def _and(words: list[str]) -> str:
    return " and ".join(words)


def _takes(backend: Backend, fields: dict[str, Any]) -> bool:
    return backend.unsupported(Problem(**fields)) is None


def _head_dims(backend: Backend, plain: dict[str, Any]) -> str:
    """The head sizes that it takes, the same for q, k and v, in words."""
    taken = [size for size in HEAD_DIMS if _takes(backend, {**plain, "head_dim": size})]
    steps = {after - before for before, after in itertools.pairwise(taken)}
    if len(taken) <= 3:
        return ", ".join(map(str, taken))
    if len(steps) > 1:
        return f"{len(taken)} sizes from {taken[0]} to {taken[-1]}"
    (step,) = steps
    on = range(taken[-1], MOST_HEAD_DIM + 1, step)
    end = bisect.bisect(on, False, key=lambda size: not _takes(backend, {**plain, "head_dim": size}))
    last = "" if end == len(on) else f" up to {on[end - 1]}"
    first = "" if taken[0] == step else f" from {taken[0]}"
    return (f"multiples of {step}" if step > 1 else "all" if not (first or last) else "any") + first + last


def _plain(words: str) -> str:
    return re.sub(r"[|*_<`]", r"\\\g<0>", words)


def _table(headers: tuple[str, ...], rows: Any) -> str:
    lines = [headers, ("---",) * len(headers), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--check", action="store_true", help="write nothing; exit 1 where the page is not current")
    if torch.cuda.is_available():
        sys.exit("run it where torch sees no GPU: some backends say what is supported of the GPU and the build at hand")
    made = page()
    if not options.parse_args().check:
        PAGE.write_text(made, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != made:
        sys.exit("docs/backends.md is not what the plugins say: run python tools/backends_docs.py and commit it")


if __name__ == "__main__":
    main()
