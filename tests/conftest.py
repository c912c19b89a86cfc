"""Owns what every test may count on: a cache that is not the user's, no settings from outside, and a CLI in-process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Answer, BareVenv, PluginFolder

OUTSIDE_SETTINGS = (
    *("ATTNBENCH_PLUGINS", "ATTNBENCH_CXX", "CXX", "ATTNBENCH_CUDA_TIMING", "ATTNBENCH_NPU_TIMING"),
    *("NO_COLOR", "FORCE_COLOR", "COLUMNS"),
)


@pytest.fixture(scope="session", autouse=True)
def _isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for the session, so that the kernel compiles once; none of the user's settings."""
    with pytest.MonkeyPatch.context() as patch:
        for name in OUTSIDE_SETTINGS:
            patch.delenv(name, raising=False)
        for name in ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES"):  # `auto` is the CPU on every machine
            patch.setenv(name, "")
        patch.setattr(torch.cuda, "is_available", lambda: False)  # torch may have looked before
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
        patch.setenv("ATTNBENCH_CONFIG", os.devnull)
        patch.setenv("ATTNBENCH_CACHE_DIR", str(tmp_path_factory.mktemp("attnbench-cache")))
        yield


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, so that no test writes reports/ into the checkout."""
    path = tmp_path / "cwd"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PluginFolder:
    """A place where fake distributions are installed, for this process and for those it starts."""
    path = tmp_path / "site"
    path.mkdir()
    monkeypatch.syspath_prepend(str(path))
    monkeypatch.setenv("PYTHONPATH", str(path), prepend=os.pathsep if os.environ.get("PYTHONPATH") else None)
    return PluginFolder(path)


SETTINGS = ("PATH", "PYTHONPATH", "ATTNBENCH_PLUGINS", "ATTNBENCH_CONFIG", "ATTNBENCH_CXX", "CXX", "HOME")
OUTSIDE_PATH = os.environ.get("PYTHONPATH")
_discovered: dict[object, object] = {}


@pytest.fixture
def known_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Discovery takes seconds: where no test has installed a plugin of its own, what it found is kept."""
    from attnbench import discovery

    discover = discovery.discover

    def remembering(
        without: Collection[str] = (), python: Mapping[str, str] | None = None, files: Any = (), **limits: float
    ) -> object:
        if os.environ.get("PYTHONPATH") != OUTSIDE_PATH or python or files or limits:
            return discover(without, python, files, **limits)
        key = (frozenset(without), *map(os.environ.get, SETTINGS))
        if key not in _discovered:
            _discovered[key] = discover(without, python)
        return _discovered[key]

    monkeypatch.setattr(discovery, "discover", remembering)


@pytest.fixture
def cli(folder: Path, capfd: pytest.CaptureFixture[str], known_plugins: None) -> Callable[..., Answer]:
    """attnbench's command line in this process: `cli("run", …)` gives exit code, stdout and stderr."""
    from attnbench.cli import main

    def call(*words: object) -> Answer:
        capfd.readouterr()
        code: object = 0
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            code = end.code
        return Answer(code, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> BareVenv:
    """attnbench as `pip install` gives it: the wheel of the sdist and all that it needs, in a fresh venv."""
    return BareVenv(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors on several threads wait for each other, for long on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
