"""Answers in the form of /v1/responses."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from stepjax.infer.engine import Score
from stepjax.infer.serve.answers import Answers
from stepjax.infer.serve.chat_api import scored
from stepjax.infer.serve.responses_asked import ResponsesRequest
from stepjax.infer.serve.stream import PING_S, event
from stepjax.infer.transcript import Delta, Transcript
from stepjax.tool_parser import CallStart


class Responses:
    """One request's answer, whole or as events."""

    def __init__(self, body: ResponsesRequest, answers: Answers, model: str):
        self._body, self._answers, self._model = body, answers, model
        self._created = time.time()
        self._items: list[dict[str, Any]] = []  # of the output, in the order in which they were begun
        self._ended = True  # whether the last of them is complete
        self._scores: list[dict[str, Any]] = []  # of tokens whose text is still held back
        self._numbers = itertools.count()

    @property
    def _transcript(self) -> Transcript:
        return self._answers.all[0].transcript

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        async for piece in self._answers.pieces():
            if piece is not None:
                for _ in self._written(piece.delta, self._scored(piece.ids, piece.scores)):
                    pass
        for _ in self._closed():
            pass
        return self._response(self._status())

    async def events(self) -> AsyncIterator[bytes | None]:
        """The events of a stream."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response("in_progress"))
        async for piece in self._answers.pieces(PING_S):
            if piece is None:
                yield None
                continue
            for data in self._written(piece.delta, self._scored(piece.ids, piece.scores)):
                yield data
        for data in self._closed():
            yield data
        status = self._status()
        yield self._event(f"response.{status}", response=self._response(status))

    def _status(self) -> str:
        return "incomplete" if self._transcript.finish_reason == "length" else "completed"

    def _response(self, status: str) -> dict[str, Any]:
        body, params = self._body, self._answers.all[0].asked.params
        return {
            "id": f"resp_{self._answers.ticket.id}",
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._model,
            "output": self._items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"}} if body.text is None else body.text.model_dump(by_alias=True),
            "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None if status == "in_progress" else self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        usage = self._answers.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"]},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {
                "reasoning_tokens": usage["completion_tokens_details"]["reasoning_tokens"],
            },
            "total_tokens": usage["total_tokens"],
        }

    def _scored(self, ids: Sequence[int], scores: Sequence[Score]) -> list[dict[str, Any]]:
        """Of the tokens that say something: those of the thinking and the end of the answer are left out."""
        tokenizer = self._answers.reading.tokenizer
        if not self._body.scored or tokenizer is None:
            return []
        answer = self._answers.all[0]
        seen = len(answer.transcript.ids) - len(ids)
        first = answer.num_reasoning(tokenizer) + 1 if answer.transcript.began_in_reasoning else 0
        return [
            scored(tokenizer, token, score.logprob) | {"top_logprobs": [scored(tokenizer, *each) for each in score.top]}
            for at, (token, score) in enumerate(zip(ids, scores, strict=True), start=seen)
            if at >= first and token not in self._answers.reading.eos_ids
        ]

    def _written(self, delta: Delta, scores: list[dict[str, Any]]) -> Iterator[bytes]:
        """Events for what came, item by item."""
        if delta.reasoning:
            yield from self._in("reasoning")
            yield from self._add(delta.reasoning, "response.reasoning_text.delta", content_index=0)
        self._scores += scores
        if delta.content:
            scores, self._scores = self._scores, []
            yield from self._in("message")
            self._items[-1]["content"][0]["logprobs"] += scores
            yield from self._add(delta.content, "response.output_text.delta", content_index=0, logprobs=scores)
        for each in delta.calls:
            if isinstance(each, CallStart):
                yield from self._closed()
                yield from self._in("function_call", call_id=each.id, name=each.name)
            else:
                yield from self._add(each.text, "response.function_call_arguments.delta")

    def _in(self, kind: str, **fields: Any) -> Iterator[bytes]:
        """Make sure that an item of this kind is being written."""
        if not self._ended and self._items[-1]["type"] == kind:
            return
        yield from self._closed()
        prefix = {"reasoning": "rs", "message": "msg", "function_call": "fc"}[kind]
        item: dict[str, Any] = {"id": f"{prefix}_{self._answers.ticket.id}_{len(self._items)}", "type": kind}
        item["status"] = "in_progress"
        if kind == "function_call":
            item |= {**fields, "arguments": ""}
        else:
            item |= {"role": "assistant"} if kind == "message" else {"summary": []}
            item["content"] = []
        self._items.append(item)
        self._ended = False
        yield self._event("response.output_item.added", item=item)
        if kind == "function_call":
            return
        part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        if kind == "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item["content"].append(part)
        yield self._in_item("response.content_part.added", content_index=0, part=part)

    def _add(self, text: str, kind: str, **fields: Any) -> Iterator[bytes]:
        item = self._items[-1]
        if item["type"] == "function_call":
            item["arguments"] += text
        else:
            item["content"][0]["text"] += text
        yield self._in_item(kind, delta=text, **fields)

    def _closed(self) -> Iterator[bytes]:
        """End the item that is being written."""
        if self._ended:
            return
        self._ended, item = True, self._items[-1]
        item["status"] = "completed"
        if item["type"] == "function_call":
            done = "response.function_call_arguments.done"
            yield self._in_item(done, arguments=item["arguments"], name=item["name"])
        else:
            part = item["content"][0]
            kind = "response.reasoning_text.done" if item["type"] == "reasoning" else "response.output_text.done"
            scores = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            yield self._in_item(kind, content_index=0, text=part["text"], **scores)
            yield self._in_item("response.content_part.done", content_index=0, part=part)
        yield self._event("response.output_item.done", item=item)

    def _in_item(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, item_id=self._items[-1]["id"], **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        if "item" in fields or "item_id" in fields:
            fields["output_index"] = len(self._items) - 1
        return event({"type": kind, "sequence_number": next(self._numbers), **fields}, name=kind)
