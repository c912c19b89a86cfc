"""Owns which plugins there are, here and in the environments of other interpreters. Imports none: processes do.

A describing process loads one entry point after another, and its answers are untrusted: each must have the form asked
for. One that dies, falls silent or talks nonsense costs the plugin that it was loading, and a fresh one goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from attnbench import settings
from attnbench.child import LAST_WORDS_S, NO_ATTNBENCH, OTHER_ATTNBENCH, Child, ending
from attnbench.environment import one_line
from attnbench.errors import AttnbenchError
from attnbench.problem import BUILTIN_SUITES, Suite
from attnbench.registry import BackendInfo, Catalogue, Description, EntryPointRef, PluginInfo
from attnbench.text import without_home
from attnbench.wire import VERSION, Closed, NoAnswer, WireError

OWN_DISTRIBUTION = "attnbench"
START_LIMIT_S = 60.0
"""For the interpreter and attnbench to load, and for the list of entry points."""
ENTRY_LIMIT_S = 60.0
"""For one entry point: its import, its hooks, and `unavailable()` of all its backends."""


def discover(
    without: Collection[str] = (),
    python: Mapping[str, str] | None = None,
    files: Collection[EntryPointRef] = (),
    *,
    limit_s: float = ENTRY_LIMIT_S,
) -> Catalogue:
    """Describe every entry point of group `attnbench.backends`, but for those that ATTNBENCH_PLUGINS or `without`
    excludes.

    `python` maps names of entry points or backends to other interpreters, over those in the user's config.toml: what
    brings that name is then looked for in their environments, and replaces what has its names in this one, which is
    there as not available where that fails. `files` are backends in files that are installed nowhere
    (EntryPointRef.of_file). A plugin that fails to import, ends or blocks its process for `limit_s` seconds,
    misspells a hook, brings something that is no backend, or clashes with an earlier one brings nothing, and is in
    the catalogue with its error.

    Raises AttnbenchError where `without` names an entry point that is not there, `python` an interpreter, or `files` a
    file, and where a setting that every plugin of a device would stumble over is none.
    """
    settings.cuda_timing()
    settings.npu_timing()
    for source in files:
        if not os.path.isfile(source.file):
            raise AttnbenchError(f"there is no file {without_home(source.file)}", "--backends takes file.py:name")
    wanted = settings.plugins()
    elsewhere = {**settings.interpreters(), **(python or {})}
    chosen = {
        name: _executable(name, executable)
        for name, executable in elsewhere.items()
        if name not in without and (wanted is None or name in wanted)
    }
    with _Environment(sys.executable, limit_s) as here:
        try:
            entries = here.entry_points()
        except _Failed as failed:
            raise AttnbenchError(f"the process that loads plugins does not start: {failed}") from failed
        names = {source.name for source in entries}
        if unknown := sorted(set(without) - names - set(elsewhere)):
            raise AttnbenchError(f"no plugin is called {unknown[0]!r}", f"there are {', '.join(sorted(names))}")
        found = [
            here.describe(source)
            for source in entries
            if source.name not in without and source.name not in chosen and (wanted is None or source.name in wanted)
        ]
        from_files = [here.describe(source) for source in dict.fromkeys(files)]
        brought: list[Description] = []
        for executable in dict.fromkeys(chosen.values()):
            brought += _elsewhere([name for name in chosen if chosen[name] == executable], executable, without, limit_s)
        missing = {description.source.name for description in brought if description.error is not None}
        namesakes = [*found, *(here.describe(source) for source in entries if source.name in missing)]
    left = _less(found, {*chosen, *(info.name for description in brought for info in description.backends)})
    return _merge([*left, *_with_stand_ins(brought, namesakes, left), *from_files])


def _executable(name: str, executable: str) -> str:
    """The absolute path of an interpreter. Links are not followed: a virtual environment is known by its path."""
    expanded = os.path.expanduser(executable)
    path = os.path.abspath(expanded) if "/" in expanded else shutil.which(expanded)
    if path is None or not os.path.isfile(path) or not os.access(path, os.X_OK):
        what = "is not there" if path is None or not os.path.exists(path) else "cannot be executed"
        raise AttnbenchError(
            f"the interpreter of {name}, {without_home(executable)}, {what}",
            "give --python or config.toml the path of a Python that has attnbench installed",
        )
    return path


def _elsewhere(names: Collection[str], python: str, without: Collection[str], limit_s: float) -> Iterable[Description]:
    """What another interpreter's environment brings of these names: the entry points called so, else their backends."""
    shown = without_home(python)
    failures: list[Description] = []
    with _Environment(python, limit_s) as there:
        try:
            entries = [source for source in there.entry_points() if source.name not in without]
        except _Failed as failed:
            return [_failure(name, python, _why_not(shown, failed)) for name in names]
        describe = functools.cache(there.describe)
        brought = {source: describe(source) for source in entries if source.name in names}
        for name in sorted(set(names) - {source.name for source in brought}):
            bringing = [description for description in map(describe, entries) if name in description.plugin.backends]
            for description in bringing:
                source = description.source
                if source.name not in names:  # of an entry point that nobody named, what was named alone
                    more = brought[source].backends if source in brought else ()
                    named = tuple(info for info in description.backends if info.name == name)
                    brought[source] = dataclasses.replace(description, backends=(*more, *named), suites=())
            if not bringing:
                broken = [source.name for source in entries if describe(source).error is not None]
                why = f" ({', '.join(broken)} failed to load there)" if broken else ""
                failures.append(_failure(name, python, f"{shown} has no plugin and no backend called {name}{why}"))
    return [*brought.values(), *failures]


def _with_stand_ins(
    brought: Sequence[Description], namesakes: Sequence[Description], left: Sequence[Description]
) -> Iterator[Description]:
    """What other interpreters brought; for what they did not, what has its name here stands as not available."""
    taken = {(info.name, info.device) for description in (*left, *brought) for info in description.backends}
    for description in brought:
        if description.error is not None:
            why, source = description.plugin.error_line, description.source
            facts: dict[str, Any] = {"available": False, "reason": why, "source": source, "libraries": ()}
            found = {
                (info.name, info.device): dataclasses.replace(info, **facts)
                for namesake in namesakes
                for info in namesake.backends
                if source.name in (namesake.source.name, info.name) and (info.name, info.device) not in taken
            }
            taken |= found.keys()
            description = dataclasses.replace(description, backends=tuple(found.values()))
        yield description


def _failure(name: str, python: str, error: str) -> Description:
    return Description(EntryPointRef("unknown", "", name, "", python), error=error)


def _why_not(shown: str, failed: _Failed) -> str:
    if failed.code == NO_ATTNBENCH:
        return f"{shown} has no attnbench: install it there"
    if failed.code == OTHER_ATTNBENCH:
        return f"{shown} has another version of attnbench: install this one there"
    return f"{shown} does not start attnbench: {failed}"


def _less(found: Iterable[Description], replaced: Collection[str]) -> list[Description]:
    """What is left of these entry points without the backends that another interpreter brings."""
    left = []
    for description in found:
        backends = tuple(info for info in description.backends if info.name not in replaced)
        if backends or description.suites or not description.backends:
            left.append(dataclasses.replace(description, backends=backends))
    return left


def _merge(found: list[Description]) -> Catalogue:
    """The catalogue of all that was found: attnbench's own first, files last, without what clashes."""
    plugins: list[PluginInfo] = []
    backends: dict[tuple[str, str], BackendInfo] = {}
    suites: dict[str, Suite] = {suite.name: suite for suite in BUILTIN_SUITES}

    def rank(description: Description) -> tuple[object, ...]:
        source = description.source
        return (
            bool(source.file),
            source.distribution != OWN_DISTRIBUTION,
            source.distribution,
            source.name,
            source.value,
            source.python,
        )

    for description in sorted(found, key=rank):
        clash = _clash([(info.name, info.device) for info in description.backends], backends, "backend") or _clash(
            [suite.name for suite in description.suites], suites, "suite"
        )
        if clash is not None:
            description = Description(description.source, load_s=description.load_s, error=clash)
        backends.update({(info.name, info.device): info for info in description.backends})
        suites.update({suite.name: suite for suite in description.suites})
        plugins.append(description.plugin)
    return Catalogue(tuple(plugins), tuple(backends.values()), tuple(suites.values()))


def _clash(keys: list[Any], taken: Collection[Any], what: str) -> str | None:
    for index, key in enumerate(keys):
        if key in taken or key in keys[:index]:
            name = " on ".join(key) if isinstance(key, tuple) else key
            return f"{what} {name} is there already"
    return None


class _Failed(Exception):
    """A describing process did not answer as it should, or at all; the message says how."""

    def __init__(self, how: str, code: int | None = None, *, silent: bool = False) -> None:
        super().__init__(how)
        self.code = code
        """The exit code, or less the signal; None where it did not end by itself."""
        self.silent = silent


class _Environment:
    """The plugins that one interpreter finds, loaded in a process of it, and in a fresh one after each failure."""

    def __init__(self, python: str, limit_s: float) -> None:
        self._python = python
        self._limit_s = limit_s
        self._process: _Process | None = None

    def __enter__(self) -> _Environment:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def entry_points(self) -> list[EntryPointRef]:
        """All that it finds. Raises _Failed where it has no attnbench like this one, or does not work."""
        answer = self._started().ask({"do": "list"}, START_LIMIT_S)
        try:
            sources = [EntryPointRef.from_json(item) for item in answer["entry_points"]]
        except (KeyError, TypeError, ValueError) as error:
            raise _Failed("its list of plugins cannot be read") from error
        python = "" if self._python == sys.executable else self._python
        return [dataclasses.replace(source, python=python) for source in sources]

    def describe(self, source: EntryPointRef) -> Description:
        """What one entry point brings, or its failure."""
        start_s = time.monotonic()
        while True:
            process = self._started()
            alone = not process.loaded
            try:
                return process.describe(source, self._limit_s)
            except _Failed as failed:
                self._end()
                # What another plugin left in the process may have ended it. Silence is too long to wait for twice.
                if alone or failed.silent:
                    error = str(failed) if failed.code is None else f"loading it ended the process: {failed}"
                    return Description(source, load_s=time.monotonic() - start_s, error=error)

    def _started(self) -> _Process:
        if self._process is None:
            process = self._process = _Process(self._python)
            process.meet()
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.close()
        self._process = None


class _Process:
    """One describing process. Its methods raise _Failed, after which it can only be closed."""

    def __init__(self, python: str) -> None:
        """Start it, without waiting for it. Raises AttnbenchError where the interpreter cannot be executed."""
        self.loaded = 0
        """How many entry points it was asked to load."""
        try:
            self._child = Child(python, "describe")
        except OSError as error:
            raise AttnbenchError(f"cannot execute {without_home(python)}: {error.strerror}") from error

    def meet(self) -> None:
        """Wait until it has started."""
        hello = self._take(START_LIMIT_S)
        if set(hello) != {"version"}:
            raise _Failed("its first message cannot be read")
        if hello["version"] != VERSION:
            raise _Failed(f"it speaks version {hello['version']!r:.20}, not {VERSION}", OTHER_ATTNBENCH)

    def ask(self, question: dict[str, Any], limit_s: float) -> dict[str, Any]:
        with contextlib.suppress(WireError):  # it is gone: how is told where its answer is due
            self._child.channel.send(question)
        return self._take(limit_s)

    def describe(self, source: EntryPointRef, limit_s: float) -> Description:
        self.loaded += 1
        question = {"do": "describe", "source": source.to_json(), "number": self.loaded}
        answer = self.ask(question, limit_s)
        try:
            if set(answer) != {"number", "description"} or answer["number"] != self.loaded:
                raise ValueError("it is not what was asked for")
            return Description.from_json(answer["description"], source)
        except (TypeError, ValueError) as error:
            raise _Failed(f"what its process answers cannot be read: {one_line(str(error))}") from error

    def _take(self, limit_s: float) -> dict[str, Any]:
        try:
            answer, descriptor = self._child.channel.receive(limit_s)
        except NoAnswer:
            raise _Failed(f"it took longer than {limit_s:g} s", silent=True) from None
        except Closed as error:
            code = self._child.exit_code(LAST_WORDS_S)
            how = "its process closed the connection" if code is None else f"{ending(code)}{self._child.last_words()}"
            raise _Failed(how, code) from error
        except WireError as error:
            raise _Failed(f"what its process answers cannot be read: {one_line(str(error))}") from error
        if descriptor is not None:
            os.close(descriptor)
        return answer

    def close(self) -> None:
        """End it and all that it started."""
        self._child.close()
