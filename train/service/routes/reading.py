"""What the endpoints share: whose a request is, its body, and answers."""

from __future__ import annotations

import hashlib
from typing import Any

from fastapi import Request

from stepjax.infer.serve.bodies import PARSED
from stepjax.infer.serve.errors import ApiError
from stepjax.infer.serve.middleware import ApiKeys, Scope, key_of
from stepjax.train.service.limits import MAX_BODY_BYTES


def owner_of(request: Request, keys: ApiKeys) -> str:
    """Whose a request is: a digest of its key. A server without keys has one owner, whatever key a client sends."""
    return owner_of_scope(request.scope, keys)


def owner_of_scope(scope: Scope, keys: ApiKeys) -> str:
    """`owner_of` before there is a request."""
    if not keys:
        return ""
    return hashlib.sha256(b"owner\0" + key_of(dict(scope["headers"]))).hexdigest()[:24]


def json_body(request: Request) -> dict[str, Any]:
    """The JSON object of a request."""
    if PARSED not in request.scope:
        raise ApiError("body: expected a JSON object, found nothing", code="invalid_json")
    return request.scope[PARSED]


async def raw_body(request: Request) -> bytes:
    """The body as it came, no longer than allowed."""
    too_large = ApiError(f"body: expected at most {MAX_BODY_BYTES} bytes", status=413, code="request_too_large")
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared[:20]) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise too_large
    return bytes(body)
