"""How an endpoint gets its body: validated, and its fields looked up in the table, in a thread if the body is large."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar, get_type_hints

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from stepjax.infer.serve.bodies import PARSED, SIZE, off_loop
from stepjax.infer.serve.errors import ApiError, field_name
from stepjax.infer.serve.fields.dialects import FIELD_TABLES
from stepjax.infer.serve.fields.field_table import FieldTable
from stepjax.infer.serve.middleware import Scope

T = TypeVar("T", bound=BaseModel)

IGNORED = "x-stepjax-ignored"  # the header that names the fields without effect
_MAX_HEADER = 1000  # characters of its value


class BodyRoute(APIRoute):
    """A route that validates the parameter ``body`` of its endpoint itself. FastAPI would parse and validate it in the
    event loop, which a body of some megabytes would stop for seconds.

    The response names the fields that had no effect, in the header `IGNORED`.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        model = get_type_hints(self.endpoint).get("body")
        if model is None:
            return super().get_route_handler()
        table = FIELD_TABLES[self.path]
        takes_request = "request" in inspect.signature(self.endpoint).parameters

        async def handle(request: Request) -> Response:
            if PARSED not in request.scope:
                raise ApiError("body: expected a JSON object, found nothing", code="invalid_json")
            body, names = await off_loop(request.scope[SIZE], _taken, model, table, request.scope)
            response = await (self.endpoint(request, body) if takes_request else self.endpoint(body))
            names = sorted({*names, *getattr(request.state, "ignored", ())})
            if names:
                response.headers[IGNORED] = header_value(names)
            return response

        return handle


def _taken(model: type[T], table: FieldTable, scope: Scope) -> tuple[T, list[str]]:
    """The body that waits in the scope, validated. What of it nobody reads is freed here, since that takes time too."""
    body, names = validated(model, table, scope.pop(PARSED))
    for name in [*(body.model_extra or ())]:
        if (rule := table.rule(name)) is None or rule.treatment != "done":
            del body.model_extra[name]  # pyright: ignore[reportOptionalSubscript]
    return body, names


def validated(model: type[T], table: FieldTable, value: Mapping[str, Any]) -> tuple[T, list[str]]:
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
    for name in names:
        value += ", " * bool(value) + re.sub("[^!-~]+", "?", name[:_MAX_HEADER])
        if len(value) >= _MAX_HEADER:
            break
    return value[:_MAX_HEADER].strip()
