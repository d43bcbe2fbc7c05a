"""The body of a request: read within its limit, parsed as JSON that every parser reads alike, and validated, with its
fields looked up in the table of its interface.

What takes longer with a longer body is done in a thread, so that the event loop serves the other requests.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import re
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from stepjax.errors import StepjaxError
from stepjax.infer.serve.errors import ApiError, field_name
from stepjax.infer.serve.fields.dialects import FIELD_TABLES
from stepjax.infer.serve.fields.field_table import FieldTable
from stepjax.infer.serve.limits import LIMITS
from stepjax.infer.serve.middleware import BODY_READ, App, AsgiMessage, Receive, Refuse, Scope, Send

T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)

IGNORED = "x-stepjax-ignored"  # the header that names the fields without effect
_MAX_HEADER = 1000  # characters of its value
_READ_ONCE = {"messages", "system", "input", "prompt", "tokens"}  # fields of a body that no writer of an answer reads

INLINE_BYTES = 4096  # bodies up to here are parsed in the event loop, in less time than a thread takes to wake
PARSED = "stepjax.body"  # where the scope holds the parsed body
SIZE = "stepjax.body_bytes"
HELD = "stepjax.body_held"  # where the scope has a list of what is to be freed when the request has been answered

# A string, or what is left of one that does not end: its end is not sought again from every quote inside.
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_ALL_SQUARE = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SUSPECT = re.compile(rb"\\u(?:[dD][89a-fA-F]|0000)")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_HALVES = re.compile("[\ud800-\udfff]")
# Fields that hold what tools, models and other programs wrote. A client sends all of it again with each turn.
_WRITTEN = ("messages", "system", "input", "instructions", "prompt", "tools")
_MAX_DIGITS = 400  # of an integer; the longest finite float has 309


async def off_loop(size: int, work: Callable[..., T], *arguments: Any) -> T:
    """``work(*arguments)``, in a thread unless the body of ``size`` bytes is small."""
    if size <= INLINE_BYTES:
        return work(*arguments)
    return await asyncio.to_thread(bare, work, *arguments)


def bare(work: Callable[..., T], *arguments: Any) -> T:
    """``work(*arguments)`` for a thread. An error of the request leaves its frames and causes behind: freeing what they
    made of the body takes long.
    """
    try:
        return work(*arguments)
    except (ApiError, StepjaxError) as error:
        error.__cause__ = error.__context__ = None
        raise error.with_traceback(None)  # noqa: B904


class StrictBodies:
    """Reads the body of every request that may have one, parses it, and passes it on in the scope."""

    def __init__(
        self, app: App, refuse: Refuse, *, has_endpoint: Callable[[Scope], bool], raw_paths: Collection[str] = ()
    ):
        """
        Args:
          has_endpoint: whether an endpoint takes a request. The body of one that none takes is not read.
          raw_paths: their endpoints read and bound the body themselves.
        """
        self._app, self._refuse, self._has_endpoint, self._raw_paths = app, refuse, has_endpoint, raw_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        bodiless = scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS")
        if bodiless or scope["path"] in self._raw_paths or not self._has_endpoint(scope):
            await self._app(scope, receive, send)
            return
        try:
            headers = dict(scope["headers"])
            body = await _read(headers, receive)
            if body is None:  # the client has disconnected
                return
            scope[BODY_READ] = True
            if body:
                _check_type(headers)
                scope[PARSED], scope[SIZE] = await off_loop(len(body), parse_json, body), len(body)
        except ApiError as error:
            await self._refuse(scope, receive, send, error)
            return
        replayed, held = False, scope.setdefault(HELD, [])

        async def replay() -> AsgiMessage:
            nonlocal replayed
            if replayed:
                return await receive()  # only the disconnect can follow
            replayed = True
            return {"type": "http.request", "body": b"", "more_body": False}

        try:
            await self._app(scope, replay, send)
        finally:
            if held and scope.get(SIZE, 0) > INLINE_BYTES:
                asyncio.get_running_loop().run_in_executor(None, _free_all, held)


async def _read(headers: dict[bytes, bytes], receive: Receive) -> bytearray | None:
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
            return body


def _too_large(most: int) -> ApiError:
    return ApiError(f"body: expected at most {most} bytes", status=413, code="request_too_large")


def _check_type(headers: dict[bytes, bytes]) -> None:
    """Raise ApiError unless the type is JSON: a browser sends JSON across origins only after a preflight request."""
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json":
        name = ascii(kind.decode("latin-1")[:60])
        raise ApiError(f"content-type: is {name}, expected application/json", code="unsupported_media_type")


def parse_json(body: bytes | bytearray) -> dict[str, Any]:
    """The JSON object of a body; raises ApiError unless every parser reads it alike.

    Beyond the rules of JSON, it refuses repeated keys, numbers that are not finite or longer than ``_MAX_DIGITS``, deep
    nesting, and, but in ``_WRITTEN`` fields, lone surrogates and the character NUL. JavaScript cuts texts within emoji,
    and tools print NUL: refused, no later turn of such a conversation would be answered. There a lone surrogate becomes
    U+FFFD, as browsers encode it.
    """
    most = int(LIMITS["json_depth"].high)
    if _is_deeper(body, most):
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
        for name in _WRITTEN:
            if name in value:
                value[name] = _whole_characters(value[name])
        for text in _strings({name: item for name, item in value.items() if name not in _WRITTEN}):
            if character := _NO_TEXT.search(text):
                raise _bad(f"expected text, found the character U+{ord(character[0]):04X}")
    return value


def _is_deeper(body: bytes | bytearray, most: int) -> bool:
    """Whether brackets are nested deeper than ``most`` levels. Each pass takes away the innermost ones of all, which is
    a hundred times faster than a look at one after the other.
    """
    brackets = _STRING.sub(b"", body).translate(_ALL_SQUARE, _NO_BRACKETS)
    for _ in range(most):
        if len(outer := brackets.replace(b"[]", b"")) == len(brackets):
            break
        brackets = outer
    return b"[]" in brackets or brackets.count(b"[") > most  # the second: without their ends


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _bad(f"{name[:60]!a} is given twice")
            seen.add(name)
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


def _whole_characters(value: Any) -> Any:
    """The value with U+FFFD for each lone surrogate in a string."""
    if isinstance(value, str):
        return _HALVES.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_whole_characters(name): _whole_characters(item) for name, item in value.items()}
    return [_whole_characters(item) for item in value] if isinstance(value, list) else value


def _bad(message: str) -> ApiError:
    return ApiError(f"body: {message}", code="invalid_json")


class BodyRoute(APIRoute):
    """A route that validates the parameter ``body`` of its endpoint itself. FastAPI would parse and validate it in the
    event loop, which a body of some megabytes would stop for seconds.

    The response names the fields that had no effect, in the header `IGNORED`. A path without an entry in `FIELD_TABLES`
    does what its model's fields say and ignores all others.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        model = get_type_hints(self.endpoint).get("body")
        if model is None:
            return super().get_route_handler()
        table = FIELD_TABLES.get(self.path) or FieldTable(done=" ".join(field_paths(model)))
        takes_request = "request" in inspect.signature(self.endpoint).parameters

        async def handle(request: Request) -> Response:
            if PARSED not in request.scope:
                raise ApiError("body: expected a JSON object, found nothing", code="invalid_json")
            size = request.scope[SIZE]
            body, names = await off_loop(size, _taken, model, table, request.scope)
            request.scope[HELD].append(body)
            response = await (self.endpoint(request, body) if takes_request else self.endpoint(body))
            await off_loop(size, _free, body, _READ_ONCE)  # a stream may hold the others for long
            names = sorted({*names, *getattr(request.state, "ignored", ())})
            if names:
                response.headers[IGNORED] = header_value(names)
            return response

        return handle


def field_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The paths of a model's fields, and of those of the models in them, as clients write them."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{field.alias or name}"
        yield path
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from field_paths(part, f"{path}.")


def _free(body: BaseModel, names: Collection[str]) -> None:
    """Free the fields of a body that nobody reads again, and those that it has beside its own."""
    if body.model_extra:
        body.model_extra.clear()
    for name in names:
        vars(body).pop(name, None)


def _free_all(held: list[BaseModel]) -> None:
    """Free all fields of bodies whose answers have been sent, or which were refused."""
    while held:
        body = held.pop()
        _free(body, set(type(body).model_fields))


def _taken(model: type[Model], table: FieldTable, scope: Scope) -> tuple[Model, list[str]]:
    """The body that waits in the scope, validated. What of it nobody reads is freed here, since that takes time too."""
    body, names = validated(model, table, scope.pop(PARSED))
    for name in [*(body.model_extra or ())]:
        if (rule := table.rule(name)) is None or rule.treatment != "done":
            del body.model_extra[name]  # pyright: ignore[reportOptionalSubscript]
    return body, names


def validated(model: type[Model], table: FieldTable, value: Mapping[str, Any]) -> tuple[Model, list[str]]:
    """A parsed body as its model, and the names of its fields without effect.

    Raises:
      ApiError: it is not valid; the first invalid field is named.
      RequestError: a field is not supported.
    """
    try:
        return model.model_validate(value), table.ignored(value)
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False, include_input=False)) from None


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """An error that names the first field that did not validate."""
    first = errors[0]
    name = field_name(first["loc"])
    return ApiError(f"{name or 'body'}: {first['msg']}"[:1000], code="invalid_value", param=name or None)


def header_value(names: Sequence[str]) -> str:
    """Names as the value of a header, cut where it is long; characters that no header may hold become "?"."""
    value = ""
    for index, name in enumerate(names):
        value += ", " * (index > 0) + re.sub("[^!-~]+", "?", name[:_MAX_HEADER])
        if len(value) >= _MAX_HEADER:
            break
    return value[:_MAX_HEADER].strip()
