"""Owns NVRTC, CUDA's compiler as a library: where it is, how it is called, how its errors read.

torch's CUDA builds bring it, so that kernels compile where there is no CUDA toolkit. Knows nothing of the cache.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from attnbench import settings
from attnbench.jit.toolchain import CompileError, Toolchain, ToolchainMissing, first_error

_NAME = re.compile(r"libnvrtc\.so(\.\d+)*")


@dataclass(frozen=True)
class Nvrtc(Toolchain):
    """Makes a cubin, in this process; `compiler` is the library. `timeout_s` is of no effect: it cannot be stopped."""

    def run(
        self, source: str, library: str, *, cwd: Path, include: Sequence[Path], flags: Sequence[str], timeout_s: float
    ) -> None:
        nvrtc = _load(self.compiler)
        path = cwd / source
        options = [*self.flags, *(f"-I{folder}" for folder in include), *flags]
        program = ctypes.c_void_p()
        words = (ctypes.c_char_p * len(options))(*map(os.fsencode, options))
        _check(
            nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), path.read_bytes(), source.encode(), 0, None, None)
        )
        try:
            if nvrtc.nvrtcCompileProgram(program, len(options), words):
                log = _text(nvrtc, "ProgramLog", program).rstrip(b"\0").decode(errors="replace")
                raise CompileError(first_error(log, cwd) or "NVRTC failed", log)
            (cwd / library).write_bytes(_text(nvrtc, "CUBIN", program))
        finally:
            nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def nvrtc_toolchain(arch: str) -> Nvrtc:
    """NVRTC for `arch`, such as sm_90a: that of torch's packages, else of CUDA_HOME or /usr/local/cuda.

    Raises ToolchainMissing where there is none, or it does not load.
    """
    path = next(_libraries(), None)
    if path is None:
        raise ToolchainMissing("there is no NVRTC", "pip install 'attnbench[cuda]'")
    nvrtc = _load(path)
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(nvrtc, nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    info = path.stat()
    version = f"NVRTC {major.value}.{minor.value}\n{info.st_size} {info.st_mtime_ns}"
    flags = (f"--gpu-architecture={arch}", "--std=c++17")
    return Nvrtc(path, version, flags, suffix=".cubin")


def _libraries() -> Iterator[Path]:
    """Where it may be, best first."""
    folders: list[Path] = []
    with suppress(ValueError):  # a package `nvidia` that is none
        spec = importlib.util.find_spec("nvidia")
        for place in (spec and spec.submodule_search_locations) or ():
            folders += sorted(Path(place).glob("*/lib"), reverse=True)
    folders += [Path(home, "lib64") for home in settings.cuda_homes()]
    for folder in folders:
        yield from sorted(path for path in folder.glob("libnvrtc.so*") if _NAME.fullmatch(path.name))


@lru_cache
def _load(path: Path) -> Any:
    try:
        for builtins in path.parent.glob("libnvrtc-builtins.so*"):  # it asks the loader for them by name alone
            ctypes.CDLL(str(builtins))
        library = ctypes.CDLL(str(path))
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        _ = library.nvrtcGetCUBIN  # of CUDA 11.1 and newer
    except (OSError, AttributeError) as error:
        raise ToolchainMissing(f"NVRTC does not load: {error}", "reinstall it, or install the CUDA toolkit") from error
    return library


def _check(nvrtc: Any, status: int) -> None:
    if status:
        raise CompileError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}")


def _text(nvrtc: Any, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, text))
    return text.raw
