"""Server-sent events: headers at once, comments while there are no events, and the end when a client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any

from fastapi import Response

from stepjax.infer.serve.errors import ApiError, Dialect
from stepjax.infer.serve.middleware import Receive, Scope, Send

log = logging.getLogger(__name__)

PING_S = 5.0  # between bytes: clients give up after 60 s of silence
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # json.dumps makes one at each call


def event(content: Mapping[str, Any], *, name: str | None = None) -> bytes:
    """One event, its JSON on one line."""
    data = _encode(content)
    return f"event: {name}\ndata: {data}\n\n".encode() if name else f"data: {data}\n\n".encode()


class EventStream(Response):
    """Sends events as they come. When the client disconnects, the iterator is closed at once."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes | None] | AsyncIterator[bytes],
        *,
        close: Callable[[], None],
        dialect: Dialect = "openai",
    ):
        """
        Args:
          events: None where time passed without one; a comment then keeps the connection alive.
          close: called in any case, even if the first event was never requested.
        """
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close = events, close
        self._dialect: Dialect = dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await unless_disconnected(receive, self._write(send))
        finally:
            self._close()

    async def _write(self, send: Send) -> None:
        last = time.monotonic()

        async def send_body(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})

        try:
            async with contextlib.aclosing(self._events) as events:  # pyright: ignore[reportArgumentType]
                async for data in events:
                    if data or time.monotonic() - last >= PING_S:
                        await send_body(data or PING)
                        last = time.monotonic()
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("a stream failed")
            content, named = ApiError.of(error).content(self._dialect), self._dialect in ("anthropic", "responses")
            await send_body(event({"type": "error", **content} if named else content, name="error" if named else None))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Whether ``work`` ended before the client disconnected, which cancels it; raises what it raises."""
    working, disconnecting = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, disconnecting}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
        return working.done()
    finally:
        for task in (working, disconnecting):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
