"""What a source holds, as one number: the same rows give the same fingerprint wherever they lie."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from stepjax.cache_folder import CacheFolder
from stepjax.errors import ConfigError
from stepjax.train.config.tune import DataSettings
from stepjax.train.data.files.parquet import open_hub
from stepjax.train.data.files.paths import data_files
from stepjax.train.data.files.records import CHUNK

KIND = "data"  # folder of the cache
BLOCK_BYTES = 1 << 22


def fingerprint(settings: DataSettings) -> str:
    """SHA-256 of what a source holds, 64 hex digits. Names and places of files do not enter, their order does.

    The digest of a file is kept in the cache folder and is computed again when the file changes.

    Raises:
      ConfigError: a file cannot be read.
    """
    digest = hashlib.sha256(b"stepjax data 1\n")
    if settings.kind == "tasks":
        digest.update(json.dumps(["tasks", settings.shares, settings.tools], sort_keys=True).encode())
    elif settings.kind == "environment":
        digest.update(b"environment")  # its code has a digest of its own
    elif settings.kind == "hub":
        records = open_hub(settings.path, settings.subset, settings.split)
        for begin in range(0, len(records), CHUNK):
            rows = records.read(begin, begin + CHUNK)
            digest.update(json.dumps(rows, sort_keys=True, default=str).encode())
    else:
        for path in (settings.path, settings.held_out_path):
            for file in data_files(path) if path else ():
                digest.update(file_digest(file).encode())
            digest.update(b"\n")
    return digest.hexdigest()


def file_digest(file: Path) -> str:
    """SHA-256 of a file's content, 64 hex digits. ConfigError: the file cannot be read."""
    try:
        status = os.stat(file)
        about = [str(file.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        name = "digest-" + hashlib.sha256(json.dumps(about).encode()).hexdigest()
        cache = CacheFolder.open(KIND)
        known = cache.read(name) if cache else None
        if known is not None and len(known) == 64:
            return known.decode("ascii", errors="replace")
        digest = hashlib.sha256()
        with file.open("rb") as content:
            while block := content.read(BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    if cache:
        cache.write(name, digest.hexdigest().encode())
    return digest.hexdigest()
