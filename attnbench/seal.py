"""Owns what no plugin may change in the process that times it: the clocks, attnbench, the device's timing functions.

Taken before the plugin is imported and compared ever after, harmless changes included. A plugin shares the process, so
one that looks for this very object can undo it; what such a one claims, the runner's own clock and judge still see.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

PACKAGE = "attnbench"


@dataclass(frozen=True)
class _Item:
    """One name and what it was bound to."""

    owner: Any
    name: str
    value: Any
    shown: str

    @property
    def intact(self) -> bool:
        try:
            return inspect.getattr_static(self.owner, self.name) is self.value
        except AttributeError:
            return False


class Seal:
    """The functions of the clocks, of attnbench and of a device as they are now."""

    def __init__(self, timing: Iterable[tuple[object, str]] = ()) -> None:
        """`timing`: (owner, name) of what synchronises and times the device."""
        items = [_Item(time, name, value, f"time.{name}") for name, value in vars(time).items() if callable(value)]
        items += [
            _Item(owner, name, inspect.getattr_static(owner, name), f"{_name(owner)}.{name}") for owner, name in timing
        ]
        items += _package()
        self._items = tuple(items)
        self._codes = tuple(
            (function, function.__code__, function.__defaults__, item.shown)
            for item in items
            if (function := _function(item.value)) is not None
        )

    def broken(self) -> str:
        """What was changed since, in words; empty where nothing was."""
        changed = [item.shown for item in self._items if not item.intact]
        changed += [
            shown
            for function, code, defaults, shown in self._codes
            if function.__code__ is not code or function.__defaults__ is not defaults
        ]
        return f"it changed {', '.join(dict.fromkeys(changed[:3]))}" if changed else ""


def _package() -> Iterator[_Item]:
    """Every name of attnbench's modules, and of the classes that they define."""
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] != PACKAGE or not isinstance(module, ModuleType):
            continue
        for name, value in list(vars(module).items()):
            if name.startswith("__") or isinstance(value, ModuleType):
                continue
            yield _Item(module, name, value, f"{module_name}.{name}")
            if isinstance(value, type) and value.__module__ == module_name:
                for attribute, member in list(vars(value).items()):
                    if _function(member) is not None:
                        yield _Item(value, attribute, member, f"{module_name}.{name}.{attribute}")


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
