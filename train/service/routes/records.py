"""Endpoints of what was trained: runs, and the checkpoints that were saved."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request, Response

from stepjax.infer.serve.middleware import ApiKeys
from stepjax.infer.serve.replies import json_response
from stepjax.train.service.journal import JournalRow
from stepjax.train.service.registry import KINDS, checked_ttl, checkpoint_path
from stepjax.train.service.requests import only, string
from stepjax.train.service.routes.reading import json_body, owner_of
from stepjax.train.service.routes.sessions import page_of
from stepjax.train.service.training_service import TrainingService
from stepjax.train.service.wire.tensors import bad


def add_records(routes: APIRouter, service: TrainingService, keys: ApiKeys) -> None:
    """Add the endpoints."""
    _add_runs(routes, service, keys)
    _add_checkpoints(routes, service, keys)


def _add_runs(routes: APIRouter, service: TrainingService, keys: ApiKeys) -> None:
    registry = service.shared.registry

    @routes.get("/training_runs")
    async def training_runs(request: Request) -> Response:
        """The models of a key, the latest first."""
        limit, offset = page_of(request, 20)
        if "project_id" in request.query_params:
            raise bad("project_id", "is given, but this server has no projects; leave it out")
        owner = owner_of(request, keys)
        rows = await asyncio.to_thread(lambda: registry.journal.rows("models", order="created DESC", owner=owner))
        page = rows[offset : offset + limit]
        runs = await asyncio.to_thread(lambda: [_run(service, row) for row in page])
        return json_response({"training_runs": runs, "cursor": _cursor(limit, offset, len(rows))})

    @routes.get("/checkpoints")
    async def checkpoints(request: Request) -> Response:
        """All checkpoints of a key, the latest first."""
        limit, offset = page_of(request, 100)
        rows = await asyncio.to_thread(registry.checkpoints, owner_of(request, keys))
        page = [_checkpoint(row) for row in rows[offset : offset + limit]]
        return json_response({"checkpoints": page, "cursor": _cursor(limit, offset, len(rows))})

    @routes.get("/billing/usage/checkpoints/current")
    async def storage(request: Request) -> Response:
        """What the checkpoints of a key take on the disk. Nothing is billed."""
        rows = await asyncio.to_thread(registry.checkpoints, owner_of(request, keys))
        size = sum(row.bytes for row in rows)
        used = {"checkpoint_count": len(rows), "size_bytes": size, "size_gigabytes": size / 1e9}
        return json_response({"data": [used] if rows else []})

    @routes.get("/training_runs/{id}/checkpoints")
    async def checkpoints_of_run(request: Request, id: str) -> Response:
        """The checkpoints of a model."""
        owner = owner_of(request, keys)
        await asyncio.to_thread(registry.model, id, owner)
        rows = await asyncio.to_thread(registry.checkpoints, owner, id)
        return json_response({"checkpoints": [_checkpoint(row) for row in rows]})

    @routes.get("/training_runs/{id}")
    async def training_run(request: Request, id: str) -> Response:
        """One model."""
        row = await asyncio.to_thread(registry.model, id, owner_of(request, keys))
        return json_response(await asyncio.to_thread(_run, service, row))

    @routes.post("/weights_info")
    async def weights_info(request: Request) -> Response:
        """What a checkpoint can be loaded as."""
        given = json_body(request)
        only(given, "tinker_path")
        row = await asyncio.to_thread(registry.checkpoint, string(given, "tinker_path"), owner_of(request, keys))
        return json_response(
            {
                "base_model": service.shared.names[0],
                "is_lora": True,
                "lora_rank": row.about["lora"]["rank"],
                "optimizer_config": {"type": "adamw"},
                **row.about["parts"],
            }
        )


def _add_checkpoints(routes: APIRouter, service: TrainingService, keys: ApiKeys) -> None:
    registry, place = service.shared.registry, "/training_runs/{id}/checkpoints/{kind}/{name}"

    async def own(request: Request, id: str, kind: str, name: str) -> JournalRow:
        if kind not in KINDS:
            raise bad("path", f"is of kind {kind[:40]!a}, expected one of {', '.join(KINDS)}")
        path = checkpoint_path(id, kind, name)
        return await asyncio.to_thread(registry.own_checkpoint, path, owner_of(request, keys))

    @routes.delete(place)
    async def delete(request: Request, id: str, kind: str, name: str) -> Response:
        """Remove a checkpoint. Answers that use it end with it."""
        row = await own(request, id, kind, name)
        await service.delete_checkpoint(row.path)
        return json_response({})

    @routes.put(f"{place}/ttl")
    async def ttl(request: Request, id: str, kind: str, name: str) -> Response:
        """How long a checkpoint is kept from now on."""
        row, given = await own(request, id, kind, name), json_body(request)
        only(given, "ttl_seconds")
        seconds = checked_ttl(given.get("ttl_seconds"))
        expires = None if seconds is None else datetime.now(UTC).timestamp() + seconds
        await asyncio.to_thread(lambda: registry.journal.update("checkpoints", {"path": row.path}, expires=expires))
        return json_response({})

    async def publish(request: Request, id: str, kind: str, name: str, public: int) -> Response:
        row = await own(request, id, kind, name)
        await asyncio.to_thread(lambda: registry.journal.update("checkpoints", {"path": row.path}, public=public))
        return json_response({})

    @routes.post(f"{place}/publish")
    async def published(request: Request, id: str, kind: str, name: str) -> Response:
        """Let every key of this server read a checkpoint."""
        return await publish(request, id, kind, name, 1)

    @routes.delete(f"{place}/publish")
    async def unpublished(request: Request, id: str, kind: str, name: str) -> Response:
        """Let no other key read a checkpoint."""
        return await publish(request, id, kind, name, 0)


def _run(service: TrainingService, row: JournalRow) -> dict[str, Any]:
    checkpoints = service.shared.registry.checkpoints(row.owner, row.id)
    latest = {kind: next((item for item in checkpoints if item.kind == kind), None) for kind in KINDS}
    weights, sampler = latest["weights"], latest["sampler_weights"]
    return {
        "training_run_id": row.id,
        "base_model": service.shared.names[0],
        "model_owner": row.owner or "local",
        "is_lora": True,
        "corrupted": False,
        "lora_rank": row.about["lora"]["rank"],
        "last_request_time": _time(row.seen),
        "last_checkpoint": None if weights is None else _checkpoint(weights),
        "last_sampler_checkpoint": None if sampler is None else _checkpoint(sampler),
        "user_metadata": row.about.get("user_metadata") or None,
    }


def _checkpoint(row: JournalRow) -> dict[str, Any]:
    return {
        "checkpoint_id": f"{row.kind}/{row.name}",
        "checkpoint_type": KINDS[row.kind],
        "time": _time(row.created),
        "tinker_path": row.path,
        "size_bytes": row.bytes,
        "public": bool(row.public),
        "user_metadata": row.about.get("user_metadata") or None,
        "expires_at": None if row.expires is None else _time(row.expires),
    }


def _cursor(limit: int, offset: int, total: int) -> dict[str, int]:
    return {"offset": offset, "limit": limit, "total_count": total}


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
