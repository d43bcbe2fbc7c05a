"""The chat page: one file, sent with a policy that lets it load nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Response

from stepjax.infer.serve.api import Api

_FILE = Path(__file__).with_name("page.html")


def router(api: Api) -> APIRouter:
    """The page, unless the server is to have none."""
    routes = APIRouter()
    if api.options.ui:

        @routes.get("/", include_in_schema=False)
        async def chat_page() -> Response:
            body, headers = page()
            return Response(body, headers=headers, media_type="text/html")

    return routes


@cache
def page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers, which allow its own script and style by their hashes and nothing else."""
    text = _FILE.read_text(encoding="utf-8")
    policy = {
        "default-src": "'none'",
        "script-src": _hashes("script", text),
        "style-src": _hashes("style", text),
        "style-src-attr": "'none'",
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return text.encode(), headers


def _hashes(tag: str, text: str) -> str:
    digests = [hashlib.sha256(body.encode()).digest() for body in re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)]
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
