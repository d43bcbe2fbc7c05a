"""Bodies, checked before anything else looks at them: size, encoding, and JSON that means the same to every reader."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any, NoReturn

from stepjax.infer.serve.api_errors import ApiError
from stepjax.infer.serve.limits import LIMITS

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[{]|[\]}]', re.DOTALL)
_SUSPECT = re.compile(rb"\\u(?:[dD][89a-fA-F]|0000)")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_MAX_DIGITS = 400  # of a whole number; the longest finite float has 309


class StrictBodies:
    """Reads the body of every request that may have one, and hands it on once it is known to be good."""

    def __init__(self, app: App, refuse: Callable[[Scope, Receive, Send, ApiError], Awaitable[None]]):
        """``refuse`` answers a request with an error."""
        self._app, self._refuse = app, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            headers = dict(scope["headers"])
            body = await _read(headers, receive)
            if body is None:  # the client left
                return
            if body:
                _check_type(headers)
                check(body)
        except ApiError as error:
            await self._refuse(scope, receive, send, error)
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()  # nothing but the disconnect is left
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)


async def _read(headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
    """The whole body, no longer than allowed; None if the client left before its end."""
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
    """A web page elsewhere may send any other type to this machine without asking first."""
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json":
        found = ascii(kind.decode("latin-1")[:60])
        raise ApiError(f"content-type: is {found}, expected application/json", code="unsupported_media_type")


def check(body: bytes) -> None:
    """Raise ApiError unless a body is an object in JSON that every reader understands alike.

    Refused beyond what JSON itself forbids: repeated keys, numbers that are not finite or are absurdly long, lone
    surrogates, the character NUL, deep nesting.
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
            parse_int=_whole,
        )
    except UnicodeDecodeError as error:
        raise _bad(f"expected UTF-8, found byte {body[error.start]:#04x} at {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise _bad(f"expected JSON ({error})") from None
    if not isinstance(value, dict):
        raise _bad(f"expected an object, found {type(value).__name__}")
    if _SUSPECT.search(body):
        for text in _strings(value):
            if found := _NO_TEXT.search(text):
                raise _bad(f"expected text, found the character U+{ord(found[0]):04X}")


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
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _bad(f"{twice[:60]!a} is given twice")
    return found


def _not_finite(text: str) -> NoReturn:
    raise _bad(f"expected numbers that JSON has, found {text}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _not_finite(text[:60])
    return value


def _whole(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise _bad(f"expected numbers of at most {_MAX_DIGITS} digits, found one of {len(text)}")
    return int(text)


def _strings(value: Any) -> Iterator[str]:
    """All strings, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)


def _bad(message: str) -> ApiError:
    return ApiError(f"body: {message}", code="invalid_json")
