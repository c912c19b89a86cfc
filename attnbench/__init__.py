"""attnbench, the referee of attention kernels. This, attnbench.jit and attnbench.testing are the public API.

`run` and `load` give pandas DataFrames; `hookimpl`, `Backend`, `Problem` and `Suite` are what a plugin needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnbench.backend import Backend
from attnbench.errors import AttnbenchError
from attnbench.hookspecs import hookimpl
from attnbench.problem import Problem, Suite

if TYPE_CHECKING:
    from attnbench.api import load, run

__all__ = ["AttnbenchError", "Backend", "Problem", "Suite", "hookimpl", "load", "run"]


def __getattr__(name: str) -> Any:
    # run and load need torch and pandas, whose import takes seconds that `attnbench --help` must not wait for.
    if name in ("run", "load"):
        from attnbench import api

        return getattr(api, name)
    raise AttributeError(f"module 'attnbench' has no attribute {name!r}")
