"""Errors in the forms that clients parse: OpenAI's object, or Anthropic's with the same fields."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from stepjax.errors import ContextError, RequestError, StepjaxError, TemplateError
from stepjax.infer.engine.admission import QueueFullError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
MAX_MESSAGE = 1000  # characters; some errors repeat their input
Dialect = Literal["openai", "completions", "responses", "anthropic", "tinker"]
# What a prompt that is too long is called, by interface.
_PROMPTS = {
    "openai": "messages",
    "completions": "prompt",
    "responses": "input",
    "anthropic": "messages",
    "tinker": "prompt",
}
_FIELD = re.compile(r"[A-Za-z_][\w.\[\]]*(?=:|\.['\"])")  # up to a key that is quoted


class ApiError(Exception):
    """An error that is the response to a request."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ):
        message = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}…"
        super().__init__(message)
        self.message, self.status, self.code, self.param = message, status, code, param
        self.retry_after_s = retry_after_s
        self._overflow: ContextError | None = None

    @classmethod
    def of(cls, error: Exception) -> ApiError:
        """The error that a client sees. Internal errors come without details."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, QueueFullError):
            return cls(str(error), status=429, code="queue_full", retry_after_s=1)
        if isinstance(error, ContextError):
            too_long = cls(str(error), code="context_length_exceeded")
            too_long._overflow = error
            return too_long
        if isinstance(error, RequestError | TemplateError):
            field = _FIELD.match(str(error))
            return cls(str(error), code="invalid_value", param=field[0] if field else None)
        if isinstance(error, StepjaxError):
            return cls(str(error), status=500, code="internal_error")
        return cls("the server failed on this request; see its log", status=500, code="internal_error")

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"retry-after": str(max(1, round(self.retry_after_s)))}

    def content(self, dialect: Dialect = "openai") -> dict[str, Any]:
        """The body. ChatNVIDIA drops an error within a stream unless it has ``object``."""
        error = {
            "object": "error",
            "message": self.told(dialect),
            "type": TYPES.get(self.status, "invalid_request_error"),
            "param": _PROMPTS[dialect] if self._overflow else self.param,
            "code": self.code,
        }
        if dialect == "tinker":
            return {"detail": self.message, "code": self.code, "param": self.param}
        return {"type": "error", "error": error} if dialect == "anthropic" else {"error": error}

    def told(self, dialect: Dialect) -> str:
        """The message in the words of an interface. Agents shorten their conversation, and try again, if they find the
        words with which Anthropic or OpenAI say that a prompt is too long: Claude Code reads both numbers; opencode,
        LiteLLM and LangChain look for a part of these sentences or for the code.
        """
        overflow = self._overflow
        if overflow is None:
            return self.message
        if dialect == "anthropic":
            # A prompt as long as the context leaves no room for an answer, and is too long too.
            most = min(overflow.context, overflow.num_tokens - 1)
            return f"prompt is too long: {overflow.num_tokens} tokens > {most} maximum"
        name = _PROMPTS[dialect]
        return (
            f"This model's maximum context length is {overflow.context} tokens. However, your {name} resulted in "
            f"{overflow.num_tokens} tokens. Please reduce the length of the {name}."
        )


def dialect_of(path: str) -> Dialect:
    """The form of a path's errors."""
    if path.startswith("/v1/messages"):
        return "anthropic"
    if path.startswith("/api/v1/"):
        return "tinker"
    if path.startswith("/v1/responses"):
        return "responses"
    return "completions" if path.startswith("/v1/completions") else "openai"


def field_name(location: Sequence[int | str]) -> str:
    """The place of a validation error, such as ``tools[0].name``."""
    name = ""
    for part in location:
        if part != "body":
            name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    return name
