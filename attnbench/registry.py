"""Owns what a plugin is to attnbench: an entry point, what it brings, and loading it in the process that asks.

Everything but `load` is for a process that may die of it: attnbench's own knows plugins from discovery.py alone, as
plain data (Catalogue).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import re
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import pluggy

from attnbench import hookspecs
from attnbench.backend import NAME_PATTERN, Backend, faults
from attnbench.errors import in_a_line
from attnbench.problem import DEVICE_KINDS, DeviceKind, Suite

MACHINERY = frozenset({"attnbench", "importlib", "pluggy"})
"""Packages whose frames come before a plugin's own in a traceback, and say nothing about it."""


@dataclass(frozen=True)
class EntryPointRef:
    """Where a plugin comes from: enough to load it again, in this process or another."""

    distribution: str
    version: str
    name: str
    value: str
    python: str = ""
    """The interpreter whose environment it is installed in; empty for the one that runs attnbench."""

    def to_json(self) -> dict[str, str]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: object) -> EntryPointRef:
        """What `to_json` wrote. Raises ValueError where it is anything else."""
        texts = _table(data, {field.name for field in dataclasses.fields(cls)})
        return cls(**{name: _text(value) for name, value in texts.items()})


@dataclass(frozen=True)
class BackendInfo:
    """What is known of a backend without calling it on a problem."""

    name: str
    device: DeviceKind
    summary: str
    homepage: str
    available: bool
    reason: str | None
    """Why not available; None where it is."""
    source: EntryPointRef


@dataclass(frozen=True)
class PluginInfo:
    """One entry point: what it brought, or why it failed."""

    source: EntryPointRef
    backends: tuple[str, ...]
    suites: tuple[str, ...]
    load_s: float
    error: str | None
    """The failure's traceback, from the plugin's first line on, and its message; None where it loaded."""

    @property
    def error_line(self) -> str:
        """The failure in one line."""
        return self.error.strip().splitlines()[-1] if self.error else ""


@dataclass(frozen=True)
class Catalogue:
    """All that discovery found, in a fixed order: attnbench's own plugins first, then by distribution and name."""

    plugins: tuple[PluginInfo, ...]
    backends: tuple[BackendInfo, ...]
    suites: tuple[Suite, ...]

    def find(self, name: str, device: DeviceKind) -> BackendInfo | None:
        return next((b for b in self.backends if (b.name, b.device) == (name, device)), None)

    @property
    def failures(self) -> tuple[PluginInfo, ...]:
        return tuple(plugin for plugin in self.plugins if plugin.error is not None)


@dataclass(frozen=True)
class Description:
    """One entry point and all that it brought, before anybody asked whether it clashes with another."""

    source: EntryPointRef
    backends: tuple[BackendInfo, ...] = ()
    suites: tuple[Suite, ...] = ()
    load_s: float = 0.0
    error: str | None = None

    @property
    def plugin(self) -> PluginInfo:
        names = tuple(dict.fromkeys(info.name for info in self.backends))
        return PluginInfo(self.source, names, tuple(suite.name for suite in self.suites), self.load_s, self.error)

    def to_json(self) -> dict[str, Any]:
        """As JSON types, without the source, which whoever asked knows."""
        fields = ("name", "device", "summary", "homepage", "reason")
        return {
            "backends": [{field: getattr(info, field) for field in fields} for info in self.backends],
            "suites": [suite.to_json() for suite in self.suites],
            "load_s": self.load_s,
            "error": self.error,
        }

    @classmethod
    def from_json(cls, data: object, source: EntryPointRef) -> Description:
        """What `to_json` wrote. Raises ValueError where it is anything else."""
        facts = _table(data, {"backends", "suites", "load_s", "error"})
        backends = tuple(_backend(item, source) for item in _list(facts["backends"]))
        suites = tuple(map(Suite.from_json, _list(facts["suites"])))
        load_s, error = facts["load_s"], facts["error"]
        if isinstance(load_s, bool) or not isinstance(load_s, (int, float)) or load_s < 0:
            raise ValueError(f"{load_s!r} is no time")
        if error is not None and (not _text(error).strip() or backends or suites):
            raise ValueError("what failed has a message and brings nothing")
        return cls(source, backends, suites, float(load_s), error)


def _backend(data: object, source: EntryPointRef) -> BackendInfo:
    facts = _table(data, {"name", "device", "summary", "homepage", "reason"})
    name, device, reason = _text(facts["name"]), facts["device"], facts["reason"]
    if not re.fullmatch(NAME_PATTERN, name):
        raise ValueError(f"{name!r} is no backend's name")
    if device not in DEVICE_KINDS:
        raise ValueError(f"{device!r} is no device")
    if reason is not None and not _text(reason):
        raise ValueError("an empty reason says nothing")
    return BackendInfo(name, device, _text(facts["summary"]), _text(facts["homepage"]), reason is None, reason, source)


def _table(data: object, keys: set[str]) -> Mapping[str, Any]:
    if not isinstance(data, dict) or set(data) != keys:
        raise ValueError(f"it is no object of {', '.join(sorted(keys))}")
    return data


def _list(data: object) -> list[Any]:
    if not isinstance(data, list):
        raise ValueError("it is no list")
    return data


def _text(data: object) -> str:
    if not isinstance(data, str):
        raise ValueError("it is no text")
    return data


class PluginError(Exception):
    """A plugin broke the contract; the message says how."""


def entry_points() -> list[EntryPointRef]:
    """What group `attnbench.backends` holds in this process's environment, each once."""
    found = set()
    for entry in importlib.metadata.entry_points(group=hookspecs.ENTRY_POINT_GROUP):
        distribution = entry.dist
        name, version = (distribution.name, distribution.version) if distribution else ("unknown", "")
        found.add(EntryPointRef(name, version, entry.name, entry.value))
    return sorted(found, key=lambda ref: (ref.distribution, ref.name, ref.value, ref.version))


def describe(source: EntryPointRef) -> Description:
    """Load one entry point in this process and describe what it brings.

    A plugin that fails to import, exits, misspells a hook, or brings something that is no backend brings nothing but
    its error. One that ends the process ends it.
    """
    start = time.perf_counter()
    try:
        loaded = _load_plugin(source)
        backends = tuple(_describe(backend, source) for backend in loaded.backends)
    except BaseException as error:  # a plugin may raise anything, and may try to end the process
        return Description(source, load_s=time.perf_counter() - start, error=_trace(error))
    return Description(source, backends, loaded.suites, time.perf_counter() - start)


def load(info: BackendInfo) -> Backend:
    """The backend itself, of the plugin that it was found in. Raises what the plugin raises, and PluginError."""
    for backend in _load_plugin(info.source).backends:
        if (backend.name, backend.device) == (info.name, info.device):
            return backend
    raise PluginError(f"{info.source.value} brings no {info.name} on {info.device} any more")


@dataclass(frozen=True)
class _Loaded:
    backends: tuple[Backend, ...]
    suites: tuple[Suite, ...]


@functools.cache
def _load_plugin(source: EntryPointRef) -> _Loaded:
    """Import one entry point and call its hooks, in a plugin manager of its own: no failure can half-register."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    entry = importlib.metadata.EntryPoint(source.name, source.value, hookspecs.ENTRY_POINT_GROUP)
    plugin = entry.load()
    manager.register(plugin, name=source.name)
    manager.check_pending()
    if not manager.get_hookcallers(plugin):
        raise PluginError(f"{source.value} implements no hook: is one marked with @attnbench.hookimpl?")
    backends = tuple(_collect(manager.hook.attnbench_backends()))
    suites = tuple(_collect(manager.hook.attnbench_suites()))
    for backend in backends:
        if found := faults(backend):
            raise PluginError(f"{type(backend).__name__} is no backend: {'; '.join(found)}")
    for suite in suites:
        if not isinstance(suite, Suite):
            raise PluginError(f"attnbench_suites() returned {suite!r}, not a Suite")
    return _Loaded(cast("tuple[Backend, ...]", backends), suites)


def _collect(hook_results: list[Any]) -> Iterator[Any]:
    for items in hook_results:
        if isinstance(items, (str, bytes)) or not isinstance(items, Iterable):
            raise PluginError(f"a hook returned {items!r}, not a list")
        yield from items


def _describe(backend: Backend, source: EntryPointRef) -> BackendInfo:
    reason = backend.unavailable()
    if reason is not None and not (isinstance(reason, str) and reason):
        raise PluginError(f"{backend.name}.unavailable() returned {reason!r}, neither a reason nor None")
    summary, homepage = getattr(backend, "summary", ""), getattr(backend, "homepage", "")
    return BackendInfo(backend.name, backend.device, summary, homepage, reason is None, reason, source)


def _trace(error: BaseException) -> str:
    if isinstance(error, PluginError):
        return str(error)
    frames = error.__traceback__
    while frames is not None and str(frames.tb_frame.f_globals.get("__name__")).partition(".")[0] in MACHINERY:
        frames = frames.tb_next
    try:
        return "".join(traceback.format_exception(type(error), error, frames))
    except Exception:  # its own __str__ raises
        return in_a_line(error)
