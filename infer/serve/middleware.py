"""What every request passes before an endpoint sees it: ids, keys and the log, then the checks of its body."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import math
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from typing import Any, NoReturn
from urllib.parse import quote

from stepjax.infer.serve.errors import ApiError
from stepjax.infer.serve.limits import LIMITS

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Refuse = Callable[[Scope, Receive, Send, ApiError], Awaitable[None]]  # answers a request with an error

OPEN_PATHS = ("/", "/health", "/health/ready", "/health/live")  # need no key
QUIET_PATHS = (
    "/health",
    "/health/ready",
    "/health/live",
    "/metrics",
)  # polled by monitors; not logged unless they fail
_GIVEN_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)

_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[{]|[\]}]', re.DOTALL)
_SUSPECT = re.compile(rb"\\u(?:[dD][89a-fA-F]|0000)")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_MAX_DIGITS = 400  # of an integer; the longest finite float has 309


class Access:
    """Gives each request an id, refuses a wrong API key, and logs the status and duration.

    Bodies, keys and queries are not logged, and paths are quoted, so that none holds control characters.
    """

    def __init__(self, app: App, keys: ApiKeys, refuse: Refuse):
        self._app, self._keys, self._refuse = app, keys, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = _GIVEN_ID.fullmatch(headers.get(b"x-request-id", b"").decode("latin-1"))
        id = given[0] if given else secrets.token_hex(12)
        status, began = 0, time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", id.encode())]
            await send(message)

        try:
            locked = self._keys and scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS"
            if locked and not self._keys.accept(_key(headers)):
                error = ApiError("the API key is missing or wrong", status=401, code="invalid_api_key")
                await self._refuse(scope, receive, send_with_id, error)
            else:
                await self._app(scope, receive, send_with_id)
        finally:
            seconds = time.monotonic() - began
            path = quote(scope["path"][:200])
            level = logging.DEBUG if scope["path"] in QUIET_PATHS and status < 400 else logging.INFO
            log.log(level, "request id=%s %s %s status=%d seconds=%.3f", id, scope["method"], path, status, seconds)


def _key(headers: dict[bytes, bytes]) -> bytes:
    """The key of a request, in the header of OpenAI's clients or in that of Anthropic's."""
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


class StrictBodies:
    """Reads the body of every request that may have one, checks it, and passes it on."""

    def __init__(self, app: App, refuse: Refuse):
        self._app, self._refuse = app, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            headers = dict(scope["headers"])
            body = await _read(headers, receive)
            if body is None:  # the client has disconnected
                return
            if body:
                _check_type(headers)
                check_json(body)
        except ApiError as error:
            await self._refuse(scope, receive, send, error)
            return
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()  # only the disconnect can follow
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)


async def _read(headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
    """The whole body, no longer than allowed; None if the client disconnected before its end."""
    most = int(LIMITS["body_bytes"].high)
    declared = headers.get(b"content-length", b"0")
    if not declared.isdigit() or int(declared[:20]) > most:
        raise _too_large(most)
    if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"identity", b""):
        raise ApiError("content-encoding: expected none; send the body as it is", code="unsupported_encoding")
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > most:
            raise _too_large(most)
        if not message.get("more_body"):
            return bytes(body)


def _too_large(most: int) -> ApiError:
    return ApiError(f"body: expected at most {most} bytes", status=413, code="request_too_large")


def _check_type(headers: dict[bytes, bytes]) -> None:
    """Raise ApiError unless the type is JSON: a browser sends JSON across origins only after a preflight request."""
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json":
        name = ascii(kind.decode("latin-1")[:60])
        raise ApiError(f"content-type: is {name}, expected application/json", code="unsupported_media_type")


def check_json(body: bytes) -> None:
    """Raise ApiError unless a body is a JSON object that every parser reads alike.

    Beyond the rules of JSON, it refuses repeated keys, numbers that are not finite or longer than ``_MAX_DIGITS``, lone
    surrogates, the character NUL, and deep nesting.
    """
    most = int(LIMITS["json_depth"].high)
    if _depth(body, most) > most:
        raise _bad(f"expected at most {most} levels of nesting")
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_not_finite,
            parse_float=_finite,
            parse_int=_integer,
        )
    except UnicodeDecodeError as error:
        raise _bad(f"expected UTF-8, found byte {body[error.start]:#04x} at {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise _bad(f"expected JSON ({error})") from None
    if not isinstance(value, dict):
        raise _bad(f"expected an object, found {type(value).__name__}")
    if _SUSPECT.search(body):
        for text in _strings(value):
            if character := _NO_TEXT.search(text):
                raise _bad(f"expected text, found the character U+{ord(character[0]):04X}")


def _depth(body: bytes, most: int) -> int:
    """Levels of brackets, or the first number past ``most``."""
    level = deepest = 0
    for token in _BRACKETS.finditer(body):
        if token[0] in b"[{":
            level += 1
            deepest = max(deepest, level)
            if deepest > most:
                break
        elif token[0] in b"]}":
            level -= 1
    return deepest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _bad(f"{twice[:60]!a} is given twice")
    return fields


def _not_finite(text: str) -> NoReturn:
    raise _bad(f"expected finite numbers, found {text}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _not_finite(text[:60])
    return value


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise _bad(f"expected numbers of at most {_MAX_DIGITS} digits, found one of {len(text)}")
    return int(text)


def _strings(value: Any) -> Iterator[str]:
    """All strings, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _bad(message: str) -> ApiError:
    return ApiError(f"body: {message}", code="invalid_json")
