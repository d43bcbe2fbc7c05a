"""What the service has promised, in one SQLite file: sessions, models, samplers, calls with their bodies, checkpoints.

A call is in the journal before its promise is given, so a server that was killed carries on where it was. Any thread
may call; writes are durable when a method returns.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepjax.errors import ConfigError

FORM = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS sessions (
  id TEXT PRIMARY KEY, owner TEXT NOT NULL, created REAL NOT NULL, seen REAL NOT NULL, token TEXT, ended TEXT,
  about TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS models (
  id TEXT PRIMARY KEY, session TEXT NOT NULL, owner TEXT NOT NULL, created REAL NOT NULL, seen REAL NOT NULL,
  digest TEXT NOT NULL, snapshot INTEGER NOT NULL, ended INTEGER NOT NULL, about TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS samplers (
  id TEXT PRIMARY KEY, session TEXT NOT NULL, owner TEXT NOT NULL, created REAL NOT NULL, digest TEXT NOT NULL,
  path TEXT);
CREATE TABLE IF NOT EXISTS calls (
  model TEXT NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL, digest TEXT NOT NULL, type TEXT NOT NULL,
  body BLOB, state TEXT NOT NULL, result BLOB, PRIMARY KEY (model, seq));
CREATE TABLE IF NOT EXISTS checkpoints (
  path TEXT PRIMARY KEY, owner TEXT NOT NULL, model TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL,
  created REAL NOT NULL, bytes INTEGER NOT NULL, expires REAL, public INTEGER NOT NULL, about TEXT NOT NULL);
"""
# Why a journal cannot be carried on with, by the entry that differs.
_OTHER = {
    "form": "is the journal of another version of stepjax; choose another --train-folder",
    "base": "is the journal of another base model or --dtype; serve that one, or choose another --train-folder",
    "weights": "is the journal of adapters that were trained on other weights (fingerprint {found}) than the served "
    "model has ({expected}), though the configuration is the same; serve the checkpoint that they were trained on, "
    "or choose another --train-folder",
}


@dataclass(frozen=True)
class JournalRow:
    """A row of a table; JSON columns are read."""

    fields: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.fields[name]
        except KeyError:
            raise AttributeError(name) from None


class Journal:
    """The file. Rows are dictionaries of their columns."""

    def __init__(self, path: Path, *, identity: str, weights: str):
        """
        Args:
          identity: of the base model's configuration and dtype; a journal of another one is refused.
          weights: a digest of the base model's weights; a journal of other ones is refused.

        Raises:
          ConfigError: the file is of another form, or of another base model.
        """
        self._lock = threading.Lock()
        self._file = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._file.row_factory = sqlite3.Row
        try:
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=FULL")
            self._file.executescript(_TABLES)
            self._check(path, {"form": str(FORM), "base": identity, "weights": weights})
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"{path}: is no journal of a training service ({error})") from None

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def insert(self, table: str, **values: Any) -> None:
        """Add a row; one with the same key is replaced."""
        values = {name: json.dumps(value) if name == "about" else value for name, value in values.items()}
        marks = ", ".join("?" * len(values))
        self._run(f"INSERT OR REPLACE INTO {table} ({', '.join(values)}) VALUES ({marks})", *values.values())

    def update(self, table: str, where: dict[str, Any], **values: Any) -> None:
        """Change columns of the rows that ``where`` names."""
        values = {name: json.dumps(value) if name == "about" else value for name, value in values.items()}
        changes, condition = (" = ?, ".join(values) + " = ?", " = ? AND ".join(where) + " = ?")
        self._run(f"UPDATE {table} SET {changes} WHERE {condition}", *values.values(), *where.values())

    def delete(self, table: str, **where: Any) -> None:
        self._run(f"DELETE FROM {table} WHERE {' = ? AND '.join(where)} = ?", *where.values())

    def rows(self, table: str, order: str = "rowid", **where: Any) -> list[JournalRow]:
        """The rows with these values, in an order."""
        condition = f" WHERE {' = ? AND '.join(where)} = ?" if where else ""
        with self._lock:
            cursor = self._file.execute(f"SELECT * FROM {table}{condition} ORDER BY {order}", [*where.values()])
            return [_row(item) for item in cursor.fetchall()]

    def row(self, table: str, **where: Any) -> JournalRow | None:
        return next(iter(self.rows(table, **where)), None)

    def calls(self, model: str) -> list[JournalRow]:
        """The calls of a model in their order, without bodies and results."""
        with self._lock:
            cursor = self._file.execute(
                "SELECT model, seq, kind, digest, type, state FROM calls WHERE model = ? ORDER BY seq", [model]
            )
            return [_row(item) for item in cursor.fetchall()]

    def forget_bodies(self, model: str, upto: int, *, but: Sequence[int] = ()) -> None:
        """Note that a snapshot has the model after call ``upto``, and drop the bodies of the calls until then.

        Args:
          but: calls whose bodies are kept.
        """
        kept = f" AND seq NOT IN ({', '.join('?' * len(but))})" if but else ""
        with self._lock:
            self._file.execute("BEGIN IMMEDIATE")
            self._file.execute("UPDATE models SET snapshot = ? WHERE id = ?", [upto, model])
            self._file.execute(f"UPDATE calls SET body = NULL WHERE model = ? AND seq <= ?{kept}", [model, upto, *but])
            self._file.execute("COMMIT")

    def checkpoint_bytes(self, owner: str) -> int:
        """Bytes of an owner's checkpoints."""
        with self._lock:
            cursor = self._file.execute("SELECT coalesce(sum(bytes), 0) FROM checkpoints WHERE owner = ?", [owner])
            return int(cursor.fetchone()[0])

    def expired(self) -> list[JournalRow]:
        """Checkpoints whose time is over."""
        with self._lock:
            cursor = self._file.execute("SELECT * FROM checkpoints WHERE expires <= ?", [time.time()])
            return [_row(item) for item in cursor.fetchall()]

    def _run(self, statement: str, *values: Any) -> None:
        with self._lock:
            self._file.execute(statement, values)

    def _check(self, path: Path, expected: dict[str, str]) -> None:
        """Compare what the journal is of with what is served; a new journal, or an entry that it lacks, is written."""
        stored = dict(self._about())
        for name, value in expected.items():
            if stored.setdefault(name, value) != value:
                raise ConfigError(f"{path}: {_OTHER[name].format(found=stored[name], expected=value)}")
        for name, value in expected.items():
            self.insert("about", name=name, value=value)

    def _about(self) -> Iterator[tuple[str, str]]:
        for item in self._file.execute("SELECT name, value FROM about").fetchall():
            yield item["name"], item["value"]


def _row(item: sqlite3.Row) -> JournalRow:
    fields = {name: item[name] for name in item.keys()}  # noqa: SIM118  (of sqlite3, which iterates over values)
    if isinstance(fields.get("about"), str):
        fields["about"] = json.loads(fields["about"])
    return JournalRow(fields)
