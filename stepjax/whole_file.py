"""Files that appear only once they are complete, and stay complete when the power fails."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from stepjax.errors import RequestError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to. It takes the place of ``path`` when the block ends without an error.

    After an error what was written is removed, and a file that was at ``path`` is as it was.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, Exception) and not isinstance(error, OSError) and "No space left" in str(error):
            # a library's own error, as of safetensors
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise
    sync(path.parent)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file as `whole_file` does."""
    with whole_file(path) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """
    Raises:
      RequestError: the block cannot write the file, which it names; the error of a full disk has no name.
    """
    try:
        yield
    except OSError as error:
        raise RequestError(f"{path}: cannot be written ({error.strerror})") from None


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
