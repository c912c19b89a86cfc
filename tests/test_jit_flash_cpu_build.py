"""The CPU kernel compiles without a warning for every path that it has, by both compilers."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

SOURCE = files("attnbench_kernels") / "cpu" / "flash_attention.cpp"
COMPILERS = {"g++": ("g++",), "clang++": ("clang++-19", "clang++")}


FLAGS = ("-O2", "-std=c++17", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror")


def compiles(names: tuple[str, ...], *flags: str, to: Path) -> None:
    """Without a word, by the first of these compilers that is there; CI must have one."""
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None and "CI" not in os.environ:
        pytest.skip(f"no {names[0]}")
    assert found, f"CI is to have {names[0]}"
    done = subprocess.run([found, *FLAGS, *flags, str(SOURCE), "-o", str(to / "library.so")], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("arch", ["sapphirerapids", "cooperlake", "x86-64-v4", "x86-64-v3", "x86-64"])
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are x86-64's paths")
def test_compiles_without_warnings(compiler, arch, tmp_path):
    """amx_bf16, avx512_bf16, avx512, avx2 and portable."""
    compiles(COMPILERS[compiler], f"-march={arch}", to=tmp_path)


def test_compiles_for_arm(tmp_path):
    """neon."""
    compiles(("aarch64-linux-gnu-g++",), to=tmp_path)
