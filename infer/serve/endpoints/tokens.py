"""Token ids of texts and conversations, and back, in vLLM's terms."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Response

from stepjax.errors import RequestError
from stepjax.infer.serve.api import Api, json_response
from stepjax.infer.serve.errors import ApiError
from stepjax.infer.serve.limits import sized
from stepjax.infer.serve.requests import offered_tools
from stepjax.infer.serve.schemas import Body, ChatMessage
from stepjax.infer.session import Session
from stepjax.text.chat import read_template_kwargs


class TokenizeRequest(Body):
    """POST /tokenize: of a prompt, or of a conversation."""

    model: str | None = sized("model")
    prompt: str | None = None
    messages: list[ChatMessage] | None = sized("messages")
    tools: list[dict[str, Any]] | None = sized("tools")
    chat_template_kwargs: dict[str, Any] | None = sized("chat_template_kwargs")
    add_generation_prompt: bool | None = True
    add_special_tokens: bool | None = True
    return_token_strs: bool | None = False


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = sized("model")
    tokens: list[int] = sized("tokens", ...)


def router(api: Api) -> APIRouter:
    """The endpoints of tokens and texts."""
    routes, session = APIRouter(tags=["tokens"]), api.session

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a prompt, or of a conversation."""
        api.model_name(body.model)
        ids = await asyncio.to_thread(_tokenize, session, body)
        fields: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": api.service.engine.scheduler.config.context,
            "tokens": ids,
        }
        if body.return_token_strs and session.tokenizer:
            fields["token_strs"] = [session.tokenizer.decode([token], skip_special=False) for token in ids]
        return json_response(fields)

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        api.model_name(body.model)
        if session.tokenizer is None:
            raise RequestError("tokens: this checkpoint has no tokenizer.json, so they have no text")
        return json_response(
            {"prompt": await asyncio.to_thread(session.tokenizer.decode, body.tokens, skip_special=False)}
        )

    @routes.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        """What tokenizer_config.json says."""
        if session.tokenizer is None:
            raise ApiError("this checkpoint has no tokenizer.json", status=404, code="not_found")
        return json_response({"tokenizer_class": "PreTrainedTokenizerFast", **session.tokenizer.config})

    return routes


def _tokenize(session: Session, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("prompt: expected it or messages, and not both")
    if body.messages is not None:
        options = read_template_kwargs(body.chat_template_kwargs)
        return session.encode_chat(
            body.messages,
            tools=offered_tools(body.tools, None),
            add_generation_prompt=body.add_generation_prompt is not False,
            **options,
        )
    assert body.prompt is not None
    ids = session.encode(body.prompt)
    return ids if body.add_special_tokens is not False else ids[1:]
