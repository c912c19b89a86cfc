"""Owns every ATTNBENCH_* environment variable: its name, its meaning, its default. Reads nothing else.

Each is read when asked for, not at import, so a test or a parent process can set it at any time.
"""

from __future__ import annotations

import os
from pathlib import Path


def plugins() -> frozenset[str] | None:
    """ATTNBENCH_PLUGINS: comma-separated entry-point names to load; empty loads none, unset loads all (None)."""
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
