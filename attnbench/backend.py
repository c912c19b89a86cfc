"""Owns the contract between attnbench and one attention implementation. Knows no plugin and never calls one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from attnbench.problem import DEVICE_KINDS, DeviceKind, Problem

if TYPE_CHECKING:
    from torch import Tensor

NAME_PATTERN = r"[a-z][a-z0-9_]*"


class Backend(Protocol):
    """One attention implementation on one device kind. Subclass it, or have the same attributes.

    The key is (name, device): the same name may stand on several devices, as `sdpa` does on cpu and cuda.
    """

    name: str
    """Matches `[a-z][a-z0-9_]*`."""
    device: DeviceKind
    """cpu, cuda or npu: where q, k and v lie when `prepare` gets them."""
    summary: str = ""
    """One line for `attnbench list`."""
    homepage: str = ""
    libraries: Mapping[str, str] = MappingProxyType({})
    """The distributions that it calls beside torch, as pip knows them, each with the version that it was written for.

    `attnbench list` tells which is installed, and a run records it.
    """
    sources: Sequence[str] = ()
    """Absolute paths of files and folders that it is made of beside its plugin's own module or package, kernels say.

    A run records a digest of all of them, and `attnbench run --watch` starts anew when one changes.
    """

    def unavailable(self) -> str | None:
        """Why this machine cannot run it, with the command that would help; None where it can.

        Import SDKs here or in `prepare`, never at module level.
        """
        return None

    def unsupported(self, problem: Problem) -> str | None:
        """Why it cannot do this problem; None where it can."""
        return None

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        """Compile, allocate and lay out; only the callable that comes back is timed.

        The callable reads q, k and v at each call (their contents change between calls) and returns a plain
        torch.Tensor of shape `problem.out_shape` in the problem's dtype, which it may reuse. Shapes and meaning are
        in `Problem`. It may raise: attnbench.jit.CompileError is COMPILE_ERROR, running out of memory OOM, anything
        else RUNTIME_ERROR.
        """
        ...

    def parallel_units(self, problem: Problem) -> int | None:
        """How many of the device's cores the problem occupies (1 or more); None where it is not known."""
        return None


def faults(backend: object) -> list[str]:
    """What keeps an object from being a Backend, in words; empty where nothing does."""
    found = []
    name = getattr(backend, "name", None)
    if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name):
        found.append(f"name must match {NAME_PATTERN}, and {name!r} does not")
    device = getattr(backend, "device", None)
    if device not in DEVICE_KINDS:
        found.append(f"device must be one of {', '.join(DEVICE_KINDS)}, not {device!r}")
    for text in ("summary", "homepage"):
        if not isinstance(getattr(backend, text, ""), str):
            found.append(f"{text} must be text")
    libraries = getattr(backend, "libraries", {})
    if not isinstance(libraries, Mapping) or not all(
        isinstance(word, str) for item in libraries.items() for word in item
    ):
        found.append("libraries must map names of distributions to versions, both as text")
    sources = getattr(backend, "sources", ())
    if not isinstance(sources, (list, tuple)) or not all(isinstance(s, str) and os.path.isabs(s) for s in sources):
        found.append("sources must be a list of absolute paths, as text")
    for method in ("unavailable", "unsupported", "prepare"):
        if not callable(getattr(backend, method, None)):
            found.append(f"it has no method {method}()")
    if not callable(getattr(backend, "parallel_units", len)):
        found.append("parallel_units must be a method")
    return found
