"""Owns what a run will do: which device, which problems, which backends, chosen from what the user asked for.

Turns names into things and misses into messages. Runs nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnbench import devices
from attnbench.devices import Device, DeviceInfo
from attnbench.errors import AttnbenchError, ExitCode
from attnbench.problem import DEVICE_KINDS, DTYPES, PTO_SEQLENS_K, PTO_SEQLENS_Q, DeviceKind, Problem, Suite, load_suite
from attnbench.registry import BackendInfo, Catalogue, EntryPointRef, PluginInfo
from attnbench.result import Status

DEFAULT_SUITE = "pto"
DEFAULT_BASELINES: dict[DeviceKind, str] = {"npu": "npu_fused_attention", "cuda": "sdpa", "cpu": "sdpa"}
DEVICE_WORDS = {"gpu": "cuda"} | {kind: kind for kind in DEVICE_KINDS}
BEST = "best"
"""The baseline that is, in each problem, the fastest of the other backends."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What the user asked for, as text; None where nothing was."""

    backends: str | None = None
    skip: str | None = None
    baseline: str | None = None
    device: str = "auto"
    suite: str | None = None
    seqlen_q: str | None = None
    seqlen_k: str | None = None
    head_dim: str | None = None
    batch: str | None = None
    heads: str | None = None
    dtype: str | None = None
    causal: str | None = None

    @property
    def shapes(self) -> dict[str, str]:
        """The shape options that were given, which exclude a suite."""
        names = ("seqlen_q", "seqlen_k", "head_dim", "batch", "heads")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def names_problems(self) -> bool:
        """Whether any option that says which problems to run was given."""
        return bool(self.shapes) or (self.suite, self.dtype, self.causal) != (None, None, None)

    def over(self, earlier: Selection) -> Selection:
        """What was asked for and, of which backends on which device, what `earlier` was where nothing was."""
        names = ("backends", "baseline", "device")
        default = Selection()
        open_ = {name for name in names if getattr(self, name) == getattr(default, name)}
        return dataclasses.replace(self, **{name: getattr(earlier, name) for name in open_})


@dataclass(frozen=True)
class Entry:
    """One backend of a run: known to be available, or the status and reason it gets for every problem."""

    name: str
    backend: BackendInfo | None
    status: Status | None = None
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """Everything a run needs to know before it starts."""

    device: Device
    info: DeviceInfo
    suite: Suite
    """Its problems have dtypes, none `auto`."""
    entries: tuple[Entry, ...]
    baseline: str | None
    """As asked for: a backend's name, `best`, or None for the device's own."""

    @property
    def timed_baseline(self) -> str | None:
        """The backend whose ratios say when there are blocks enough, if it is among them; None for the fastest."""
        return None if self.baseline == BEST else self.baseline or DEFAULT_BASELINES[self.device.kind]


def make(selection: Selection, catalogue: Catalogue, suite: Suite | None = None) -> Plan:
    """Choose; `suite` stands for the selection's. Raises AttnbenchError with a hint for anything that is not there."""
    device = devices.choose(selection.device)
    reason = device.unavailable()
    info = device.info() if reason is None else DeviceInfo(kind=device.kind, name=device.kind, cores=None)
    suite = suite or choose_suite(selection, catalogue)
    problems = dict.fromkeys(problem.resolve(device.kind) for problem in suite)
    entries = _entries(selection, catalogue, device.kind, reason)
    baseline = selection.baseline
    if baseline not in (None, BEST):
        baseline, *more = resolve_backends(baseline, catalogue, "--baseline", also=(BEST,), kind=device.kind)
        if more:
            raise AttnbenchError(f"--baseline takes one name, not {selection.baseline!r}")
        if all(entry.name != baseline for entry in entries):
            entries = (_baseline_entry(baseline, selection, catalogue, device.kind, reason), *entries)
    if not entries:
        raise AttnbenchError(
            f"no backend is left to run on {device.kind}" + (f": {reason}" if reason else ""),
            "attnbench list shows what is available and why not",
            ExitCode.NOTHING_PASSED,
        )
    return Plan(device, info, dataclasses.replace(suite, problems=tuple(problems)), entries, baseline)


def _entries(
    selection: Selection, catalogue: Catalogue, kind: DeviceKind, device_reason: str | None
) -> tuple[Entry, ...]:
    if selection.backends is None:
        names = [b.name for b in catalogue.backends if b.device == kind and b.available and device_reason is None]
    else:
        names = resolve_backends(selection.backends, catalogue, kind=kind)
    skipped = _skipped(selection, catalogue, kind)
    return tuple(_entry(name, catalogue, kind, device_reason) for name in names if name not in skipped)


def _skipped(selection: Selection, catalogue: Catalogue, kind: DeviceKind) -> list[str]:
    _, failed = _names(catalogue)  # leaving out what did not load is no error
    words = [word for word in split(selection.skip, "--skip") if word not in failed]
    return resolve_backends(",".join(words), catalogue, "--skip", kind=kind) if words else []


def _baseline_entry(
    name: str, selection: Selection, catalogue: Catalogue, kind: DeviceKind, device_reason: str | None
) -> Entry:
    """The entry of a baseline that --backends does not name: nothing could be compared with one that cannot run."""
    if name in _skipped(selection, catalogue, kind):
        raise AttnbenchError(f"--skip leaves the baseline {name} out", "leave out one of the two")
    entry = _entry(name, catalogue, kind, device_reason)
    if entry.backend is None and device_reason is None:
        raise AttnbenchError(
            f"the baseline {name} is not available: {entry.reason}", "attnbench list shows what is available"
        )
    return entry


def _entry(name: str, catalogue: Catalogue, kind: DeviceKind, device_reason: str | None) -> Entry:
    here = catalogue.find(name, kind)
    if here is not None:
        reason = device_reason or here.reason
        return Entry(name, here) if reason is None else Entry(name, None, Status.UNAVAILABLE, reason)
    elsewhere = [b for b in catalogue.backends if b.name == name]
    where = " and ".join(b.device for b in elsewhere)
    why = "; ".join(f"on {b.device}: {b.reason}" for b in elsewhere if b.reason)
    reason = f"it runs on {where}, and this run is on {kind}" + (f" ({why})" if why else "")
    return Entry(name, None, Status.UNAVAILABLE, reason)


def resolve_backends(
    text: str,
    catalogue: Catalogue,
    option: str = "--backends",
    also: Sequence[str] = (),
    kind: DeviceKind | None = None,
) -> list[str]:
    """Backend names from a comma list of exact names, unique prefixes or `file.py:name`, each once, in the order given.

    A prefix of backends of the device `kind` is none of others'. `also` is what else the option takes, for hints.
    Raises AttnbenchError: for a plugin that failed to load with exit code 4, for a miss with the closest name.
    """
    known, failed = _names(catalogue)
    files: dict[EntryPointRef | None, PluginInfo] = {p.source: p for p in catalogue.plugins if p.source.file}
    here = [*(b.name for b in catalogue.backends if kind in (None, b.device)), *failed]  # those may be of any device
    names: list[str] = []
    for word in split(text, option):
        if plugin := files.get(EntryPointRef.of_file(word)):  # discovery was told of it
            _require_loaded(plugin, None)
            names += plugin.backends
            continue
        device = DEVICE_WORDS.get(word.lower())
        if device and not any(name.startswith(word) for name in (*known, *failed)):
            raise AttnbenchError(f"no backend is called {word!r}", f"to choose a device: --device {device}")
        name = match(word, [*known, *failed], here, also)
        if name in failed:
            _require_loaded(failed[name], "attnbench plugins shows its traceback")
        names.append(name)
    return list(dict.fromkeys(names))


def _names(catalogue: Catalogue) -> tuple[list[str], dict[str, PluginInfo]]:
    """The names of backends and, but for those, of plugins that failed to load and of backends that they stand for."""
    broken = {plugin.source for plugin in catalogue.failures}
    known = list(dict.fromkeys(b.name for b in catalogue.backends if b.source not in broken))
    names = ((name, plugin) for plugin in catalogue.failures for name in (plugin.source.name, *plugin.backends))
    return known, {name: plugin for name, plugin in names if name not in known}


def files_of(selection: Selection) -> list[EntryPointRef]:
    """The files that --backends and --baseline name, as `file.py:name`."""
    words = [word for text in (selection.backends, selection.baseline) if text for word in text.split(",")]
    return [source for word in words if (source := EntryPointRef.of_file(word.strip())) is not None]


def _require_loaded(plugin: PluginInfo, hint: str | None) -> None:
    if plugin.error is not None:
        source = plugin.source
        what = f"plugin {source.name} of {source.distribution} failed to load: {plugin.error_line}"
        raise AttnbenchError(what, hint, ExitCode.PLUGIN_FAILED)


def match(
    word: str, known: Sequence[str], first: Collection[str] = (), also: Sequence[str] = (), miss: str | None = None
) -> str:
    """The one of `known` that `word` is or begins; where it begins any of `first`, the one of these.

    Raises AttnbenchError: for several, and for none, in the words of `miss`, with the closest of `known` and `also`.
    """
    if word in known:
        return word
    starts = sorted(name for name in known if name.startswith(word))
    starts = [name for name in starts if name in first] or starts
    if len(starts) == 1:
        return starts[0]
    if starts:
        raise AttnbenchError(f"backend {word!r} could be {', '.join(starts)}", "write more of its name")
    hint = f"a backend in a file is {word}:NAME" if word.endswith(".py") else closest(word, [*known, *also])
    raise AttnbenchError(miss or f"no backend is called {word!r}", hint)


def closest(word: str, known: Collection[str]) -> str:
    """A hint: the nearest name, or all of them."""
    names = {name: name for name in known}
    if len(word) > 3:  # of three letters two are often right
        names = {name[: len(word)]: name for name in known} | names
    near = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.65)
    return f"did you mean {names[near[0]]}?" if near else f"there are {', '.join(sorted(known)) or 'none'}"


def choose_suite(selection: Selection, catalogue: Catalogue) -> Suite:
    """The suite asked for, by name, file or shape options, with --dtype and --causal applied."""
    if selection.shapes and selection.suite is not None:
        option = next(iter(selection.shapes)).replace("_", "-")
        raise AttnbenchError(f"--{option} and --suite exclude each other", "shapes make a suite of their own")
    suite = _custom(selection) if selection.shapes else _named(selection.suite or DEFAULT_SUITE, catalogue)
    changes: list[dict[str, Any]] = [{}]
    if dtypes := [choice(word, ("auto", *DTYPES), "dtype") for word in split(selection.dtype, "--dtype")]:
        changes = [{"dtype": dtype} for dtype in dtypes]
    if causals := [_boolean(word) for word in split(selection.causal, "--causal")]:
        changes = [change | {"causal": causal} for causal in causals for change in changes]
    problems = [dataclasses.replace(problem, **change) for change in changes for problem in suite]
    return dataclasses.replace(suite, problems=tuple(dict.fromkeys(problems)))


def _named(name: str, catalogue: Catalogue) -> Suite:
    if name.endswith(".toml"):
        return load_suite(Path(name))
    suites = {suite.name: suite for suite in catalogue.suites}
    if name not in suites:
        raise AttnbenchError(f"no suite is called {name!r}", f"{closest(name, suites)} (or give a file.toml)")
    return suites[name]


def _custom(selection: Selection) -> Suite:
    batches = lengths(selection.batch, "--batch") if selection.batch is not None else [1]
    heads = [_pair(word, "--heads") for word in split(selection.heads, "--heads")] or [(1, 1)]
    queries = lengths(selection.seqlen_q, "--seqlen-q") if selection.seqlen_q is not None else list(PTO_SEQLENS_Q)
    keys = lengths(selection.seqlen_k, "--seqlen-k") if selection.seqlen_k is not None else list(PTO_SEQLENS_K)
    dims = [_pair(word, "--head-dim") for word in split(selection.head_dim, "--head-dim")] or [(128, 128)]
    problems = []
    for batch, (heads_q, heads_kv), (head_dim, head_dim_v), seqlen_q, seqlen_k in itertools.product(
        batches, heads, dims, queries, keys
    ):
        try:
            problem = Problem(
                batch=batch,
                heads_q=heads_q,
                heads_kv=heads_kv,
                seqlen_q=seqlen_q,
                seqlen_k=seqlen_k,
                head_dim=head_dim,
                head_dim_v=head_dim_v,
            )
        except ValueError as error:
            raise AttnbenchError(str(error)) from error
        problems.append(problem)
    return Suite("custom", tuple(dict.fromkeys(problems)), "the shapes given on the command line")


def split(text: str | None, option: str) -> list[str]:
    """The words of a comma list; empty for None. Raises AttnbenchError where a word is missing."""
    if text is None:
        return []
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise AttnbenchError(f"{option} has an empty name in {text!r}", "separate names by single commas")
    return words


def length(word: str, option: str) -> int:
    """A whole number of at least 1; `k` stands for 1024. Raises AttnbenchError otherwise."""
    found = re.fullmatch(r"(\d+)(k?)", word, re.IGNORECASE | re.ASCII)
    value = int(found.group(1)) * (1024 if found.group(2) else 1) if found and len(word) < 12 else 0
    if value < 1:
        raise AttnbenchError(f"{option} must be whole numbers of at least 1, not {word!r}", "for example 128,1k")
    return value


def lengths(text: str, option: str) -> list[int]:
    return [length(word, option) for word in split(text, option)]


def _pair(word: str, option: str) -> tuple[int, int]:
    """`32x8` as (32, 8), `128` as (128, 128)."""
    first, separator, second = word.partition("x")
    value = length(first, option)
    return value, length(second, option) if separator else value


def choice(word: str, choices: Iterable[str], what: str) -> str:
    """`word`, where it is one of the choices. Raises AttnbenchError with the closest otherwise."""
    choices = tuple(choices)
    if word not in choices:
        raise AttnbenchError(f"no {what} is called {word!r}", closest(word, choices))
    return word


def _boolean(word: str) -> bool:
    return choice(word.lower(), ("true", "false"), "--causal value") == "true"
