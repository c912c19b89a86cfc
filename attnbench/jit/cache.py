"""Owns the folder of compiled libraries, and of measured peaks: where it is, who may write it, one build per key, what
is intact.

Knows nothing of compilers: whoever asks brings the key and the function that builds.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

from attnbench import settings
from attnbench.errors import AttnbenchError

_RECORD = "entry.json"
_OURS = re.compile(r"([0-9a-f]{64})(\.lock|\.staging-\w+)?")
"""The names that may stand in the root; anything else there is somebody's own and stays."""


@dataclass(frozen=True)
class Entry:
    """One compiled library, for `attnbench cache show`."""

    key: str
    source: str
    """The source's file name; a copy lies in `path / "source"`."""
    compiler: str
    """The first line of its `--version`."""
    created: datetime
    """In UTC."""
    size_bytes: int
    path: Path
    """The entry's folder."""


@dataclass(frozen=True)
class Cache:
    """The libraries under `root`, a folder of ours alone: `root / key` holds library, source copy and entry.json."""

    root: Path

    def entries(self) -> list[Entry]:
        """All readable entries, oldest first; their libraries are verified when they are used, not here."""
        found = []
        for key in self._keys():
            path, record = self.root / key, _record(self.root / key)
            with suppress(KeyError, TypeError, ValueError, OverflowError):  # a record that is none, or tampered with
                created = datetime.fromtimestamp(record["created_s"], timezone.utc)
                found.append(
                    Entry(key, str(record["source"]), str(record["version"]), created, _size_bytes(path), path)
                )
        return sorted(found, key=lambda entry: entry.created)

    @property
    def size_bytes(self) -> int:
        """Of everything the cache has written, unreadable entries and unfinished builds included."""
        return sum(_size_bytes(path) for key in self._keys() for path in self._paths(key))

    def clear(self) -> int:
        """Delete all entries but those that are being built at the moment; returns the bytes freed.

        A link is deleted, never what it points to. Raises AttnbenchError where something cannot be deleted.
        """
        freed_bytes = 0
        with self._readable_errors():
            for key in self._keys():
                with self._lock(key, wait=False) as held:
                    if held:
                        freed_bytes += sum(self._discard(path) for path in self._paths(key))
        return freed_bytes

    def get(
        self,
        key: str,
        library: str,
        record: Mapping[str, object],
        build: Callable[[Path], None],
        *,
        replace: bool = False,
    ) -> tuple[Path, bool]:
        """The path of `key`'s library, and whether it was there already.

        Where it is missing or not intact, or in any case with `replace`, `build(folder)` writes the file named
        `library` into a staging folder, which becomes the entry if it returns and vanishes if it raises. Other
        processes wait meanwhile. `record` goes into entry.json. Where the cache then holds more than
        ATTNBENCH_CACHE_LIMIT allows, what was not used for longest goes. Raises AttnbenchError where the folder cannot
        be written, and what `build` raises.
        """
        limit_bytes = settings.cache_limit_bytes()
        entry = self.root / key
        if not replace and _intact(entry, library):
            with suppress(OSError):
                os.utime(entry / _RECORD)  # it was used
            return entry / library, True
        with self._readable_errors():
            self._sweep()
            with self._lock(key):
                if not replace and _intact(entry, library):
                    return entry / library, True
                self._discard(entry)
                staging = Path(tempfile.mkdtemp(prefix=f"{key}.staging-", dir=self.root))
                try:
                    build(staging)
                    facts = {"key": key, "sha256": _sha256(staging / library), "created_s": time.time()}
                    (staging / _RECORD).write_text(json.dumps({**record, **facts}, indent=1))
                    for path in _tree(
                        staging
                    ):  # a umask of 002, usual on some systems, would leave group-writable files
                        path.chmod(0o700)
                    staging.rename(entry)
                finally:
                    shutil.rmtree(staging, ignore_errors=True)
            self._evict(limit_bytes, key)
        return entry / library, False

    def _evict(self, limit_bytes: int, newest: str) -> None:
        """Delete what was not used for longest until the rest fits; never `newest`, nor what is being built.

        Whoever has loaded such a library keeps it: the file lives on until it is unloaded.
        """
        used = {key: self.root / key / _RECORD for key in self._keys() if key != newest}
        total = self.size_bytes
        for key in sorted(used, key=lambda key: _used_s(used[key])):
            if total <= limit_bytes:
                return
            with self._lock(key, wait=False) as held:
                if held:
                    total -= sum(self._discard(path) for path in self._paths(key))

    def _keys(self) -> list[str]:
        with suppress(FileNotFoundError):
            return sorted({found[1] for name in os.listdir(self.root) if (found := _OURS.fullmatch(name))})
        return []

    def _paths(self, key: str) -> list[Path]:
        return [path for path in (self.root / key, *self.root.glob(f"{key}.staging-*")) if os.path.lexists(path)]

    def _sweep(self) -> None:
        """Delete the staging folders of killed processes: those whose key nobody has locked."""
        for staging in self.root.glob("*.staging-*"):
            if found := _OURS.fullmatch(staging.name):
                with self._lock(found[1], wait=False) as held:
                    if held:
                        self._discard(staging)

    def _discard(self, path: Path) -> int:
        """Delete a file, a link or a tree; returns its bytes. A tree leaves its name at once, for who reads it now."""
        if not os.path.lexists(path):
            return 0
        size_bytes = _size_bytes(path)
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            bin_ = Path(tempfile.mkdtemp(prefix=f"{path.name[:64]}.staging-", dir=self.root))
            path.rename(bin_)  # an empty folder gives way; into it, another user's folder could not be moved
            shutil.rmtree(bin_, ignore_errors=True)  # another user's files may stay; the entry's name is free
        return size_bytes

    @contextmanager
    def _lock(self, key: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold the key's lock, across processes and threads; False where it is taken and `wait` is off.

        The kernel frees a killed process's lock. The file goes away with the last step under the lock.
        """
        path = self.root / f"{key}.lock"
        fd = _open_locked(path, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield fd is not None
        finally:
            if fd is not None:
                try:
                    path.unlink(missing_ok=True)
                finally:
                    os.close(fd)

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise AttnbenchError(
                f"cannot write to the kernel cache {self.root}: {error.strerror or error}",
                "free some space there, or set ATTNBENCH_CACHE_DIR to another folder",
            ) from error


def default() -> Cache:
    """The cache in ATTNBENCH_CACHE_DIR, else $XDG_CACHE_HOME/attnbench, else ~/.cache/attnbench.

    The folder is made, or tightened to mode 0700. Where neither of the latter two can be used, a folder of this
    process takes their place until it exits. Raises AttnbenchError where ATTNBENCH_CACHE_DIR is set and cannot be used.
    """
    chosen = settings.cache_dir()
    if chosen is not None:
        root = chosen.absolute()
        try:
            _secure(root)
        except OSError as error:
            raise AttnbenchError(
                f"ATTNBENCH_CACHE_DIR={chosen} cannot be used: {error.strerror or error}",
                "name a folder of your own that can be written, or unset it",
            ) from error
        return Cache(root)
    with suppress(OSError, RuntimeError):  # RuntimeError: no home is known
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not base.is_absolute():  # unset, or, by the XDG specification, to be ignored
            base = Path.home() / ".cache"
        if base.is_absolute():
            _secure(base / "attnbench")
            return Cache(base / "attnbench")
    return Cache(_private(os.getpid()))


@lru_cache
def _private(pid: int) -> Path:
    """A folder of process `pid` alone; a fork gets its own, and deletes only that."""
    try:
        root = Path(tempfile.mkdtemp(prefix="attnbench-"))
    except OSError as error:
        raise AttnbenchError(
            f"there is no folder for compiled kernels: {error.strerror or error}", "set ATTNBENCH_CACHE_DIR"
        ) from error

    def remove() -> None:
        if os.getpid() == pid:
            shutil.rmtree(root, ignore_errors=True)

    atexit.register(remove)
    return root


def _secure(root: Path) -> None:
    """Make `root` a folder that is ours, ours alone, and writable; the OSError says why that cannot be."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        root.mkdir(mode=0o700)
    if root.is_symlink():
        raise OSError(errno.ELOOP, "it is a symbolic link")
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        if info.st_uid != os.getuid():
            raise PermissionError(errno.EPERM, "it belongs to another user")
        if info.st_mode & 0o077:
            os.fchmod(fd, stat.S_IMODE(info.st_mode) & 0o700)
    finally:
        os.close(fd)
    if not os.access(root, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "it cannot be written")


def _open_locked(path: Path, operation: int) -> int | None:
    """A descriptor that holds the lock on the file at `path`; None where LOCK_NB is set and another holds it."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            try:
                fcntl.flock(file, operation)
            except BlockingIOError:
                return None
            # Who held it before has deleted it; only the file that is at `path` now keeps others out.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.lstat(path)):
                    return os.dup(fd)


def _intact(entry: Path, library: str) -> bool:
    """Whether the entry is ours, nobody else can have written it, and the library is the one that was built."""
    try:
        infos = [path.lstat() for path in (entry, *_tree(entry))]
        private = all(
            (stat.S_ISREG(info.st_mode) or stat.S_ISDIR(info.st_mode))
            and info.st_uid == os.getuid()
            and not info.st_mode & 0o022
            for info in infos
        )
        record = _record(entry) if private else {}
        return record.get("key") == entry.name and record.get("sha256") == _sha256(entry / library)
    except OSError:
        return False


def _record(entry: Path) -> dict[str, Any]:
    """What entry.json says; empty where it says nothing readable, or is elsewhere."""
    path = entry / _RECORD
    if entry.is_symlink() or path.is_symlink():
        return {}
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _used_s(record: Path) -> float:
    """When an entry was used last, in seconds; 0 where it has no record, so that it goes first."""
    try:
        return record.stat().st_mtime
    except OSError:
        return 0.0


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _tree(folder: Path) -> Iterator[Path]:
    """All that lies under a folder; links are listed, not followed."""
    if not folder.is_symlink():
        for place, folders, files in os.walk(folder):
            yield from (Path(place, name) for name in (*folders, *files))


def _size_bytes(path: Path) -> int:
    total = 0
    for part in (path, *_tree(path)):
        with suppress(FileNotFoundError):  # deleted by another process just now
            info = part.lstat()
            total += 0 if stat.S_ISDIR(info.st_mode) else info.st_size
    return total
