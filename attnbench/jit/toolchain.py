"""Owns the compilers of C++, CUDA and PTO: which one, with which flags, how it is run, and how its errors read.

Knows nothing of the cache, and nothing of what is compiled.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from attnbench import settings
from attnbench.errors import AttnbenchError
from attnbench.text import without_home

_VERSION_TIMEOUT_S = 30.0


class CompileError(AttnbenchError):
    """A source that does not compile, or a library that does not load; a case that ends in it is COMPILE_ERROR.

    `message` is the compiler's first error line, file names without their directories, and the line of the source that
    it is about; `log` is all it wrote on stderr, and empty where it wrote nothing.
    """

    def __init__(self, message: str, log: str = "", hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.log = log


class ToolchainMissing(AttnbenchError):
    """There is no compiler, or the one that was named does not run."""


@dataclass(frozen=True)
class Toolchain:
    """A compiler with its base flags. Anything that takes g++'s arguments and makes a shared library will do."""

    compiler: Path
    """Absolute, since it runs in another folder."""
    version_output: str
    """All that `--version` prints (see `version_output`); a change in it recompiles."""
    flags: tuple[str, ...]
    """Come before the source; those given to `attnbench.jit.compile` come after it."""
    suffix: str = ".dylib" if sys.platform == "darwin" else ".so"
    """What the library's name ends in."""

    @property
    def version(self) -> str:
        """The first line of `version_output`, for tables."""
        return self.version_output.partition("\n")[0].strip()

    def run(
        self, source: str, library: str, *, cwd: Path, include: Sequence[Path], flags: Sequence[str], timeout_s: float
    ) -> None:
        """Compile `source` into `library`, both relative to `cwd`, which takes the temporary files too.

        Raises CompileError where the compiler fails, cannot be run or takes more than `timeout_s` seconds.
        """
        command = [str(self.compiler), *self.flags, *(f"-I{path}" for path in include), source, "-o", library, *flags]
        try:
            done = subprocess.run(
                command,
                cwd=cwd,
                env=_environment() | {"TMPDIR": str(cwd)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            log = (error.stderr or b"").decode(errors="replace")
            raise CompileError(f"{self.compiler.name} took more than {timeout_s:g} s", log) from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in a flag
            raise CompileError(f"{self.compiler.name} cannot be run: {error}") from error
        log = done.stderr.decode(errors="replace")
        if done.returncode:
            raise CompileError(first_error(log, cwd) or f"{self.compiler.name}: {_ending(done.returncode)}", log)


def cpp_toolchain() -> Toolchain:
    """The C++ compiler of ATTNBENCH_CXX or CXX, else the first of c++, g++ and clang++ on PATH, tuned to this CPU.

    Raises ToolchainMissing where there is none or it does not answer `--version`.
    """
    named = settings.cxx()
    found = next(filter(None, map(shutil.which, [named] if named else ["c++", "g++", "clang++"])), None)
    if found is None and named:
        raise ToolchainMissing(
            f"the C++ compiler {named!r}, set by ATTNBENCH_CXX or CXX, was not found",
            "set it to one executable, without options, or unset it",
        )
    if found is None:
        raise ToolchainMissing("no C++ compiler on PATH", "install g++ (apt-get install g++) or set CXX")
    # Links stay unresolved: clang++ and ccache tell from the name they are called by what they are to do.
    compiler = Path(found).absolute()
    flags = ("-O3", "-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra", *_native_flags())
    return Toolchain(compiler, version_output(compiler), flags)


def cuda_toolchain(arch: str | None = None, *, cubin: bool = False) -> Toolchain:
    """nvcc for `arch`, such as sm_80 or sm_90a; left out, the architecture of torch's current CUDA device.

    With `cubin` it makes the device's code alone, which the driver loads, in place of a library for the host.
    The compiler is that of ATTNBENCH_NVCC, else of PATH, CUDA_HOME or /usr/local/cuda. Raises ToolchainMissing where
    there is none, where the host compiler that it needs is not there, or, `arch` left out, where torch sees no GPU.
    """
    if arch is None:
        arch = _cuda_arch()
    places = settings.nvcc()
    found = next(filter(None, map(shutil.which, places)), None)
    if found is None:
        what = (
            f"nvcc, set by ATTNBENCH_NVCC to {places[0]!r}, was not found" if len(places) == 1 else "there is no nvcc"
        )
        raise ToolchainMissing(what, "install the CUDA toolkit, or set ATTNBENCH_NVCC or CUDA_HOME")
    host = cpp_toolchain()
    compiler = Path(found).absolute()
    language = ("-O3", "-std=c++17", "-cubin" if cubin else "-shared", "-x", "cu", f"-arch={arch}")
    flags = (*language, "-ccbin", str(host.compiler), "-Xcompiler", "-fPIC,-Wall,-Wextra")
    version = version_output(compiler) + host.version_output
    return Toolchain(compiler, version, flags, suffix=".cubin" if cubin else Toolchain.suffix)


def _cuda_arch() -> str:
    import torch

    if not torch.cuda.is_available():
        what = "torch sees no CUDA device" if torch.version.cuda else "this torch is built without CUDA"
        raise ToolchainMissing(what, "it takes an NVIDIA GPU and a CUDA build of torch")
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")  # wgmma and TMA are in the `a` variants alone


PTO_ARCH = "dav-2201"
"""Of the Ascend 910B and 910C, as CANN's compiler calls it; an Ascend 950 is a dav-3510."""
_ARCH_950 = "dav-3510"
_CANN_INCLUDES = ("include", "pkg_inc", "pkg_inc/runtime", "pkg_inc/profiling")
_CANN_VERSIONS = ("version.cfg", "runtime/version.info", "compiler/version.info", "*/ascend_toolkit_install.info")
_PTO_VERSIONS = ("version.cmake", "version.info")


def pto_toolchain(arch: str | None = None) -> Toolchain:
    """CANN's bisheng, for kernels written with the PTO instructions; `arch` is NPU_ARCH unless given, else dav-2201.

    It is looked for on PATH, then in ASCEND_HOME_PATH or ASCEND_TOOLKIT_HOME. PTO's headers are those of PTO_LIB_PATH,
    else of CANN; what both say of their versions counts as the compiler's. Not run on Ascend hardware yet. Raises
    ToolchainMissing, which names all that is not there.
    """
    home, library = settings.ascend_home(), settings.pto_lib_path()
    places = ["bisheng", *([os.path.join(home, "bin", "bisheng")] if home else [])]
    found = next(filter(None, map(shutil.which, places)), None)
    folders = [os.path.join(os.path.abspath(library), "include")] if library else []
    folders += [os.path.join(os.path.abspath(home), *name.split("/")) for name in _CANN_INCLUDES] if home else []
    absent, steps = [], []
    if not any(os.path.isdir(os.path.join(folder, "pto")) for folder in folders):
        place = f"there is no include/pto in PTO_LIB_PATH, {without_home(library or '')}"
        absent.append(place if library else "PTO's headers are not there")
        steps.append("set PTO_LIB_PATH to a checkout of the PTO library")
    if found is None:
        where = f"neither on PATH nor in {without_home(home)}/bin" if home else "not on PATH"
        absent.append(f"CANN's compiler bisheng is {where}")
    if home is None:
        absent.append("neither ASCEND_HOME_PATH nor ASCEND_TOOLKIT_HOME is set")
    elif not os.path.isdir(home):
        absent.append(f"the toolkit is not in {without_home(home)}, which the environment names")
    if found is None or home is None or not os.path.isdir(home):
        steps.append("install CANN and source its set_env.sh")
    if found is None or home is None or absent:
        raise ToolchainMissing("; ".join(absent), "; ".join(steps))
    arch = arch or settings.npu_arch() or PTO_ARCH
    base = ("-O2", "-std=c++17", "-fPIC", "-shared", "-xcce", f"--npu-arch={arch}")
    memory = "-DREGISTER_BASE" if arch == _ARCH_950 else "-DMEMORY_BASE"
    flags = (*base, memory, "-Wno-ignored-attributes", *(f"-I{folder}" for folder in folders))
    compiler = Path(found).absolute()
    versions = [_versions(home, _CANN_VERSIONS), *([_versions(library, _PTO_VERSIONS)] if library else [])]
    return Toolchain(compiler, version_output(compiler) + "".join(versions), flags)


def _versions(folder: str, patterns: Sequence[str]) -> str:
    """The files in which a toolkit or a library tells its version, their names before their contents."""
    found = ""
    for path in sorted({path for pattern in patterns for path in Path(folder).glob(pattern)}):
        with suppress(OSError):
            found += f"\n{path.relative_to(folder)}:\n{path.read_text(errors='replace')}"
    return found


def missing(toolchain: Callable[[], Toolchain]) -> str | None:
    """Why a toolchain cannot be had, with what would help: what `Backend.unavailable` returns. None where it can."""
    try:
        toolchain()
    except ToolchainMissing as error:
        return f"{error.message}: {error.hint}" if error.hint else error.message
    return None


def version_output(compiler: Path) -> str:
    """What `compiler --version` prints, asked once per process and compiler file.

    Raises ToolchainMissing where it cannot be run or fails.
    """
    try:
        info = compiler.stat()
        return _version_output(compiler, info.st_mtime_ns, info.st_size)
    except OSError as error:
        reason = error.strerror
    except subprocess.TimeoutExpired:
        reason = f"took more than {_VERSION_TIMEOUT_S:g} s"
    except subprocess.CalledProcessError as error:
        reason = _ending(error.returncode)
    raise ToolchainMissing(f"{compiler} --version: {reason}", "repair it, or set CXX to another")


@lru_cache
def _version_output(compiler: Path, mtime_ns: int, size_bytes: int) -> str:
    done = subprocess.run(
        [str(compiler), "--version"],
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=_VERSION_TIMEOUT_S,
        check=True,
    )
    return done.stdout.decode(errors="replace")


@lru_cache
def cpu_features() -> str:
    """The instruction sets that -march=native may use here; a library is only good where they are the same."""
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() in ("flags", "Features"):
                    return " ".join(sorted(value.split()))
    except OSError:
        pass  # no Linux
    return f"{platform.machine()} {platform.processor()}"


def _native_flags() -> tuple[str, ...]:
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return ("-march=native",)
    # On ARM, -march=native leaves the tuning out, and older clangs refuse it.
    return ("-mcpu=native",) if machine in ("aarch64", "arm64") else ()


def _environment() -> dict[str, str]:
    """What a compiler needs to run, and nothing (CPATH, LIBRARY_PATH, …) that would change its output unseen."""
    names = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
    return {name: os.environ[name] for name in names if name in os.environ} | {"LC_ALL": "C"}


def first_error(log: str, cwd: Path) -> str:
    """The first line of `log` that tells an error, and the line of the source that it names."""
    lines = [line for line in log.splitlines() if line.strip()]
    # collect2 only repeats that the linker failed; the linker has said why before.
    errors = [line for line in lines if re.search(r"\berror: ", line) and not line.startswith("collect2")]
    line = next(iter(errors or lines), "")
    place, colon, rest = line.partition(":")
    shown = (place.rpartition("/")[2] if colon else place) + colon + rest
    about = re.match(r"(?P<file>[^:()]+)(?::(?P<line>\d+):|\((?P<nvcc>\d+)\):)", line)
    if about is None:
        return shown
    with suppress(OSError, IndexError):
        text = (cwd / about["file"]).read_text(errors="replace").splitlines()
        return f"{shown} | {text[int(about['line'] or about['nvcc']) - 1].strip()}"
    return shown


def _ending(returncode: int) -> str:
    return f"killed by signal {-returncode}" if returncode < 0 else f"exit status {returncode}"
