"""What a source holds, as one number: the same rows give the same fingerprint wherever they lie."""

from __future__ import annotations

import glob
import hashlib
import json
from pathlib import Path

from stepjax.errors import ConfigError
from stepjax.train.config.tune import DataSettings

BLOCK_BYTES = 1 << 22


def fingerprint(settings: DataSettings) -> str:
    """SHA-256 of what a source holds, 64 hex digits. Names and places of files do not enter, their order does.

    Raises:
      ConfigError: a file cannot be read.
    """
    digest = hashlib.sha256(b"stepjax data 1\n")
    if settings.kind == "tasks":
        digest.update(json.dumps(["tasks", settings.shares, settings.tools], sort_keys=True).encode())
    else:
        for file in sorted(glob.glob(settings.path)) or [settings.path]:
            digest.update(file_digest(Path(file)).encode())
    return digest.hexdigest()


def file_digest(file: Path) -> str:
    """SHA-256 of a file's content, 64 hex digits. ConfigError: the file cannot be read."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as content:
            while block := content.read(BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()
