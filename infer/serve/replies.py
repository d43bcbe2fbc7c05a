"""Responses as JSON, among them errors and the state of the server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import Response

from stepjax.infer.serve.errors import ApiError, dialect_of
from stepjax.infer.serve.middleware import BODY_READ, Receive, Scope, Send
from stepjax.startup import Startup


def json_response(content: Any, headers: Mapping[str, str] | None = None, *, status: int = 200) -> Response:
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    data = data.encode("utf-8", "replace")
    return Response(data, status, dict(headers or {}), media_type="application/json")


def error_response(error: ApiError, path: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error in the form of the path's interface."""
    content = error.content(dialect_of(path))
    return json_response(content, {**(headers or {}), **error.headers}, status=error.status)


async def refuse(scope: Scope, receive: Receive, send: Send, error: ApiError) -> None:
    """Answer with an error before an endpoint sees the request. A body that was not read is not read at all."""
    response = error_response(error, scope["path"])
    if not scope.get(BODY_READ):
        response.headers["connection"] = "close"
    await response(scope, receive, send)


def warming_up(startup: Startup) -> ApiError:
    """Why no request is accepted yet."""
    running = [f"{stage.text} {stage.count}".strip() for stage in [*startup.stages] if stage.running]
    text = "; ".join(["the server is warming up", *running])
    return ApiError(text, status=503, code="warming_up", retry_after_s=2)


def readiness(startup: Startup, error: ApiError | None) -> Response:
    """The response of ``/health``: 200 and ``"stage": "ready"``, or what keeps the server from answering.

    Args:
      error: what a request would get; None: it would be answered.
    """
    if error is None:
        return json_response({"status": "ok", "stage": "ready"})
    state = startup.as_dict() if error.code == "warming_up" else {"stage": error.code}
    return json_response({"status": "unavailable", **state, **error.content()}, error.headers, status=error.status)
