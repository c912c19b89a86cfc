"""Owns what no plugin may change in the process that times it: the clocks, attnbench, the device's timing functions.

Taken before the plugin is imported and compared ever after, harmless changes included. A plugin shares the process, so
one that looks for this very object can undo it; what such a one claims, the runner's own clock and judge still see.
"""

from __future__ import annotations

import builtins
import gc
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

PACKAGE = "attnbench"


_ABSENT = object()

_AROUND_CALLS: tuple[tuple[object, str], ...] = (
    *((signal, name) for name in ("signal", "setitimer")),
    *((gc, name) for name in ("collect", "isenabled", "disable", "enable")),
    *((threading, name) for name in ("current_thread", "main_thread")),
)
"""What runs right before and after calls are timed: one that is wrapped could change a clock and put it back."""


@dataclass(frozen=True)
class _Item:
    """One name in a module's or a class's own table, and what it was bound to."""

    table: Mapping[str, Any]
    name: str
    value: Any
    """_ABSENT where a class inherits it, and so must not get one of its own."""
    shown: str

    @property
    def intact(self) -> bool:
        return self.table.get(self.name, _ABSENT) is self.value


class Seal:
    """The functions of the clocks, of attnbench and of a device as they are now."""

    def __init__(self, timing: Iterable[tuple[object, str]] = ()) -> None:
        """`timing`: (owner, name) of what synchronises and times the device."""
        items = [
            _Item(vars(time), name, value, f"time.{name}") for name, value in vars(time).items() if callable(value)
        ]
        for owner, name in (*_AROUND_CALLS, *timing):
            items += _owned(owner, name)
        items += [_Item(vars(builtins), name, value, f"builtins.{name}") for name, value in vars(builtins).items()]
        items += _package()
        self._items = tuple(items)
        self._names = tuple((name, module, frozenset(vars(module))) for name, module in _modules())
        self._codes = tuple(
            (function, function.__code__, function.__defaults__, function.__kwdefaults__, item.shown)
            for item in items
            if (function := _function(item.value)) is not None
        )

    def broken(self) -> str:
        """What was changed since, in words; empty where nothing was."""
        changed = [item.shown for item in self._items if not item.intact]
        changed += [
            shown
            for function, code, defaults, keywords, shown in self._codes
            if not (
                function.__code__ is code and function.__defaults__ is defaults and function.__kwdefaults__ is keywords
            )
        ]
        changed += [
            f"{module_name}.{name}"
            for module_name, module, names in self._names
            if len(vars(module)) > len(names)
            for name in vars(module).keys() - names
            if not (name.startswith("__") or isinstance(vars(module)[name], ModuleType))  # as imports add them
        ]
        return f"it changed {', '.join(dict.fromkeys(changed[:3]))}" if changed else ""


def _owned(owner: object, name: str) -> Iterator[_Item]:
    """A name of a module, or of a class with all its bases down to the one that defines it."""
    tables = [base.__dict__ for base in owner.__mro__] if isinstance(owner, type) else [vars(owner)]
    shown = f"{_name(owner)}.{name}"
    for table in tables:
        yield _Item(table, name, table.get(name, _ABSENT), shown)
        if name in table:
            return


def _package() -> Iterator[_Item]:
    """Every name of attnbench's modules, and of the classes that they define."""
    for module_name, module in _modules():
        for name, value in list(vars(module).items()):
            if name.startswith("__") or isinstance(value, ModuleType):
                continue
            yield _Item(vars(module), name, value, f"{module_name}.{name}")
            if isinstance(value, type) and value.__module__ == module_name:
                for attribute, member in list(vars(value).items()):
                    if _function(member) is not None:
                        yield _Item(value.__dict__, attribute, member, f"{module_name}.{name}.{attribute}")


def _modules() -> list[tuple[str, ModuleType]]:
    return [
        (name, module)
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == PACKAGE and isinstance(module, ModuleType)
    ]


def _function(value: object) -> FunctionType | None:
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    return value if isinstance(value, FunctionType) else None


def _name(owner: object) -> str:
    if isinstance(owner, type):
        return f"{owner.__module__}.{owner.__qualname__}"
    return getattr(owner, "__name__", type(owner).__name__)
