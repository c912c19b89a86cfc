"""Owns which plugins there are: entry points → backends and suites, each plugin's failure isolated from the rest.

Callers get plain facts (Catalogue) and, where a case runs, `load` the one backend they need; so loading can move to
another process without them noticing.
"""

from __future__ import annotations

import functools
import importlib.metadata
import time
import traceback
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import pluggy

from attnbench import hookspecs, settings
from attnbench.backend import Backend, faults
from attnbench.errors import AttnbenchError, in_a_line
from attnbench.problem import BUILTIN_SUITES, DeviceKind, Suite

OWN_DISTRIBUTION = "attnbench"
MACHINERY = frozenset({"attnbench", "importlib", "pluggy"})
"""Packages whose frames come before a plugin's own in a traceback, and say nothing about it."""


@dataclass(frozen=True)
class EntryPointRef:
    """Where a plugin comes from: enough to load it again, in this process or another."""

    distribution: str
    version: str
    name: str
    value: str


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


class PluginError(Exception):
    """A plugin broke the contract; the message says how."""


def discover(without: Collection[str] = ()) -> Catalogue:
    """Load every entry point of group `attnbench.backends`, but for those that ATTNBENCH_PLUGINS or `without` excludes.

    A plugin that fails to import, exits, misspells a hook, brings something that is no backend, or clashes with an
    earlier one brings nothing, and is in the catalogue with its error. Raises AttnbenchError where `without` names
    an entry point that is not there.
    """
    plugins: list[PluginInfo] = []
    backends: dict[tuple[str, str], BackendInfo] = {}
    suites: dict[str, Suite] = {suite.name: suite for suite in BUILTIN_SUITES}
    for source in _entry_points(without):
        start = time.perf_counter()
        try:
            found = [_describe(backend, source) for backend in _load_plugin(source).backends]
            _refuse_clashes([(info.name, info.device) for info in found], backends, "backend")
            brought = _load_plugin(source).suites
            _refuse_clashes([suite.name for suite in brought], suites, "suite")
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin may raise anything, and may try to end the process
            plugins.append(PluginInfo(source, (), (), time.perf_counter() - start, _trace(error)))
            continue
        backends.update({(info.name, info.device): info for info in found})
        suites.update({suite.name: suite for suite in brought})
        names = tuple(dict.fromkeys(info.name for info in found))
        suite_names = tuple(suite.name for suite in brought)
        plugins.append(PluginInfo(source, names, suite_names, time.perf_counter() - start, None))
    return Catalogue(tuple(plugins), tuple(backends.values()), tuple(suites.values()))


def load(info: BackendInfo) -> Backend:
    """The backend itself, of the plugin that `discover` found it in."""
    backends = _load_plugin(info.source).backends
    return next(b for b in backends if (b.name, b.device) == (info.name, info.device))


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


def _refuse_clashes(keys: list[Any], taken: Collection[Any], what: str) -> None:
    for index, key in enumerate(keys):
        if key in taken or key in keys[:index]:
            name = " on ".join(key) if isinstance(key, tuple) else key
            raise PluginError(f"{what} {name} is there already")


def _entry_points(without: Collection[str]) -> list[EntryPointRef]:
    wanted = settings.plugins()
    entries = importlib.metadata.entry_points(group=hookspecs.ENTRY_POINT_GROUP)
    if missing := sorted(set(without) - entries.names):
        raise AttnbenchError(f"no plugin is called {missing[0]!r}", f"there are {', '.join(sorted(entries.names))}")
    found = set()
    for entry in entries:
        if entry.name in without or (wanted is not None and entry.name not in wanted):
            continue
        distribution = entry.dist
        name, version = (distribution.name, distribution.version) if distribution else ("unknown", "")
        found.add(EntryPointRef(name, version, entry.name, entry.value))
    return sorted(found, key=lambda ref: (ref.distribution != OWN_DISTRIBUTION, ref.distribution, ref.name, ref.value))


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
