"""Token ids of texts and conversations, and back, in vLLM's terms."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Response

from stepjax.errors import RequestError
from stepjax.infer.serve.api import Api
from stepjax.infer.serve.bodies import BodyRoute, bare
from stepjax.infer.serve.conversations.reading import in_clients_words, read_chat_body
from stepjax.infer.serve.errors import ApiError
from stepjax.infer.serve.limits import listed, sized
from stepjax.infer.serve.replies import json_response
from stepjax.infer.serve.requests import encode_prompt, offered_tools, template_options
from stepjax.infer.serve.schemas import Body, ChatMessage, ChatRequest
from stepjax.infer.session import Session


class TokenizeRequest(Body):
    """POST /tokenize: of a prompt, or of a conversation."""

    model: str | None = sized("model")
    prompt: str | None = None
    messages: list[ChatMessage] | None = listed("messages")
    tools: list[dict[str, Any]] | None = listed("tools")
    chat_template_kwargs: dict[str, Any] | None = sized("chat_template_kwargs")
    enable_thinking: bool | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = True
    return_token_strs: bool | None = False


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = sized("model")
    tokens: list[int] = listed("tokens", ...)


def router(api: Api) -> APIRouter:
    """The endpoints of tokens and texts."""
    routes, session = APIRouter(tags=["tokens"], route_class=BodyRoute), api.session

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a prompt, or of a conversation."""
        api.model_name(body.model)
        return await asyncio.to_thread(bare, _tokenized, session, body, api.service.engine.scheduler.config.context)

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        api.model_name(body.model)
        return await asyncio.to_thread(bare, _detokenized, session, body)

    @routes.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        """What tokenizer_config.json says."""
        if session.tokenizer is None:
            raise ApiError("this checkpoint has no tokenizer.json", status=404, code="not_found")
        return json_response({"tokenizer_class": "PreTrainedTokenizerFast", **session.tokenizer.config})

    return routes


def _tokenized(session: Session, body: TokenizeRequest, context: int) -> Response:
    ids = _tokenize(session, body)
    fields: dict[str, Any] = {"count": len(ids), "max_model_len": context, "tokens": ids}
    if body.return_token_strs and session.tokenizer:
        fields["token_strs"] = [session.tokenizer.decode([token], skip_special=False) for token in ids]
    return json_response(fields)


def _detokenized(session: Session, body: DetokenizeRequest) -> Response:
    if session.tokenizer is None:
        raise RequestError("tokens: this checkpoint has no tokenizer.json, so they have no text")
    return json_response({"prompt": session.tokenizer.decode(body.tokens, skip_special=False)})


def _tokenize(session: Session, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("prompt: expected it or messages, and not both")
    if body.messages is None:
        assert body.prompt is not None
        return session.encode(body.prompt, bos=body.add_special_tokens is not False)
    names = (
        "messages",
        "tools",
        "chat_template_kwargs",
        "enable_thinking",
        "continue_final_message",
        "add_generation_prompt",
    )
    chat = read_chat_body(ChatRequest.model_construct(**{name: getattr(body, name) for name in names}))
    return in_clients_words(chat.client, _rendered, session, body, chat)


def _rendered(session: Session, body: TokenizeRequest, chat: ChatRequest) -> list[int]:
    if body.add_generation_prompt is False and not body.continue_final_message:  # of a whole conversation
        chat.add_generation_prompt, chat.continue_final_message = True, False
        options = template_options(session, chat) | {"add_generation_prompt": False}
        return session.encode_chat(chat.messages, tools=offered_tools(chat.tools, None), **options)
    return encode_prompt(session, chat)[0]
