"""Downloads of checkpoints: signed addresses that need no key, each good for a while."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse

from stepjax.adapters.peft import CONFIG, WEIGHTS
from stepjax.infer.serve.middleware import ApiKeys
from stepjax.infer.serve.replies import json_response
from stepjax.train.service.registry import KINDS, checkpoint_path, not_found, split_path
from stepjax.train.service.routes.reading import owner_of
from stepjax.train.service.training_service import TrainingService
from stepjax.train.service.wire.tensors import bad

FILES_PREFIX = "/api/v1/files/"
SIGNED_S = 3600
SERVED = (CONFIG, WEIGHTS)  # a PEFT folder


def add_files(routes: APIRouter, service: TrainingService, keys: ApiKeys) -> None:
    """Add the endpoints."""
    registry = service.shared.registry

    def signature(path: str, file: str, expires: int) -> str:
        return hmac.new(service.url_key, f"{path}\0{file}\0{expires}".encode(), hashlib.sha256).hexdigest()

    @routes.get("/training_runs/{id}/checkpoints/{kind}/{name}/external_weights_urls")
    async def external_weights_urls(request: Request, id: str, kind: str, name: str) -> Response:
        """An address for each file of a checkpoint as a PEFT folder."""
        if kind not in KINDS:
            raise bad("path", f"is of kind {kind[:40]!a}, expected one of {', '.join(KINDS)}")
        path = checkpoint_path(id, kind, name)
        await asyncio.to_thread(registry.checkpoint, path, owner_of(request, keys))
        expires = int(time.time()) + SIGNED_S
        root = str(request.base_url).rstrip("/")
        place = "/".join(quote(part, safe="") for part in (id, kind, name))
        urls = {
            file: f"{root}{FILES_PREFIX}{expires}/{signature(path, file, expires)}/{place}/{file}" for file in SERVED
        }
        return json_response({"urls": urls, "expires": datetime.fromtimestamp(expires, UTC).isoformat()})

    @routes.get("/files/{expires}/{signed}/{id}/{kind}/{name}/{file}")
    async def download(expires: str, signed: str, id: str, kind: str, name: str, file: str) -> Response:
        """One file of a checkpoint."""
        path = checkpoint_path(id, kind, name)
        number = int(expires) if expires.isdigit() and len(expires) < 12 else 0
        good = hmac.compare_digest(signature(path, file, number).encode(), signed.encode())
        if not good or number < time.time() or file not in SERVED:
            raise not_found("file")
        split_path(path)
        target: Path = registry.checkpoint_folder(path) / file
        if not await asyncio.to_thread(target.is_file):
            raise not_found("file")
        return FileResponse(target, media_type="application/octet-stream", filename=file)
