"""Owns which files a plugin's code lies in, and a digest of what they hold. Imports and runs none of them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

DIGEST_LENGTH = 16


def files(places: Iterable[str]) -> list[Path]:
    """Every file at or below `places`, each once, sorted; no byte code, nothing hidden, and no link to a folder."""
    return sorted({path for place in places for path in _below(Path(place))})


def digest(places: Iterable[str]) -> str:
    """16 hexadecimal digits that change with any file's name or content there; empty where there is no file.

    Names count from each place on, so that it is the same wherever a package is installed.
    """
    found = hashlib.sha256()
    empty = True
    for place in sorted(places, key=os.path.basename):
        root = Path(place).parent
        for path in sorted(_below(Path(place))):
            try:
                content = path.read_bytes()
            except OSError:  # gone, or not ours to read: as if it were not there
                continue
            empty = False
            name = os.fsencode(path.relative_to(root).as_posix())
            found.update(b"%d:%s%d:%s" % (len(name), name, len(content), content))
    return "" if empty else found.hexdigest()[:DIGEST_LENGTH]


def snapshot(places: Iterable[str]) -> dict[Path, tuple[int, ...]]:
    """What tells whether a file at or below `places` was written, without reading it."""
    found: dict[Path, tuple[int, ...]] = {}
    for path in files(places):
        with contextlib.suppress(OSError):  # gone since
            facts = path.stat()
            found[path] = (facts.st_mtime_ns, facts.st_size, facts.st_ino)
    return found


def wait_for_change(places: Collection[str], before: Mapping[Path, tuple[int, ...]], every_s: float) -> list[Path]:
    """Wait until files differ from the snapshot `before`, and for a while no more; gives those that do."""
    now = snapshot(places)
    while True:
        time.sleep(every_s)
        last, now = now, snapshot(places)
        if now == last != before:  # an editor or a checkout may write several, one after the other
            return sorted(path for path in now.keys() | before.keys() if now.get(path) != before.get(path))


def _below(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield place
        return
    for folder, folders, names in os.walk(place):
        folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and path.suffix not in (".pyc", ".pyo") and path.is_file():
                yield path
