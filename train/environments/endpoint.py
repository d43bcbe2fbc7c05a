"""An OpenAI-compatible endpoint inside a worker process, behind which the answers come from the trainer's engine.

Code that calls a model by itself becomes an episode this way: its first request is the prompt, and what it adds to each
further request is the reply to a turn.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import socket
from collections.abc import Mapping
from typing import Any

from stepjax.train.environments.episode import Message, Turn
from stepjax.train.environments.session import plain

MODEL = "stepjax"  # the name of the model in requests, which is not read
NO_ROOM = {  # the episode is out of tokens or turns; clients know this text of OpenAI
    "error": {
        "message": "This model's maximum context length is exceeded.",
        "type": "invalid_request_error",
        "code": "context_length_exceeded",
    }
}


class Endpoint:
    """A server on a port of this machine. Each caller has a path of its own."""

    def __init__(self) -> None:
        self._callers: dict[str, Caller] = {}
        self._numbers = itertools.count()
        self._port = 0
        self._task: asyncio.Task | None = None

    async def start(self) -> None:
        """Listen, on the loop that runs."""
        import uvicorn
        from fastapi import FastAPI, Request
        from fastapi.responses import JSONResponse

        app = FastAPI(openapi_url=None)

        async def complete(name: str, request: Request) -> JSONResponse:
            caller = self._callers.get(name)
            if caller is None:
                return JSONResponse(NO_ROOM, 400)
            answer = await caller.ask(await request.json())
            return JSONResponse(NO_ROOM, 400) if answer is None else JSONResponse(answer)

        complete.__annotations__.update(request=Request)  # its text would be looked for in this module
        app.post("/{name}/v1/chat/completions", response_model=None)(complete)
        listener = socket.create_server(("127.0.0.1", 0))
        self._port = listener.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none"))
        self._task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server has set a handler; the parent decides when to end

    def caller(self) -> tuple[Caller, str]:
        """A new caller, and the base URL that its code is given."""
        name = str(next(self._numbers))
        caller = self._callers[name] = Caller()
        caller.leave = lambda: self._callers.pop(name, None)
        return caller, f"http://127.0.0.1:{self._port}/{name}/v1"


class Caller:
    """The requests of one episode, one after the other."""

    def __init__(self) -> None:
        self._requests: asyncio.Queue[tuple[dict[str, Any], asyncio.Future]] = asyncio.Queue()
        self._answer: asyncio.Future | None = None
        self._messages: list[Message] = []
        self.leave: Any = lambda: None

    async def ask(self, body: Mapping[str, Any]) -> dict[str, Any] | None:
        """The answer to a request, once the model has written it; None if there is no room for one."""
        answer = asyncio.get_running_loop().create_future()
        await self._requests.put((dict(body), answer))
        return await answer

    async def first(self, work: asyncio.Task) -> tuple[list[Message], list[dict[str, Any]]]:
        """Messages and tools of the first request. RuntimeError: the work ended without one."""
        body = await self._next(work)
        if body is None:
            raise RuntimeError("it ended before it asked the model anything")
        self._messages = [_message(message) for message in body["messages"]]
        return self._messages, plain(body.get("tools") or [])

    async def reply(self, turn: Turn, work: asyncio.Task) -> list[Message]:
        """Give a turn of the model to the code, and return what it adds to its next request; [] once it has ended.

        Raises:
          RuntimeError: the next request changes earlier messages, which the model has already seen.
        """
        assert self._answer
        self._answer.set_result(completion(turn))
        body = await self._next(work)
        if body is None:
            return []
        messages = [_message(message) for message in body["messages"]]
        before = len(self._messages)
        same = [_said(message) for message in messages[:before]] == [_said(message) for message in self._messages]
        if not same or len(messages) <= before or messages[before]["role"] != "assistant":
            raise RuntimeError("its next request changes earlier messages, but an episode can only continue from them")
        self._messages = messages
        return messages[before + 1 :]

    async def end(self) -> None:
        """Refuse the request that is open, if one is."""
        if self._answer and not self._answer.done():
            self._answer.set_result(None)
        while not self._requests.empty():
            self._requests.get_nowait()[1].set_result(None)
        self.leave()

    async def _next(self, work: asyncio.Task) -> dict[str, Any] | None:
        """The next request; None if the work ends first. Raises what the work raised."""
        request = asyncio.ensure_future(self._requests.get())
        await asyncio.wait({request, work}, return_when=asyncio.FIRST_COMPLETED)
        if request.done():
            body, self._answer = request.result()
            return body
        request.cancel()
        work.result()
        return None


def completion(turn: Turn) -> dict[str, Any]:
    """A turn in the form of OpenAI's chat completions."""
    calls = [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)},
        }
        for number, call in enumerate(turn.calls)
    ]
    message = {"role": "assistant", "content": turn.content, "reasoning_content": turn.reasoning or None}
    message |= {"tool_calls": calls} if calls else {}
    finish = "length" if not turn.finished else "tool_calls" if calls else "stop"
    return {
        "id": "answer",
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }


def _message(message: Mapping[str, Any]) -> Message:
    """A message with plain text, and without fields that are empty."""
    message = {name: value for name, value in plain(message).items() if value not in (None, [], {})}
    content = message.get("content", "")
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content if part.get("type") == "text")
    return {**message, "content": content}


def _said(message: Message) -> tuple[Any, Any]:
    return message["role"], message["content"]
