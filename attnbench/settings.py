"""Owns every setting from outside the command line: the ATTNBENCH_* variables and the user's own config.toml.

Each is read when asked for, not at import, so a test or a parent process can set it at any time. Nothing is ever read
from the current folder.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from attnbench.errors import AttnbenchError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


def leave_torch_alone() -> None:
    """Let torch import no device's package by itself, unless TORCH_DEVICE_BACKEND_AUTOLOAD says otherwise.

    `import torch` fails where such a package does; a device of attnbench's imports its own, and tells why it cannot.
    """
    os.environ.setdefault(AUTOLOAD, "0")


def plugins() -> frozenset[str] | None:
    """ATTNBENCH_PLUGINS: comma-separated entry-point names to load; empty loads none, unset loads all (None).

    It restricts what comes from other interpreters too, by the names that `--python` and config.toml give.
    """
    value = os.environ.get("ATTNBENCH_PLUGINS")
    if value is None:
        return None
    return frozenset(name.strip() for name in value.split(",") if name.strip())


def cache_dir() -> Path | None:
    """ATTNBENCH_CACHE_DIR: where compiled kernels are kept; unset leaves the choice to `attnbench.jit.cache`."""
    value = os.environ.get("ATTNBENCH_CACHE_DIR")
    return Path(value) if value else None


def cxx() -> str | None:
    """ATTNBENCH_CXX, else CXX: the C++ compiler to use; unset looks for c++, g++ and clang++ on PATH."""
    return os.environ.get("ATTNBENCH_CXX") or os.environ.get("CXX") or None


def cpu_isa() -> str | None:
    """ATTNBENCH_CPU_ISA: the instruction sets that jit_flash on a CPU is to use, lower-cased; unset takes the best."""
    return os.environ.get("ATTNBENCH_CPU_ISA", "").strip().lower() or None


def cuda_timing() -> str:
    """ATTNBENCH_CUDA_TIMING: `graph`, also where it is unset, or `events`: how calls are timed on an NVIDIA GPU.

    Raises AttnbenchError where it is anything else.
    """
    return _timing("ATTNBENCH_CUDA_TIMING")


def npu_timing() -> str:
    """ATTNBENCH_NPU_TIMING: the same on an Ascend NPU."""
    return _timing("ATTNBENCH_NPU_TIMING")


def _timing(name: str) -> str:
    value = os.environ.get(name) or "graph"
    if value not in ("graph", "events"):
        raise AttnbenchError(f"{name} must be graph or events, not {value!r}")
    return value


def cache_limit_bytes() -> int:
    """ATTNBENCH_CACHE_LIMIT: MiB that compiled kernels may take, 2048 where it is unset; 0 keeps none but the newest.

    Raises AttnbenchError where it is no whole number of at least 0.
    """
    value = os.environ.get("ATTNBENCH_CACHE_LIMIT") or "2048"
    if not (value.isascii() and value.isdigit()):
        raise AttnbenchError(f"ATTNBENCH_CACHE_LIMIT must be a whole number of MiB, not {value!r}")
    return int(value) << 20


def nvcc() -> list[str]:
    """Where CUDA's compiler may be: ATTNBENCH_NVCC alone if it is set, else PATH, CUDA_HOME, /usr/local/cuda."""
    if named := os.environ.get("ATTNBENCH_NVCC"):
        return [named]
    return ["nvcc", *(os.path.join(home, "bin", "nvcc") for home in cuda_homes())]


def cuda_homes() -> list[str]:
    """Where a CUDA toolkit may be: CUDA_HOME, if it is set, then /usr/local/cuda."""
    return [home for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]


def ascend_home() -> str | None:
    """ASCEND_HOME_PATH, else ASCEND_TOOLKIT_HOME, which CANN's set_env.sh sets: the folder of the toolkit."""
    return os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME") or None


def pto_lib_path() -> str | None:
    """PTO_LIB_PATH: a checkout of the PTO library, whose headers kernels include; unset leaves CANN's own."""
    return os.environ.get("PTO_LIB_PATH") or None


def npu_arch() -> str | None:
    """NPU_ARCH: the architecture to compile PTO kernels for, as CANN's compiler calls it; unset leaves the choice."""
    return os.environ.get("NPU_ARCH", "").strip() or None


def config_file() -> Path | None:
    """ATTNBENCH_CONFIG, else attnbench/config.toml in XDG_CONFIG_HOME or ~/.config; None where that is not there.

    Raises AttnbenchError where ATTNBENCH_CONFIG is a relative path.
    """
    if value := os.environ.get("ATTNBENCH_CONFIG"):
        if not os.path.isabs(value):
            raise AttnbenchError(f"ATTNBENCH_CONFIG must be an absolute path, not {value!r}")
        return Path(value)
    home = os.environ.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(home):  # the XDG specification: relative ones are to be ignored
        home = os.path.expanduser("~/.config")
    path = Path(home, "attnbench", "config.toml")
    return path if path.is_absolute() and os.path.lexists(path) else None


def interpreters() -> dict[str, str]:
    """Table [python] of the user's config.toml: NAME = "EXE", as in `--python NAME=EXE`; empty without the file.

    Raises AttnbenchError where the file cannot be read, or holds anything else.
    """
    path = config_file()
    if path is None:
        return {}
    hint = 'it may hold a table [python] of lines like name = "/envs/name/bin/python"'
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AttnbenchError(f"cannot read {path}: {error.strerror}") from error
    except RecursionError as error:
        raise AttnbenchError(f"{path} is nested too deeply", hint) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise AttnbenchError(f"{path} is not TOML: {error}", hint) from error
    if unknown := sorted(set(data) - {"python"}):
        raise AttnbenchError(f"{path} has an unknown key {unknown[0]!r}", hint)
    table = data.get("python", {})
    if not isinstance(table, dict):
        raise AttnbenchError(f"{path}: python must be a table", hint)
    for name, executable in table.items():
        if not isinstance(executable, str) or not executable.strip() or not name.strip():
            raise AttnbenchError(f"{path}: {name!r} in [python] must name an interpreter", hint)
        if "/" in executable and not os.path.isabs(os.path.expanduser(executable)):
            raise AttnbenchError(f"{path}: {name} must be an absolute path or a command, not {executable!r}", hint)
    return table
