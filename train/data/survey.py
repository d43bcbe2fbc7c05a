"""Reads every row of a source once, before a run: what is wrong, which forms the rows have, which questions recur."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import zipfile
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from stepjax._version import __version__
from stepjax.cache_folder import CacheFolder
from stepjax.errors import ConfigError
from stepjax.train.config.tune import DataSettings
from stepjax.train.data.files.opening import open_files
from stepjax.train.data.files.parquet import open_hub
from stepjax.train.data.files.records import Records, RowFault, all_rows, counted
from stepjax.train.data.fingerprint import KIND, fingerprint
from stepjax.train.data.forms.content import RowContent
from stepjax.train.data.forms.table import COLUMNS, FORMS, NEEDED, read_content, renamed
from stepjax.train.data.turns import trained_turns

T = TypeVar("T")

MAX_FAULTS = 20  # bad rows that are named before a run
MANY = 50_000  # rows from which a progress bar is shown: a million take half a minute, the first time
MAX_RECENT = 4  # surveys that a process keeps: a run asks twice, before it begins and as it reads
MAX_BYTES = 1 << 30  # of the surveys and digests in the cache folder


@dataclass(frozen=True)
class Survey:
    """What the rows of a source are. Arrays have an entry for each good row."""

    numbers: np.ndarray  # int64: of the rows in their files, counted from 0
    form_codes: np.ndarray  # uint8: the form's place in `FORMS`
    questions: np.ndarray  # uint64: a hash of what comes before the answer
    has_answer: np.ndarray  # bool: a turn of the assistant to learn from
    has_target: np.ndarray  # bool: something that exact match compares with
    faults: list[RowFault] = field(default_factory=list)  # rows that cannot be used

    def __len__(self) -> int:
        return len(self.numbers)

    def forms(self, kept: np.ndarray | None = None) -> dict[str, int]:
        """Rows of each form, of all or of those that are kept (bool [N])."""
        codes = self.form_codes if kept is None else self.form_codes[kept]
        counts = np.bincount(codes, minlength=len(FORMS))
        return {name: int(count) for name, count in zip(FORMS, counts, strict=True) if count}


_ARRAYS = {"numbers": np.int64, "form_codes": np.uint8, "questions": np.uint64, "has_answer": bool, "has_target": bool}
_RECENT: dict[str, Survey] = {}


class RowReader:
    """Reads rows as one source's settings say."""

    def __init__(self, settings: DataSettings):
        """ConfigError: `columns` names what no form has."""
        self._settings = settings
        unknown = sorted(set(settings.columns) - set(COLUMNS))
        if unknown:
            raise ConfigError(f"data: columns has {unknown[0]!r}, expected names of {', '.join(COLUMNS)}")
        named = [name for column, name in NEEDED.items() if column in settings.columns]
        self._form = named[0] if settings.form == "auto" and len(named) == 1 else settings.form

    def read(self, row: Mapping[str, Any]) -> tuple[str, RowContent, tuple[int, ...]]:
        """Form, content and trained turns of a row. ValueError: it is not acceptable."""
        form, content = read_content(renamed(row, self._settings.columns), self._form)
        return form, content, trained_turns(content, self._settings.train_on)

    def kept(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row with our names of columns beside its own, as rewards see it."""
        return renamed(row, self._settings.columns)


def open_records(settings: DataSettings, path: str) -> Records:
    """The rows at a path, read as a source's settings say. ConfigError: nothing there can be read."""
    if settings.kind == "hub":
        return open_hub(path, settings.subset, settings.split)
    return open_files(path, settings.kind)


def survey(settings: DataSettings, records: Records) -> Survey:
    """Read all rows, with a progress bar if they are many and stderr is a terminal."""
    reader, faults = RowReader(settings), list(records.faults)
    codes = {name: code for code, name in enumerate(FORMS)}
    columns = [array(kind) for kind in "qBQBB"]  # one for each of `_ARRAYS`
    for number, row in enumerate(_with_progress(all_rows(records), len(records))):
        if isinstance(row, RowFault):
            faults.append(row)
            continue
        try:
            form, content, turns = reader.read(row)
        except (ValueError, RecursionError) as error:
            faults.append(RowFault(records.where(number), str(error)))
            continue
        answered = bool(turns) or (not content.messages and content.completion is not None)
        target = content.answer is not None or content.ends_with_answer
        for column, value in zip(columns, (number, codes[form], _hash(content), answered, target), strict=True):
            column.append(value)
    arrays = {name: np.asarray(column, dtype) for column, (name, dtype) in zip(columns, _ARRAYS.items(), strict=True)}
    return Survey(**arrays, faults=sorted(faults, key=lambda fault: fault.place))


def _with_progress(rows: Iterable[T], count: int) -> Iterable[T]:
    if count < MANY:
        return rows
    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"reading {counted(count)}, which is done once for this content", file=sys.stderr)
    return track(rows, "checking rows", total=count, console=console, disable=not console.is_terminal, transient=True)


def known_survey(settings: DataSettings, records: Records, path: str) -> Survey:
    """`survey`, kept in the cache folder while the content of the files stays the same."""
    about = [settings.form, settings.columns, settings.train_on, path == settings.held_out_path, __version__, COLUMNS]
    key = json.dumps([fingerprint(settings), *about], sort_keys=True)
    name = "survey-" + hashlib.sha256(key.encode()).hexdigest()
    cache = CacheFolder.open(KIND)
    known = _RECENT.get(name)
    if known is None and cache and (content := cache.read(name)) is not None:
        known = _unpacked(content)
    if known is None or len(known) != len(records):
        known = survey(settings, records)
        if cache and not known.faults:
            cache.write(name, _packed(known))
            cache.trim(MAX_BYTES)
    if not known.faults:
        _RECENT[name] = known
        while len(_RECENT) > MAX_RECENT:
            del _RECENT[next(iter(_RECENT))]
    return known


def fault_lines(faults: list[RowFault], limit: int | None = None) -> Iterator[str]:
    """A line for each bad row, up to a limit, and then how many are left."""
    shown = faults if limit is None else faults[:limit]
    yield from (str(fault) for fault in shown)
    if len(faults) > len(shown):
        yield f"and {counted(len(faults) - len(shown), 'other bad row')}; stepjax data check names them all"


def _hash(content: RowContent) -> int:
    """A hash of what a row asks: the messages before the answer, or the raw prompt, or the whole of a raw text."""
    if content.messages:
        asked = json.dumps([content.question, content.tools], ensure_ascii=False, sort_keys=True)
    else:
        asked = content.prompt or content.completion or ""
    return int.from_bytes(hashlib.blake2b(asked.encode(), digest_size=8).digest(), "little")


def _packed(result: Survey) -> bytes:
    file = io.BytesIO()
    np.savez(file, **{name: getattr(result, name) for name in _ARRAYS})  # type: ignore[arg-type]
    return file.getvalue()


def _unpacked(content: bytes) -> Survey | None:
    """What `_packed` wrote; None if it is damaged."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return Survey(**{name: file[name] for name in _ARRAYS})
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile):
        return None
