"""Endpoints of the hosted service that this one lacks: each is refused by name, with what to do instead."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Response

from stepjax.infer.serve.errors import ApiError
from stepjax.infer.serve.middleware import ApiKeys
from stepjax.train.service.training_service import TrainingService

_PROJECTS = "this server has no projects; each key has its own sessions and checkpoints"
# Path, methods, and why it is not served.
UNSERVED = (
    ("/sessions/search", ["POST"], "sessions are not searched here; list them (list_sessions, get_session)"),
    ("/sessions/{id}/project", ["PUT"], _PROJECTS),
    ("/sessions/{id}/trace_export", ["GET"], "traces are not kept here; /metrics has what the server counts"),
    ("/copy_weights", ["POST"], f"{_PROJECTS}. Publish a checkpoint to let other keys read it"),
    ("/audit", ["GET"], "no audit log is kept here; the server's log has a line for each request"),
    ("/billing/usage/events", ["GET"], "nothing is billed here; /metrics has what the server counts"),
    (
        "/create_custom_loss",
        ["POST"],
        "losses are not stored here; forward_backward_custom takes a function",
    ),
    ("/auth/token", ["POST"], "keys are not exchanged for tokens here; send the key with each request"),
    ("/auth/apikey/me", ["GET", "DELETE"], "keys belong to the operator here (--api-key)"),
    ("/join_sampling_session", ["POST"], "samplers are opened by create_sampling_session here"),
    ("/retrieve_futures", ["POST"], "promises are fetched one by one here, by retrieve_future"),
    ("/cancel_future", ["POST"], "requests are not cancelled one by one here; end the session"),
)


def add_unserved(routes: APIRouter, service: TrainingService, keys: ApiKeys) -> None:
    """Add the endpoints."""
    del service, keys
    for path, methods, reason in UNSERVED:
        routes.add_api_route(path, _refusal(path, reason), methods=methods, include_in_schema=False)


def _refusal(path: str, reason: str) -> Callable[[], Awaitable[Response]]:
    async def refused() -> Response:
        name = next(part for part in reversed(path.split("/")) if not part.startswith("{"))
        raise ApiError(f"{name}: {reason}", status=404, code="not_served")

    return refused
