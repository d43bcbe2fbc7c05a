"""The folder of files that are kept between runs. It needs no jax, so that `stepjax cache` starts quickly.

An entry of the program cache is code that runs as its reader, so a folder is used only if it belongs to the user and
nobody else may write to it. Entries appear by renaming, so that a reader never meets half of one, whichever processes
share the folder and whenever one of them is killed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)

VARIABLE = "STEPJAX_CACHE_DIR"
MAX_GIB = 4.0  # of each kind of entries
TEMPORARY = ".part-"
ABANDONED_S = 3600.0  # after which the temporary file of a process that was killed is removed


def cache_root() -> Path | None:
    """``STEPJAX_CACHE_DIR``, else ``stepjax`` in the user's cache folder; None without a home folder."""
    try:
        if given := os.environ.get(VARIABLE):
            return Path(given).expanduser().absolute()
        return (Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "stepjax").expanduser().absolute()
    except RuntimeError:
        return None


class CacheEntry(NamedTuple):
    name: str
    num_bytes: int
    used: float  # seconds since the epoch: when it was last read or written


class CacheFolder:
    """Files of one kind in a folder of the user."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def open(cls, kind: str) -> CacheFolder | None:
        """The folder ``kind`` in the cache folder, created if missing; None if it cannot be trusted."""
        root = cache_root()
        if root is None:
            return None
        path = root / kind
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.mkdir(exist_ok=True, mode=0o700)
            for folder in (root, path):
                if fault := _distrust(os.stat(folder)):
                    log.warning("%s: %s; nothing is kept between runs", folder, fault)
                    return None
            if not os.access(path, os.W_OK | os.X_OK):
                return None
        except OSError:
            return None
        return cls(path)

    def read(self, name: str) -> bytes | None:
        """The content of an entry, which is marked as used now; None if there is none, or it cannot be trusted."""
        try:
            descriptor = os.open(self.path / name, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        except OSError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if fault := _distrust(status):
                log.warning("%s: %s; it is ignored", self.path / name, fault)
                return None
            with contextlib.suppress(OSError):
                os.utime(self.path / name)
            try:
                return file.read()
            except OSError:
                return None

    def write(self, name: str, content: bytes) -> bool:
        """Write an entry, which appears only once it is complete. False if it cannot be written."""
        temporary = self.path / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path / name)
        except OSError as error:
            log.warning("%s: cannot be written (%s)", self.path / name, error.strerror)
            temporary.unlink(missing_ok=True)
            return False
        return True

    def remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            (self.path / name).unlink(missing_ok=True)

    def entries(self) -> list[CacheEntry]:
        """All entries, the most recently used first."""
        return sorted((entry for entry in self._scan() if not entry.name.startswith(TEMPORARY)), key=_age)

    def trim(self, max_bytes: int) -> None:
        """Remove the least recently used entries until the rest fits, and temporary files of killed processes."""
        kept = 0
        for entry in sorted(self._scan(), key=_age):
            if entry.name.startswith(TEMPORARY):
                if time.time() - entry.used > ABANDONED_S:
                    self.remove(entry.name)
                continue
            kept += entry.num_bytes
            if kept > max_bytes:
                self.remove(entry.name)

    def empty(self) -> tuple[int, int]:
        """Remove all entries, and return their number and bytes."""
        entries = list(self._scan())
        for entry in entries:
            self.remove(entry.name)
        return len(entries), sum(entry.num_bytes for entry in entries)

    def _scan(self) -> Iterator[CacheEntry]:
        with os.scandir(self.path) as files:
            for file in files:
                try:
                    status = file.stat(follow_symlinks=False)
                except OSError:  # another process removed it
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield CacheEntry(file.name, status.st_size, status.st_mtime)


def _age(entry: CacheEntry) -> tuple[float, str]:
    return -entry.used, entry.name


def _distrust(status: os.stat_result) -> str:
    """Why code from a file or folder cannot be trusted; "" if it can."""
    if not hasattr(os, "geteuid"):
        return ""
    if status.st_uid != os.geteuid():
        return "belongs to another user"
    if status.st_mode & 0o022:
        return "others may write to it (chmod go-w)"
    return ""
