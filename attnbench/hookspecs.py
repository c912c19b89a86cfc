"""The hooks a plugin may implement, and nothing else. A plugin marks its functions with `attnbench.hookimpl`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from attnbench.backend import Backend
    from attnbench.problem import Suite

PROJECT = "attnbench"
ENTRY_POINT_GROUP = "attnbench.backends"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def attnbench_backends() -> Iterable[Backend]:  # type: ignore[empty-body]
    """The backends this plugin brings, one object for each (name, device)."""


@hookspec
def attnbench_suites() -> Iterable[Suite]:  # type: ignore[empty-body]
    """The suites this plugin brings. A name that exists already is a clash, and the plugin is refused."""
