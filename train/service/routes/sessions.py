"""Endpoints of sessions, and of what the server can do."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from stepjax.infer.serve.middleware import ApiKeys
from stepjax.infer.serve.replies import json_response
from stepjax.train.losses.target_losses import TARGET_LOSSES
from stepjax.train.service.checks import TEACHER_LOSSES
from stepjax.train.service.requests import integer, metadata, only, string
from stepjax.train.service.routes.reading import json_body, owner_of
from stepjax.train.service.training_service import TrainingService
from stepjax.train.service.wire.calls import has_zstd
from stepjax.train.service.wire.tensors import bad


def add_sessions(routes: APIRouter, service: TrainingService, keys: ApiKeys) -> None:
    """Add the endpoints."""
    registry = service.shared.registry

    @routes.get("/healthz")
    async def healthz() -> Response:
        """Whether the server answers."""
        service.shared.service.check_open()
        return json_response({"status": "ok"})

    @routes.get("/get_server_capabilities")
    async def get_server_capabilities() -> Response:
        """The models, and how long their sequences may be."""
        most = service.shared.room.context
        models = [
            {"model_name": name, "max_context_length": most, "trainable": True, "sampleable": True}
            for name in service.shared.names
        ]
        losses = [*TARGET_LOSSES, *TEACHER_LOSSES]
        return json_response({"supported_models": models, "losses": losses, "tokenizer_id": service.tokenizer or None})

    @routes.post("/client/config")
    async def client_config() -> Response:
        """How clients are to send their requests."""
        return json_response({"parallel_fwdbwd_chunks": True, "proto_compress_fwdbwd": has_zstd()})

    @routes.post("/client/dynamic_config")
    async def dynamic_config() -> Response:
        """The same, for what may change while a client runs."""
        return json_response({"refresh_interval_sec": 300, "sample_cancel_enabled": False})

    @routes.post("/telemetry")
    async def telemetry() -> Response:
        """Clients report on themselves here. Nothing is kept."""
        return json_response({"status": "accepted"})

    @routes.post("/create_session")
    async def create_session(request: Request) -> Response:
        """A session, to which models and samplers belong."""
        owner, given = owner_of(request, keys), json_body(request)
        only(given, "tags", "user_metadata", "sdk_version", "project_id", "display_name")
        tags, name = given.get("tags") or [], given.get("display_name")
        if not isinstance(tags, list) or len(tags) > 64 or not all(isinstance(tag, str) for tag in tags):
            raise bad("tags", "expected a list of at most 64 texts")
        if name is not None and not isinstance(name, str):
            raise bad("display_name", "expected a text")
        about = {"user_metadata": metadata(given), "tags": tags, "display_name": None if name is None else name[:200]}
        token = request.headers.get("x-idempotency-key", "")[:200]
        row = await asyncio.to_thread(registry.open_session, owner, token, about)
        service.heard(row.id)
        return json_response({"type": "create_session", "session_id": row.id})

    @routes.post("/session_heartbeat")
    async def session_heartbeat(request: Request) -> Response:
        """A sign of life, without which a session's memory is given back after some minutes."""
        owner, given = owner_of(request, keys), json_body(request)
        session = string(given, "session_id")
        await asyncio.to_thread(lambda: registry.session(session, owner, running=True))
        service.heard(session)
        return json_response({"type": "session_heartbeat"})

    @routes.post("/sessions/{id}/finish")
    async def finish(request: Request, id: str) -> Response:
        """End a session: its memory is given back, what it saved stays."""
        owner, given = owner_of(request, keys), json_body(request)
        reason = given.get("reason")
        kind = reason.get("type") if isinstance(reason, dict) else reason
        row = await asyncio.to_thread(registry.session, id, owner)
        if row.ended is None:  # the first reason counts
            await service.end_session(id, str(kind or "success")[:40])
        return json_response({"type": "finish_session"})

    @routes.get("/sessions")
    async def sessions(request: Request) -> Response:
        """The sessions of a key, the latest first."""
        limit, offset = page_of(request, 20)
        rows = await asyncio.to_thread(
            lambda: registry.journal.rows("sessions", order="created DESC", owner=owner_of(request, keys))
        )
        return json_response({"sessions": [row.id for row in rows[offset : offset + limit]]})

    @routes.get("/sessions/{id}")
    async def session(request: Request, id: str) -> Response:
        """The models and samplers of a session."""
        owner, journal = owner_of(request, keys), registry.journal
        row = await asyncio.to_thread(registry.session, id, owner)
        models = await asyncio.to_thread(lambda: journal.rows("models", session=id, owner=owner))
        samplers = await asyncio.to_thread(lambda: journal.rows("samplers", session=id, owner=owner))
        return json_response(
            {
                "training_run_ids": [model.id for model in models],
                "sampler_ids": [sampler.id for sampler in samplers],
                "user_metadata": row.about.get("user_metadata") or None,
                "display_name": row.about.get("display_name"),
            }
        )


def page_of(request: Request, default: int) -> tuple[int, int]:
    """Limit and offset of a list."""
    values: dict[str, int | str] = {}
    for name, text in (("limit", str(default)), ("offset", "0")):
        text = request.query_params.get(name, text)
        values[name] = int(text) if text.isdigit() and len(text) < 10 else text
    return integer(values, "limit", low=1, high=10_000), integer(values, "offset")
