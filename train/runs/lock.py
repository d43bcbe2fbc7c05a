"""One run in a folder at a time: a lock of the operating system, which dies with its process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from stepjax.errors import ConfigError

NAME = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_taken: set[Path] = set()  # by runs of this process, which the system's lock does not tell apart


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep the folder of a run for this process while the block runs. A killed process leaves no lock behind.

    The lock is a record lock (``fcntl``), which a shared folder (NFS) passes on to other hosts, and which children of
    this process do not inherit.

    Raises:
      ConfigError: another run is in the folder.
      OSError: the folder cannot be made or written to.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file, expected the folder of a run")
    out.mkdir(parents=True, exist_ok=True)
    key = out.resolve()
    if key in _taken:
        raise ConfigError(f"{out}: another run of this process is in the folder; wait for it, or choose another folder")
    handle = os.open(out / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    _taken.add(key)
    try:
        _take(handle, out)
        yield
    finally:
        _taken.discard(key)
        os.close(handle)  # gives the lock back


def _take(handle: int, out: Path) -> None:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            raise ConfigError(
                f"{out}: a run of {holder} is in the folder; wait for it, end it, or choose another folder"
            ) from None
        if error.errno not in _UNSUPPORTED:
            raise
        print(f"stepjax: {out}: this file system has no locks; start no second run there", file=sys.stderr)
    with contextlib.suppress(OSError):  # on a full disk the lock holds without a name
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
