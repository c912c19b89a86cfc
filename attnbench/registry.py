"""Owns what a plugin is to attnbench: an entry point, what it brings, and loading it in the process that asks.

Everything but `load` is for a process that may die of it: attnbench's own knows plugins from discovery.py alone, as
plain data (Catalogue).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import re
import reprlib
import sys
import time
import traceback
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import pluggy

from attnbench import hookspecs
from attnbench.backend import NAME_PATTERN, Backend, faults
from attnbench.errors import in_a_line
from attnbench.problem import DEVICE_KINDS, DeviceKind, Suite
from attnbench.text import without_home

MACHINERY = frozenset({"attnbench", "importlib", "pluggy"})
"""Packages whose frames come before a plugin's own in a traceback, and say nothing about it."""
LATER_GROUP = re.compile(re.escape(hookspecs.ENTRY_POINT_GROUP) + r"\W?\w.*")
"""Groups of contracts that are not there yet, as attnbench.backends.v2."""


@dataclass(frozen=True)
class EntryPointRef:
    """Where a plugin comes from: enough to load it again, in this process or another."""

    distribution: str
    version: str
    name: str
    value: str
    python: str = ""
    """The interpreter whose environment it is installed in; empty for the one that runs attnbench."""
    group: str = hookspecs.ENTRY_POINT_GROUP

    @classmethod
    def of_file(cls, word: str) -> EntryPointRef | None:
        """What `path/file.py:name` names: a backend in a file, installed nowhere; None for any other word."""
        path, colon, name = word.rpartition(":")
        if not colon or not path.endswith(".py"):
            return None
        path = os.path.abspath(os.path.expanduser(path))
        return cls(os.path.basename(path), "", name, f"{path}:{name}")

    @property
    def file(self) -> str:
        """The path of a file that is installed nowhere; empty for an entry point."""
        path = self.value.rpartition(":")[0]
        return path if path.endswith(".py") and os.path.isabs(path) else ""

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
    libraries: tuple[tuple[str, str], ...] = ()
    """The distributions that it calls, with the version installed, which is empty where none is. torch is one of them
    where the backend names no other, and where it is another interpreter's."""


@dataclass(frozen=True)
class PluginInfo:
    """One entry point: what it brought, or why it failed."""

    source: EntryPointRef
    backends: tuple[str, ...]
    """Of one that another interpreter failed to bring, those that have its name in this one's environment."""
    suites: tuple[str, ...]
    load_s: float
    error: str | None
    """The failure's traceback, from the plugin's first line on, and its message; None where it loaded."""
    sources: tuple[str, ...] = ()
    """Absolute paths of the files and folders that its code lies in."""
    calls: tuple[str, ...] = ()
    """What attnbench called of it to learn this, and what that gave, in the order called."""

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
    sources: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()

    @property
    def plugin(self) -> PluginInfo:
        names = tuple(dict.fromkeys(info.name for info in self.backends))
        suites = tuple(suite.name for suite in self.suites)
        return PluginInfo(self.source, names, suites, self.load_s, self.error, self.sources, self.calls)

    def to_json(self) -> dict[str, Any]:
        """As JSON types, without the source, which whoever asked knows."""
        fields = ("name", "device", "summary", "homepage", "reason")
        return {
            "backends": [
                {field: getattr(info, field) for field in fields} | {"libraries": dict(info.libraries)}
                for info in self.backends
            ],
            "suites": [suite.to_json() for suite in self.suites],
            "load_s": self.load_s,
            "error": self.error,
            "sources": list(self.sources),
            "calls": list(self.calls),
        }

    @classmethod
    def from_json(cls, data: object, source: EntryPointRef) -> Description:
        """What `to_json` wrote. Raises ValueError where it is anything else."""
        facts = _table(data, {"backends", "suites", "load_s", "error", "sources", "calls"})
        backends = tuple(_backend(item, source) for item in _list(facts["backends"]))
        suites = tuple(map(Suite.from_json, _list(facts["suites"])))
        load_s, error = facts["load_s"], facts["error"]
        if isinstance(load_s, bool) or not isinstance(load_s, (int, float)) or load_s < 0:
            raise ValueError(f"{load_s!r} is no time")
        if error is not None and (not _text(error).strip() or backends or suites):
            raise ValueError("what failed has a message and brings nothing")
        sources, calls = (tuple(map(_text, _list(facts[name]))) for name in ("sources", "calls"))
        return cls(source, backends, suites, float(load_s), error, sources, calls)


def _backend(data: object, source: EntryPointRef) -> BackendInfo:
    facts = _table(data, {"name", "device", "summary", "homepage", "reason", "libraries"})
    name, device, reason = _text(facts["name"]), facts["device"], facts["reason"]
    if not re.fullmatch(NAME_PATTERN, name):
        raise ValueError(f"{name!r} is no backend's name")
    if device not in DEVICE_KINDS:
        raise ValueError(f"{device!r} is no device")
    if reason is not None and not _text(reason):
        raise ValueError("an empty reason says nothing")
    libraries = facts["libraries"]
    if not isinstance(libraries, dict):
        raise ValueError("libraries are no object")
    return BackendInfo(
        name,
        device,
        _text(facts["summary"]),
        _text(facts["homepage"]),
        reason is None,
        reason,
        source,
        tuple((_text(distribution), _text(version)) for distribution, version in libraries.items()),
    )


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
    """What group `attnbench.backends`, and any later one, holds in this process's environment, each once."""
    found = set()
    for group in importlib.metadata.entry_points().groups:
        if group != hookspecs.ENTRY_POINT_GROUP and not LATER_GROUP.fullmatch(group):
            continue
        for entry in importlib.metadata.entry_points(group=group):
            distribution = entry.dist
            name, version = (distribution.name, distribution.version) if distribution else ("unknown", "")
            found.add(EntryPointRef(name, version, entry.name, entry.value, group=group))
    known = {(ref.distribution, ref.name) for ref in found if ref.group == hookspecs.ENTRY_POINT_GROUP}
    # What serves this version too needs no word about what it has for later ones.
    found = {r for r in found if r.group == hookspecs.ENTRY_POINT_GROUP or (r.distribution, r.name) not in known}
    return sorted(found, key=lambda ref: (ref.distribution, ref.name, ref.value, ref.version))


def describe(source: EntryPointRef) -> Description:
    """Load one entry point in this process and describe what it brings.

    A plugin that fails to import, exits, misspells a hook, or brings something that is no backend brings nothing but
    its error. One that ends the process ends it.
    """
    start, calls = time.perf_counter(), _Calls()
    try:
        loaded = _load_plugin(source, calls)
        backends = tuple(_describe(backend, source, calls) for backend in loaded.backends)
    except BaseException as error:  # a plugin may raise anything, and may try to end the process
        return Description(source, load_s=time.perf_counter() - start, error=_trace(error), calls=calls.told)
    load_s = time.perf_counter() - start
    return Description(source, backends, loaded.suites, load_s, sources=loaded.sources, calls=calls.told)


def load(info: BackendInfo) -> Backend:
    """The backend itself, of the plugin that it was found in. Raises what the plugin raises, and PluginError."""
    for backend in _loaded_once(info.source).backends:
        if (backend.name, backend.device) == (info.name, info.device):
            return backend
    raise PluginError(f"{info.source.value} brings no {info.name} on {info.device} any more")


@dataclass(frozen=True)
class _Loaded:
    backends: tuple[Backend, ...]
    suites: tuple[Suite, ...]
    sources: tuple[str, ...]


class _Calls:
    """What was called of a plugin, in words."""

    def __init__(self) -> None:
        self._told: list[str] = []

    @property
    def told(self) -> tuple[str, ...]:
        return tuple(self._told)

    @contextlib.contextmanager
    def one(self, what: str) -> Iterator[list[object]]:
        """Tell of a call that is made meanwhile; what it gave is put into the list."""
        start_s, gave = time.perf_counter(), list[object]()
        try:
            yield gave
        except BaseException as error:
            self._tell(what, f"raised {type(error).__name__}", start_s)
            raise
        self._tell(what, ", ".join(map(_shown, gave)), start_s)

    def _tell(self, what: str, how: str, start_s: float) -> None:
        self._told.append(f"{what}{' → ' if how else ''}{how} ({(time.perf_counter() - start_s) * 1e3:.1f} ms)")


def _shown(value: object) -> str:
    """A value in short, whatever its repr does."""
    try:
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(_shown, value))}]"
        names = [getattr(value, name, None) for name in ("name", "device")]  # of a backend both, of a suite the first
        if names[0] is not None:
            return " on ".join(name for name in names if isinstance(name, str))
        return reprlib.repr(value)
    except Exception:
        return f"a {type(value).__name__}"


@functools.cache
def _loaded_once(source: EntryPointRef) -> _Loaded:
    return _load_plugin(source, _Calls())


def _load_plugin(source: EntryPointRef, calls: _Calls) -> _Loaded:
    """What an entry point's hooks, or a file's name, bring. A failure leaves nothing behind half-registered."""
    if source.group != hookspecs.ENTRY_POINT_GROUP:
        raise PluginError(f"it is for {source.group}, which this attnbench does not know: pip install -U attnbench")
    backends: tuple[Any, ...]
    suites: tuple[Any, ...] = ()
    if source.file:
        with calls.one(f"run {os.path.basename(source.file)}"):
            backends, places = (_from_file(source),), [source.file]
    else:
        backends, suites = _from_hooks(source, calls)
        places = _places(sys.modules[source.value.partition(":")[0].strip()])
    for backend in backends:
        if found := faults(backend):
            raise PluginError(f"{type(backend).__name__} is no backend: {'; '.join(found)}")
        places += getattr(backend, "sources", ())
    for suite in suites:
        if not isinstance(suite, Suite):
            raise PluginError(f"attnbench_suites() returned {suite!r}, not a Suite")
    known = dict.fromkeys(os.path.abspath(place) for place in places if place)
    return _Loaded(cast("tuple[Backend, ...]", backends), suites, tuple(known))


def _places(module: types.ModuleType) -> list[str]:
    """Where a module's code lies: its own folder, or the one of the package that it is in, or its file alone."""
    parent = sys.modules.get(module.__package__ or "")
    package = getattr(module, "__path__", None) or getattr(parent, "__path__", None)
    return list(package or ()) or [module.__file__ or ""]


def _from_file(source: EntryPointRef) -> Any:
    """A backend's object or class by its name in a file, which is run like a script: its own folder can be imported."""
    path, name = source.file, source.name
    if not os.path.isfile(path):
        raise PluginError(f"there is no file {without_home(path)}")
    sys.path.append(os.path.dirname(path))  # last: it must not stand in for an installed module
    module_name = re.sub(r"\W", "_", os.path.basename(path).removesuffix(".py"))
    spec = importlib.util.spec_from_file_location(f"_attnbench_file_{module_name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where pickling and dataclasses look for it
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        names = [key for key, value in vars(module).items() if _may_be_backend(value)]
        there = f"; it has {', '.join(names)}" if names else ""
        raise PluginError(f"{os.path.basename(path)} has no {name}{there}")
    found = getattr(module, name)
    return found() if isinstance(found, type) else found


def _may_be_backend(value: object) -> bool:
    return value is not Backend and callable(getattr(value, "prepare", None))


def _from_hooks(source: EntryPointRef, calls: _Calls) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Import one entry point and call its hooks, in a plugin manager of its own."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    entry = importlib.metadata.EntryPoint(source.name, source.value, hookspecs.ENTRY_POINT_GROUP)
    with calls.one(f"import {source.value}"):
        plugin = entry.load()
    manager.register(plugin, name=source.name)
    manager.check_pending()
    if not manager.get_hookcallers(plugin):
        raise PluginError(f"{source.value} implements no hook: is one marked with @attnbench.hookimpl?")
    return tuple(_ask(manager, "attnbench_backends", calls)), tuple(_ask(manager, "attnbench_suites", calls))


def _ask(manager: pluggy.PluginManager, hook: str, calls: _Calls) -> list[Any]:
    caller = getattr(manager.hook, hook)
    if not caller.get_hookimpls():
        return []
    with calls.one(f"{hook}()") as gave:
        found = list(_collect(caller()))
        gave.append(found)
    return found


def _collect(hook_results: list[Any]) -> Iterator[Any]:
    for items in hook_results:
        if isinstance(items, (str, bytes)) or not isinstance(items, Iterable):
            raise PluginError(f"a hook returned {items!r}, not a list")
        yield from items


def _describe(backend: Backend, source: EntryPointRef, calls: _Calls) -> BackendInfo:
    with calls.one(f"{backend.name} on {backend.device}: unavailable()") as gave:
        reason = backend.unavailable()
        gave.append(reason)
    if reason is not None and not (isinstance(reason, str) and reason):
        raise PluginError(f"{backend.name}.unavailable() returned {reason!r}, neither a reason nor None")
    summary, homepage = getattr(backend, "summary", ""), getattr(backend, "homepage", "")
    named = tuple(getattr(backend, "libraries", ()))
    names = named if named and not source.python else ("torch", *named)
    libraries = tuple((name, installed_version(name)) for name in names)
    return BackendInfo(backend.name, backend.device, summary, homepage, reason is None, reason, source, libraries)


def installed_version(distribution: str) -> str:
    """A distribution's version in this environment; empty where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


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
