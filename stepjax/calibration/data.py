"""Sequences of token ids to calibrate with, and those that are held out to measure with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stepjax.checkpoint.folder import ModelFolder
from stepjax.errors import RequestError

LENGTH = 512  # tokens of a row of text
HELD_OUT = 8  # every so many rows, one is measured with and not calibrated with
MAX_BYTES = 2**28


@dataclass(frozen=True)
class CalibrationData:
    """Rows of a file."""

    path: Path
    sha256: str  # of the file
    rows: tuple[list[int], ...]
    held_out: tuple[list[int], ...]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.rows))


def read_data(path: Path, model: ModelFolder) -> CalibrationData:
    """A JSON list of lists of token ids (a file that ends in .json), or text, which the model's tokenizer encodes.

    Raises:
      RequestError: it cannot be read, holds other things, or fewer than two rows.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RequestError(f"{path}: is larger than {MAX_BYTES:,} bytes; calibrate with a part of it")
        content = path.read_bytes()
        text = content.decode("utf-8")
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: is not UTF-8 text ({error})") from None
    rows = _ids(path, text) if path.suffix == ".json" else _encoded(path, text, model)
    _check(path, rows, model)
    if len(rows) < 2:
        raise RequestError(f"{path}: holds {len(rows)} rows, expected at least 2: one of {HELD_OUT} is held out")
    first = min(HELD_OUT, len(rows)) - 1
    held_out = rows[first::HELD_OUT]
    kept = [row for i, row in enumerate(rows) if i % HELD_OUT != first]
    return CalibrationData(path, hashlib.sha256(content).hexdigest(), tuple(kept), tuple(held_out))


def _ids(path: Path, text: str) -> list[list[int]]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: not valid JSON ({error}); expected a list of lists of token ids") from None
    if not isinstance(rows, list) or not all(isinstance(row, list) and row for row in rows):
        raise RequestError(f"{path}: expected a JSON list of lists of token ids, as [[0, 71], [0, 5]]")
    return rows


def _encoded(path: Path, text: str, model: ModelFolder) -> list[list[int]]:
    if model.tokenizer is None:
        raise RequestError(f"{path}: is text, but {model.path} has no tokenizer; give token ids in a .json file")
    ids = model.tokenizer.encode(text)
    return [ids[start : start + LENGTH] for start in range(0, len(ids), LENGTH)]


def _check(path: Path, rows: Sequence[Sequence[object]], model: ModelFolder) -> None:
    config = model.checkpoint.config
    for i, row in enumerate(rows):
        wrong = (token for token in row if type(token) is not int or not 0 <= token < config.vocab_size)
        for token in wrong:
            raise RequestError(f"{path}: row {i} holds {token!r}, expected integers from 0 to {config.vocab_size - 1}")
        if len(row) > config.max_positions:
            raise RequestError(f"{path}: row {i} has {len(row)} tokens, the model's context is {config.max_positions}")
