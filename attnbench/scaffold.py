"""Owns the packages that `attnbench new-plugin` writes: which kinds there are, what a name may be. Knows no backend.

The templates are a package called my-flash, whole and valid as it stands; a new one has other names in their places.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import keyword
import os
import re
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path

from attnbench.errors import AttnbenchError
from attnbench.hookspecs import ENTRY_POINT_GROUP

KINDS = ("torch", "triton", "cuda", "cpp", "pto")
PEERS = {"pto": "npu_fused_attention"}
"""What a new backend of a kind is compared with; sdpa, which runs wherever the other kinds do, but for these."""
NAME_PATTERN = r"[a-z][a-z0-9]*([-_][a-z0-9]+)*"

_COMMON = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "gitignore": ".gitignore",
    "package.py": "my_flash/__init__.py",
    "test_my_flash.py": "tests/test_my_flash.py",
}
"""The files that every kind has, and where they lie in a package."""


def create(name: str, kind: str, parent: Path) -> list[Path]:
    """Write a package that brings one backend, in a new folder `parent / name`; gives its files.

    It is there as a whole or not at all. Raises AttnbenchError for a name that none can have or a folder that is there.
    """
    module = name.replace("-", "_")
    _require_name(name, module)
    folder = parent / name
    if os.path.lexists(folder):
        raise AttnbenchError(f"{folder} is there already", "give another name, or go to another folder")
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=parent))
        try:
            os.chmod(staging, 0o777 & ~_umask())
            written = _write(staging, name, module, kind)
            os.rename(staging, folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    except OSError as error:
        raise AttnbenchError(f"cannot write {folder}: {error.strerror or error}", "go to a folder of yours") from error
    return [folder / path for path in written]


def _require_name(name: str, module: str) -> None:
    if not re.fullmatch(NAME_PATTERN, name):
        raise AttnbenchError(
            f"{name!r} cannot be a plugin's name",
            "small letters and digits, a letter first, parted by - or _: my-flash",
        )
    if keyword.iskeyword(module) or importlib.util.find_spec(module) is not None:
        raise AttnbenchError(f"Python has something called {module} already", "give the plugin another name")
    if module in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP).names:
        raise AttnbenchError(f"a plugin called {module} is installed already", "give the plugin another name")


def _write(folder: Path, name: str, module: str, kind: str) -> list[Path]:
    templates = files("attnbench") / "templates"
    sources = [(templates / "common" / file, place) for file, place in _COMMON.items()]
    sources += [(item, f"my_flash/{item.name}") for item in (templates / kind).iterdir() if item.is_file()]
    names = {"my_flash": module, "my-flash": name, "MyFlash": "".join(part.title() for part in module.split("_"))}
    names["PEER"] = PEERS.get(kind, "sdpa")

    def renamed(text: str) -> str:
        return re.sub("|".join(names), lambda found: names[found[0]], text)

    written = []
    for source, place in sources:
        path = Path(renamed(place))
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(renamed(source.read_text(encoding="utf-8")), encoding="utf-8")
        written.append(path)
    return sorted(written)


def _umask() -> int:
    """What a new file's mode lacks; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
