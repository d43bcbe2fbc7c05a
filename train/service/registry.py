"""Sessions, models, samplers and checkpoints by their ids, as the journal has them, for the owners they belong to."""

from __future__ import annotations

import re
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepjax.adapters.lora import LoraConfig
from stepjax.infer.serve.errors import ApiError
from stepjax.train.service.journal import Journal, JournalRow
from stepjax.train.service.limits import TTL_S
from stepjax.train.service.state_files import remove_folder
from stepjax.train.service.wire.tensors import bad

SCHEME = "tinker://"
KINDS = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
HIDDEN = "~"  # begins the names of checkpoints that the service makes for a session
_NAME = re.compile(r"\w[\w.~-]{0,199}", re.ASCII)


def not_found(what: str) -> ApiError:
    return ApiError(f"{what}: is not here, or belongs to another key", status=404, code="not_found")


class Registry:
    """What exists, and whose it is. Owners are digests of keys; without keys all have one."""

    def __init__(self, journal: Journal, folder: Path):
        self.journal, self._folder = journal, folder

    # Sessions.

    def open_session(self, owner: str, token: str, about: Mapping[str, Any]) -> JournalRow:
        """A new session, or the one that the same submission has opened before."""
        old = self.journal.row("sessions", owner=owner, token=token) if token else None
        if old is not None:
            return old
        now = time.time()
        id = secrets.token_hex(8)
        self.journal.insert(
            "sessions", id=id, owner=owner, created=now, seen=now, token=token or None, ended=None, about=dict(about)
        )
        return self.session(id, owner)

    def session(self, id: str, owner: str, *, running: bool = False) -> JournalRow:
        """A session of an owner.

        Args:
          running: refuse one that has ended.
        """
        row = self.journal.row("sessions", id=id, owner=owner)
        if row is None:
            raise not_found(f"session_id {id[:80]!a}")
        if running and row.ended is not None:
            raise ApiError(f"session_id {id[:80]!a}: the session has ended", status=410, code="session_ended")
        return row

    # Models.

    def model(self, id: str, owner: str) -> JournalRow:
        row = self.journal.row("models", id=id, owner=owner)
        if row is None:
            raise not_found(f"model_id {id[:120]!a}")
        return row

    def open_model(
        self, session: str, number: int, owner: str, *, config: LoraConfig, digest: str, about: Mapping[str, Any]
    ) -> str:
        """Enter a model; returns its id, which the client computes too."""
        id, now = model_id(session, number), time.time()
        described = {"rank": config.rank, "targets": list(config.targets), "experts": config.experts}
        self.journal.insert(
            "models",
            id=id,
            session=session,
            owner=owner,
            created=now,
            seen=now,
            digest=digest,
            snapshot=-1,
            ended=0,
            about={**about, "lora": {**described, "alpha": config.alpha, "expert_rank": config.expert_rank}},
        )
        return id

    def state_file(self, model: str) -> Path:
        return self._folder / "models" / _file_name(model) / "state.safetensors"

    def forget_model(self, model: str) -> None:
        """Remove a model's state, not its checkpoints."""
        shutil.rmtree(self.state_file(model).parent, ignore_errors=True)

    # Samplers.

    def open_sampler(self, session: str, number: int, owner: str, *, path: str | None, digest: str) -> JournalRow:
        """A sampling session; the same submission gets the same one."""
        id = f"{session}:sample:{number}"
        old = self.journal.row("samplers", id=id)
        if old is not None and (old.owner != owner or old.digest != digest):
            raise bad("sampling_session_seq_id", "was used for another sampling session")
        if old is None:
            now = time.time()
            self.journal.insert("samplers", id=id, session=session, owner=owner, created=now, digest=digest, path=path)
        return self.sampler(id, owner)

    def sampler(self, id: str, owner: str) -> JournalRow:
        row = self.journal.row("samplers", id=id, owner=owner)
        if row is None:
            raise not_found(f"sampling_session_id {id[:120]!a}")
        return row

    def owns_sampler(self, id: str | None, owner: str) -> bool:
        """Whether there is such a sampling session, and it is the owner's."""
        return id is not None and self.journal.row("samplers", id=id, owner=owner) is not None

    # Checkpoints.

    def enter_checkpoint(
        self, model: str, kind: str, name: str, owner: str, *, size: int, ttl_s: int | None, about: Mapping[str, Any]
    ) -> str:
        path, now = checkpoint_path(model, kind, name), time.time()
        self.journal.insert(
            "checkpoints",
            path=path,
            owner=owner,
            model=model,
            kind=kind,
            name=name,
            created=now,
            bytes=size,
            expires=None if ttl_s is None else now + ttl_s,
            public=0,
            about=dict(about),
        )
        return path

    def checkpoint(self, path: str, owner: str) -> JournalRow:
        """A checkpoint that an owner may read: an own one, or one that is published."""
        split_path(path)
        row = self.readable(path, owner)
        if row is None:
            raise not_found(path[:300])
        return row

    def readable(self, path: str, owner: str | None) -> JournalRow | None:
        """`checkpoint`, or None where it raises. Of no owner: one that is published."""
        row = self.journal.row("checkpoints", path=path)
        readable = row is not None and (row.owner == owner or row.public) and not _expired(row)
        return row if readable else None

    def own_checkpoint(self, path: str, owner: str) -> JournalRow:
        row = self.checkpoint(path, owner)
        if row.owner != owner:
            raise not_found(path[:300])
        return row

    def checkpoints(self, owner: str, model: str | None = None) -> list[JournalRow]:
        """The named checkpoints, the latest first."""
        where = {"owner": owner} if model is None else {"owner": owner, "model": model}
        rows = self.journal.rows("checkpoints", order="created DESC", **where)
        return [row for row in rows if not row.name.startswith(HIDDEN) and not _expired(row)]

    def checkpoint_folder(self, path: str) -> Path:
        model, kind, name = split_path(path)
        return self._folder / "checkpoints" / _file_name(model) / kind / name

    def delete_checkpoint(self, path: str) -> None:
        """Remove a checkpoint: its row first, so that no reader finds one that is half removed."""
        self.journal.delete("checkpoints", path=path)
        remove_folder(self.checkpoint_folder(path))


def model_id(session: str, number: int) -> str:
    """The id that the client itself computes after a load."""
    return f"{session}:train:{number}"


def checkpoint_path(model: str, kind: str, name: str) -> str:
    return f"{SCHEME}{model}/{kind}/{name}"


def split_path(path: str) -> tuple[str, str, str]:
    """Model, kind and name of a path.

    Raises:
      ApiError: it is none.
    """
    parts = path.removeprefix(SCHEME).split("/")
    if not path.startswith(SCHEME) or len(parts) != 3 or parts[1] not in KINDS:
        raise bad(
            "path", f"is {path[:200]!a}, expected {SCHEME}MODEL/weights/NAME or {SCHEME}MODEL/sampler_weights/NAME"
        )
    checked_name(parts[2].removeprefix(HIDDEN))
    if not re.fullmatch(r"[0-9a-f]{1,40}:train:\d{1,9}", parts[0]):
        raise not_found(path[:300])
    return parts[0], parts[1], parts[2]


def checked_name(name: str) -> str:
    """A checkpoint's name, which is a name of a folder."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise bad("path", f"the name is {str(name)[:80]!a}, expected letters, digits and _ . - ~, at most 200")
    return name


def checked_ttl(ttl_s: Any) -> int | None:
    """Seconds that a checkpoint is kept; None: for ever."""
    if ttl_s is None:
        return None
    if isinstance(ttl_s, bool) or not isinstance(ttl_s, int) or not TTL_S[0] <= ttl_s <= TTL_S[1]:
        raise bad("ttl_seconds", f"is {str(ttl_s)[:40]!a}, expected {TTL_S[0]} to {TTL_S[1]} seconds, or null")
    return ttl_s


def _file_name(model: str) -> str:
    return model.replace(":", ".")


def _expired(row: JournalRow) -> bool:
    return row.expires is not None and row.expires <= time.time()
