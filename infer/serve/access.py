"""Who may ask, and the line that each request leaves in the log."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from urllib.parse import quote

from stepjax.infer.serve.api_errors import ApiError
from stepjax.infer.serve.body import App, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

OPEN_PATHS = ("/", "/health")  # that need no key
QUIET_PATHS = ("/health", "/metrics")  # that are asked for again and again
_GIVEN_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)

Refuse = Callable[[Scope, Receive, Send, ApiError], Awaitable[None]]


class Keys:
    """The keys of a server. Only their digests are kept, and compared in constant time."""

    def __init__(self, keys: Iterable[str]):
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, key: bytes) -> bool:
        """Compares with every key, whichever it is."""
        given, found = _digest(key), False
        for digest in self._digests:
            found |= hmac.compare_digest(given, digest)
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Access:
    """Gives each request an id, lets it pass if its key is one of the server's, and logs what became of it.

    Neither bodies nor keys are logged, nor the query, and of a path nothing that a terminal would obey.
    """

    def __init__(self, app: App, keys: Keys, refuse: Refuse):
        self._app, self._keys, self._refuse = app, keys, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = _GIVEN_ID.fullmatch(headers.get(b"x-request-id", b"").decode("latin-1"))
        id = given[0] if given else secrets.token_hex(12)
        status, began = 0, time.monotonic()

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", id.encode())]
            await send(message)

        try:
            locked = self._keys and scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS"
            if locked and not self._keys.accept(_key(headers)):
                error = ApiError("the API key is missing or wrong", status=401, code="invalid_api_key")
                await self._refuse(scope, receive, noted, error)
            else:
                await self._app(scope, receive, noted)
        finally:
            seconds = time.monotonic() - began
            path = quote(scope["path"][:200])
            level = logging.DEBUG if scope["path"] in QUIET_PATHS and status < 400 else logging.INFO
            log.log(level, "request id=%s %s %s status=%d seconds=%.3f", id, scope["method"], path, status, seconds)


def _key(headers: dict[bytes, bytes]) -> bytes:
    """The key that a request carries, as OpenAI's clients send it or as Anthropic's do."""
    kind, _, key = headers.get(b"authorization", b"").partition(b" ")
    return key.strip() if kind.lower() == b"bearer" else headers.get(b"x-api-key", b"").strip()
