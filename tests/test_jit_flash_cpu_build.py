"""The CPU kernel compiles without a warning for every path that it has, by both compilers."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.resources import files

import pytest

SOURCE = files("attnbench_kernels") / "cpu" / "flash_attention.cpp"
COMPILERS = {"g++": ("g++",), "clang++": ("clang++-19", "clang++")}


@pytest.mark.parametrize("arch", ["sapphirerapids", "cooperlake", "x86-64-v4", "x86-64-v3", "x86-64"])
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are x86-64's paths")
def test_compiles_without_warnings(compiler, arch, tmp_path):
    """amx_bf16, avx512_bf16, avx512, avx2 and portable."""
    found = next(filter(None, map(shutil.which, COMPILERS[compiler])), None)
    if found is None and "CI" not in os.environ:
        pytest.skip(f"no {compiler}")
    assert found, f"CI is to have {compiler}"
    flags = ["-O2", "-std=c++17", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror", f"-march={arch}"]
    done = subprocess.run([found, *flags, str(SOURCE), "-o", str(tmp_path / "library.so")], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
