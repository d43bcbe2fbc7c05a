"""What every request passes before an endpoint sees it: its id and the log, and the keys."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import quote

from stepjax.infer.serve.errors import ApiError

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
AsgiMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[AsgiMessage]]
Send = Callable[[AsgiMessage], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Refuse = Callable[[Scope, Receive, Send, ApiError], Awaitable[None]]  # answers a request with an error

HEALTH_PATHS = ("/health", "/health/ready", "/health/live")  # polled by monitors: logged at debug only
BODY_READ = "stepjax.body_read"  # in a scope: whether the connection is free for the next request
OPEN_PATHS = ("/", *HEALTH_PATHS)  # need no key
QUIET_PATHS = (*HEALTH_PATHS, "/metrics")  # of the last, a failure is logged at info
_GIVEN_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class RequestLog:
    """Gives each request an id, and logs its status and duration.

    Bodies, keys and queries are not logged, and paths are quoted, so that none holds control characters.
    """

    def __init__(self, app: App):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = _GIVEN_ID.fullmatch(headers.get(b"x-request-id", b"").decode("latin-1"))
        id = given[0] if given else secrets.token_hex(12)
        status, began = 0, time.monotonic()

        async def send_with_id(message: AsgiMessage) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            seconds = time.monotonic() - began
            path = quote(scope["path"][:200])
            quiet = scope["path"] in (QUIET_PATHS if status < 400 else HEALTH_PATHS)
            level = logging.DEBUG if quiet else logging.INFO
            log.log(level, "request id=%s %s %s status=%d seconds=%.3f", id, scope["method"], path, status, seconds)


class Failures:
    """Answers a request whose handling failed with status 500. The error ends here: the server would close the
    connection, which a client may have begun to use for its next request.
    """

    def __init__(self, app: App, refuse: Refuse):
        self._app, self._refuse = app, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = ended = False

        async def watched(message: AsgiMessage) -> None:
            nonlocal begun, ended
            begun = begun or message["type"] == "http.response.start"
            ended = ended or (message["type"] == "http.response.body" and not message.get("more_body"))
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if begun and not ended:
                raise  # the client can tell from the closed connection that the rest is missing
            log.exception("%s %s failed", scope["method"], quote(scope["path"][:200]))
            if not begun:
                await self._refuse(scope, receive, send, ApiError.of(error))


class HeadRequests:
    """Answers a HEAD request as GET; the server keeps the body back."""

    def __init__(self, app: App):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


class Access:
    """Refuses a request whose API key is missing or wrong, before anything of its body is read."""

    def __init__(self, app: App, keys: ApiKeys, refuse: Refuse, *, open_prefixes: tuple[str, ...] = ()):
        """
        Args:
          open_prefixes: paths that begin so need no key, as those of `OPEN_PATHS`.
        """
        self._app, self._keys, self._refuse, self._open_prefixes = app, keys, refuse, open_prefixes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        locked = scope["type"] == "http" and self._keys and scope["path"] not in OPEN_PATHS
        locked = locked and not scope["path"].startswith(self._open_prefixes or ("\0",))
        if locked and scope["method"] != "OPTIONS" and not self._keys.accept(key_of(dict(scope["headers"]))):
            error = ApiError("the API key is missing or wrong", status=401, code="invalid_api_key")
            await self._refuse(scope, receive, send, error)
        else:
            await self._app(scope, receive, send)


def key_of(headers: dict[bytes, bytes]) -> bytes:
    """The key of a request, in the header of OpenAI's clients or in that of Anthropic's and Tinker's."""
    kind, _, key = headers.get(b"authorization", b"").partition(b" ")
    return key.strip() if kind.lower() == b"bearer" else headers.get(b"x-api-key", b"").strip()


class ApiKeys:
    """The API keys of a server. Only their digests are kept, and they are compared in constant time."""

    def __init__(self, keys: Iterable[str]):
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, key: bytes) -> bool:
        """Whether this is one of the keys; compares with all of them in any case."""
        given, accepted = _digest(key), False
        for digest in self._digests:
            accepted |= hmac.compare_digest(given, digest)
        return accepted


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
