"""Owns the way from a source in C++, CUDA or PTO to a loaded library: what it depends on, when it is built anew.

Knows neither how a compiler is called (toolchain.py) nor how libraries are kept (cache.py).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from attnbench.errors import AttnbenchError
from attnbench.jit import cache
from attnbench.jit.cache import Cache, Entry
from attnbench.jit.nvrtc import nvrtc_toolchain
from attnbench.jit.toolchain import (
    PTO_ARCH,
    CompileError,
    Toolchain,
    ToolchainMissing,
    cpp_toolchain,
    cpu_features,
    cuda_toolchain,
    missing,
    pto_toolchain,
    version_output,
)

__all__ = [
    "PTO_ARCH",
    "Cache",
    "CompileError",
    "Entry",
    "Library",
    "Toolchain",
    "ToolchainMissing",
    "cache",
    "compile",
    "cpp_toolchain",
    "cpu_features",
    "cuda_toolchain",
    "missing",
    "nvrtc_toolchain",
    "pto_toolchain",
    "version_output",
]

_SCHEMA = "1"
"""Raised when an entry's layout or its key's meaning changes, so that older entries are not found."""
_INCLUDE = re.compile(rb'#[ \t]*include[ \t]*["<]([^">\n\0]+)[">]')


@dataclass(frozen=True)
class Library:
    """A compiled shared library in the cache."""

    path: Path
    cached: bool
    """Whether it was there already, or another process built it while this one waited."""
    compile_s: float
    """Seconds the compiler took; 0 where `cached`."""

    def load(self) -> ctypes.CDLL:
        """Load it into this process. Raises CompileError with the loader's message where that fails."""
        try:
            return ctypes.CDLL(str(self.path))
        except OSError as error:
            raise CompileError(str(error)) from error


def compile(
    source: Path | str, *, toolchain: Toolchain | None = None, flags: Sequence[str] = (), timeout_s: float = 300.0
) -> Library:
    """The shared library of a source, from the cache if nothing that it depends on has changed.

    `source` is a file (a Path) or the source text (a str). A file's own folder is an include directory. It depends on
    the source, the headers found there or in a `-I<dir>` of `flags` (in one piece, absolute), the flags, the compiler
    and its version, and the CPU's instruction sets. `toolchain` is `cpp_toolchain()` unless given; `flags` come after
    the source, so `-l<library>` works. `timeout_s` is in seconds and for the compiler alone.

    Raises CompileError where the compiler fails, ToolchainMissing where there is none, and AttnbenchError where the
    source cannot be read or the cache cannot be written.
    """
    tools = cpp_toolchain() if toolchain is None else toolchain
    if isinstance(source, Path):
        name, include = source.name, [source.absolute().parent]
        try:
            text = source.read_bytes()
        except OSError as error:
            raise AttnbenchError(f"cannot read {source}: {error.strerror}") from error
    else:
        name, include, text = "source.cpp", [], source.encode()
    key = _key(name, text, include, tools, flags)
    library = f"library{tools.suffix}"
    compile_s = 0.0

    def build(staging: Path) -> None:
        nonlocal compile_s
        (staging / "source").mkdir()  # a folder of its own, so that no name clashes and none is taken for an option
        (staging / "source" / name).write_bytes(text)
        start_s = time.perf_counter()
        tools.run(f"source/{name}", library, cwd=staging, include=include, flags=flags, timeout_s=timeout_s)
        compile_s = time.perf_counter() - start_s
        if not (staging / library).is_file():
            raise CompileError(f"{tools.compiler.name} made no library")
        if _key(name, text, include, tools, flags) != key:
            raise AttnbenchError(f"a header of {name} changed while it was compiled", "run it again")

    record = {
        "source": name,
        "compiler": str(tools.compiler),
        "version": tools.version,
        "flags": [*tools.flags, *flags],
    }
    path, cached = cache.default().get(key, library, record, build)
    return Library(path, cached, compile_s)


def _key(name: str, text: bytes, include: Sequence[Path], tools: Toolchain, flags: Sequence[str]) -> str:
    """The sha256 over everything that the library's bytes depend on."""
    folders = [*include, *(Path(flag[2:]) for flag in (*tools.flags, *flags) if flag.startswith("-I") and flag[2:])]
    folders.append(Path("/"))  # for absolute names, which a source text without folders may include too
    groups: list[list[bytes]] = [
        [_SCHEMA.encode(), sys.platform.encode(), cpu_features().encode()],
        [os.fsencode(tools.compiler), tools.version_output.encode(), tools.suffix.encode()],
        [os.fsencode(flag) for flag in tools.flags],
        [os.fsencode(flag) for flag in flags],
        [os.fsencode(name), text],  # the name, since its suffix chooses the language
        [part for header in _headers(text, include, folders, set()) for part in header],
    ]
    digest = hashlib.sha256()
    for group in groups:  # with lengths: ("ab", "c") is not ("a", "bc")
        digest.update(b"%d:" % len(group))
        for part in group:
            digest.update(b"%d:" % len(part) + part)
    return digest.hexdigest()


def _headers(
    text: bytes, beside: Sequence[Path], folders: Sequence[Path], seen: set[tuple[str, str]]
) -> Iterator[tuple[bytes, bytes]]:
    """Name and bytes of the headers that `text` may include, recursively; system headers go with the compiler.

    A name is looked up beside the including file and in all `folders`, and every match counts, commented out or not:
    one too many costs a compilation, one too few a wrong result.
    """
    for name in _INCLUDE.findall(text):
        for folder in (*beside, *folders):
            path = os.path.join(folder, os.fsdecode(name))
            place = os.path.realpath(os.path.dirname(path))  # a header may reach itself as ../a/../a/…
            if (place, os.path.basename(path)) in seen:
                continue
            seen.add((place, os.path.basename(path)))
            with suppress(OSError):  # not there
                header = Path(path).read_bytes()
                yield name, header
                yield from _headers(header, [Path(path).parent], folders, seen)
