"""attnbench.sources: which files count, and that a digest changes with any of them and with nothing else."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest

from attnbench.sources import digest, files, snapshot, wait_for_change


@pytest.fixture
def package(tmp_path: Path) -> Path:
    root = tmp_path / "here" / "flash"
    (root / "__pycache__").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / "__init__.py").write_text("one")
    (root / "kernel.cpp").write_text("two")
    (root / "__pycache__" / "x.pyc").write_bytes(b"\0")
    (root / ".git" / "HEAD").write_text("main")
    return root


def test_code_counts_and_byte_code_and_hidden_files_do_not(package: Path) -> None:
    assert files([str(package)]) == [package / "__init__.py", package / "kernel.cpp"]
    assert files([str(package / "kernel.cpp"), str(package)]) == files([str(package)])
    assert files([str(package / "nothing")]) == []


def test_a_digest_changes_with_content_and_names_alone(package: Path, tmp_path: Path) -> None:
    before = digest([str(package)])
    assert len(before) == 16
    (package / "__pycache__" / "x.pyc").write_bytes(b"\1")
    shutil.copytree(package, tmp_path / "there" / "flash")
    assert digest([str(package)]) == digest([str(tmp_path / "there" / "flash")]) == before
    (package / "kernel.cpp").write_text("three")
    changed = digest([str(package)])
    (package / "kernel.cpp").write_text("two")
    (package / "kernel.cpp").rename(package / "kernel.cu")
    assert len({before, changed, digest([str(package)])}) == 3


def test_of_nothing_there_is_no_digest(tmp_path: Path) -> None:
    assert digest([]) == digest([str(tmp_path / "nothing")]) == ""


@pytest.mark.parametrize("how", ["written", "replaced", "deleted", "added"])
def test_waiting_ends_with_what_changed(package: Path, how: str) -> None:
    kernel, new = package / "kernel.cpp", package / "tile.h"
    before = snapshot([str(package)])
    assert set(before) == {package / "__init__.py", kernel}

    def change() -> None:
        if how == "written":
            kernel.write_text("three")
        elif how == "replaced":  # as editors save: another file under the old name, of the same size
            (package / ".kernel.swp").write_text("TWO")
            os.replace(package / ".kernel.swp", kernel)
        elif how == "deleted":
            kernel.unlink()
        else:
            new.write_text("four")

    timer = threading.Timer(0.1, change)
    timer.start()
    changed = wait_for_change([str(package)], before, 0.02)
    timer.join()
    assert changed == [new if how == "added" else kernel]


def test_what_changed_before_the_waiting_began_counts(package: Path) -> None:
    before = snapshot([str(package)])
    (package / "kernel.cpp").write_text("three")
    assert wait_for_change([str(package)], before, 0.01) == [package / "kernel.cpp"]
