"""Makes docs/backends.md from the plugins and the committed runs. Run: python tools/backends_docs.py, or with --check.

What a backend takes is found by asking its `unsupported`; where it ran, and at which version, in reports/.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from attnbench import Problem
from attnbench.backend import Backend
from attnbench.problem import DEVICE_KINDS, Dtype
from attnbench_plugins.jit_flash.cpu import ISAS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "backends.md"
DTYPES: tuple[Dtype, ...] = ("fp16", "bf16", "fp32")
HEAD_DIMS = range(1, 577)
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
    "values of another size": {"head_dim": 128, "head_dim_v": 64},
    "queries that see no key": {"seqlen_q": 1024, "seqlen_k": 128, "causal": True},
    "one query": {"seqlen_q": 1},
    "odd lengths": {"seqlen_q": 77, "seqlen_k": 131},
}
"""What is asked of a backend beyond one plain problem, as fields of Problem."""
INTRO = """# Backends

<!-- made by: python tools/backends_docs.py -->
Every attention that comes with attnbench. What each takes was found by asking it, in the first dtype that it has,
about causal masks (as many queries as keys, and fewer), windows, both, grouped heads, values of another size than
keys, queries that see no key (more of them than keys, and causal), one query, and odd lengths; where this page says
no, a run says UNSUPPORTED and why. *Verified* tells where it was run within attnbench, which gives a time only to what
agrees with the float64 oracle: in a run that is committed under `reports/`, with the version that its library had
then, or in the tests, which CI runs. For what was not run, it tells the version whose interface was read.

`pip install 'attnbench[EXTRA]'` installs the library of one; where two cannot share an environment, run one of them
with `--python NAME=EXE`. Without `--backends`, `attnbench run` takes all that are available on the device."""


INSTRUCTION_SETS = [isa.name for isa in ISAS]


NOT_ON_HARDWARE = """This project has not run any of these on an Ascend NPU: see [Ascend NPUs](npu.md)."""


@dataclasses.dataclass(frozen=True)
class Ran:
    """A committed run in which a backend passed."""

    folder: str
    machine: str
    passed: int
    versions: dict[str, str]


def backends() -> Iterator[tuple[str, Backend]]:
    """Every backend of this checkout, with its plugin's module."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    with mock.patch.dict(os.environ, {"KERNELS_CACHE": os.devnull}):  # what this machine has of the Hub is no matter
        for value in table["entry-points"]["attnbench.backends"].values():
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
        sections.append(_table(("backend", "what it is", "library", "verified"), map(_origin, of_device)))
        features = [_features(backend) for _, backend in of_device]
        sections.append(_table(("backend", "dtypes", "head sizes", "does not take"), features))
    return "\n\n".join(sections) + "\n"


def _origin(pair: tuple[str, Backend]) -> tuple[str, ...]:
    module, backend = pair
    return (
        _linked(module, backend),
        _plain(_summary(backend)),
        ", ".join(backend.libraries) or "torch",
        _verified(backend),
    )


def _summary(backend: Backend) -> str:
    """Its summary, less what it says of this machine."""
    return re.sub(rf" \((?:not yet run on hardware|{'|'.join(INSTRUCTION_SETS)})\)$", "", backend.summary)


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _linked(module: str, backend: Backend) -> str:
    """A backend's name, as a link to the page that names its source."""
    source = module.replace("attnbench_plugins.", "plugins/").replace(".", "/")
    wanted = {f"`{source}.py`", f"`{source}/{backend.device}.py`"}
    for candidate in sorted((ROOT / "docs" / "kernels").glob("*.md")):
        if any(words in candidate.read_text(encoding="utf-8") for words in wanted):
            return f"[{backend.name}](kernels/{candidate.name})"
    return backend.name


def _verified(backend: Backend) -> str:
    runs = sorted(_runs(backend), key=lambda ran: (bool(ran.versions) or not backend.libraries, ran.passed))
    places = []
    if runs:
        best = runs[-1]
        versions = _listed(best.versions)
        places.append(f"`{best.folder}`: {best.passed} problems on {best.machine}" + (versions and f", {versions}"))
    if backend.device == "cpu" and _tested(backend):
        places.append("tests")
    return "; ".join(places) or f"**not run**; read: {_listed(backend.libraries) or 'its own source'}"


def _committed_headers() -> list[Path]:
    """The run.json of every run that git knows: what lies in reports/ beside them is this machine's alone."""
    listing = subprocess.run(
        ("git", "ls-files", "-z", "--", "reports/*/run.json"), cwd=ROOT, capture_output=True, text=True, check=True
    )
    return sorted(ROOT / name for name in listing.stdout.split("\0") if name)


def _runs(backend: Backend) -> Iterator[Ran]:
    for header_file in _committed_headers():
        header = json.loads(header_file.read_text(encoding="utf-8"))
        if header["device"]["kind"] != backend.device:
            continue
        lines = (header_file.parent / "results.jsonl").read_text(encoding="utf-8").splitlines()
        results = [json.loads(line) for line in lines]
        passed = sum(r["backend"] == backend.name and r["status"] == "PASSED" for r in results)
        if passed:
            environment = header["environment"]
            known = {**environment["libraries"], **environment.get("libraries_of_other_interpreters", {})}
            versions = {name: known[name] for name in backend.libraries or ("torch",) if name in known}
            yield Ran(f"reports/{header_file.parent.name}", header["device"]["name"], passed, versions)


def _tested(backend: Backend) -> bool:
    """Whether what the tests install has its libraries."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower()
    return all(re.search(rf"^{re.escape(name)}==", pins, re.MULTILINE) for name in backend.libraries)


def _features(backend: Backend) -> tuple[str, ...]:
    for plain in (PLAIN, ONE_QUERY):
        dtypes = [dtype for dtype in DTYPES if _takes(backend, {**plain, "dtype": dtype})]
        if dtypes:
            plain = {**plain, "dtype": dtypes[0]}
            refused = (name for name, fields in FEATURES.items() if not _takes(backend, {**plain, **fields}))
            return (backend.name, ", ".join(dtypes), _head_dims(backend, plain), ", ".join(refused))
    return (backend.name, *("as its kernel",) * 3)


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
    last = "" if taken[-1] + step > HEAD_DIMS[-1] else f" up to {taken[-1]}"
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
