"""What is done with each field of each interface: done, refused, or ignored with a header that names it."""

from __future__ import annotations

import asyncio
from typing import Any, get_type_hints
from unittest.mock import MagicMock

import httpx
import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params as response_params
from published_fields import ANTHROPIC, LLAMA_CPP, OTHERS, SGLANG, VLLM, VLLM_RESPONSES, expanded, paths
from pydantic import BaseModel
from serving import GREEDY, SUM
from shown import shown

from stepjax.errors import RequestError
from stepjax.infer.serve.api import ServeOptions
from stepjax.infer.serve.app import ROUTERS, create_app
from stepjax.infer.serve.bodies import BodyRoute, field_paths
from stepjax.infer.serve.fields.dialects import CHAT, COMPLETIONS, FIELD_TABLES, MESSAGES, RESPONSES
from stepjax.infer.serve.fields.field_table import FieldTable
from stepjax.infer.serve.schemas import ChatRequest

CHAT_PATH = "/v1/chat/completions"
MODELS: dict[str, type[BaseModel]] = {  # of bodies, by path
    path: model
    for router in ROUTERS
    for route in router(MagicMock()).routes
    if isinstance(route, BodyRoute) and (model := get_type_hints(route.endpoint).get("body"))
    for path in [route.path]
}
PUBLISHED: list[tuple[str, FieldTable, set[str]]] = [
    ("OpenAI's chat", CHAT, paths(chat_params.CompletionCreateParamsStreaming)),
    ("OpenAI's completions", COMPLETIONS, paths(completion_params.CompletionCreateParamsStreaming)),
    ("OpenAI's responses", RESPONSES, paths(response_params.ResponseCreateParamsStreaming)),
    ("Anthropic's messages", MESSAGES, expanded(ANTHROPIC)),
    ("vLLM's chat", CHAT, expanded(VLLM)),
    ("vLLM's responses", RESPONSES, expanded(VLLM_RESPONSES)),
    ("SGLang's chat", CHAT, expanded(SGLANG)),
    ("llama.cpp's chat", CHAT, expanded(LLAMA_CPP)),
    ("others' chat", CHAT, expanded(OTHERS)),
]


@pytest.mark.parametrize(("table", "published"), [each[1:] for each in PUBLISHED], ids=[each[0] for each in PUBLISHED])
def test_every_published_field_has_a_rule(table, published):
    assert len(published) > 15
    assert [path for path in sorted(published) if table.rule(path) is None] == []


@pytest.mark.clients
def test_every_field_of_the_installed_anthropic_client_has_a_rule():
    anthropic = pytest.importorskip("anthropic")
    from anthropic.types.beta import message_create_params

    published = paths(message_create_params.MessageCreateParamsStreaming)
    assert len(published) > 300, anthropic.__version__
    assert [path for path in sorted(published) if MESSAGES.rule(path) is None] == []


@pytest.mark.parametrize("path", FIELD_TABLES)
def test_the_table_and_the_models_of_bodies_agree(path):
    """What a model reads has a rule and is not refused; what is called done below a model's field, the model reads."""
    table, read = FIELD_TABLES[path], set(field_paths(MODELS[path]))
    for name in read:
        rule = table.rule(name)
        assert rule is not None, name
        assert rule.treatment != "refused", name
    passed_on = (
        {**dict.fromkeys(field_paths(ChatRequest))} if path.startswith(("/v1/responses", "/v1/messages")) else {}
    )
    parents = {name for name in read if any(other.startswith(f"{name}.") for other in read)}
    for name, rule in table.paths():
        parent = name.rpartition(".")[0]
        if rule.treatment == "done" and (not parent or parent in parents):
            assert name in read or name in passed_on, name


REFUSED = [
    (path, name, rule)
    for path, table in FIELD_TABLES.items()
    for name, rule in table.paths()
    if rule.treatment == "refused" and table.rule(name) is rule  # and not a part of what is ignored
]


def _nested(path: str, value: Any) -> dict[str, Any]:
    """A body in which a path has a value."""
    for step in reversed(path.replace("[]", ".[]").split(".")):
        value = [value] if step == "[]" else {step: value}
    return value


def test_every_refused_field_is_refused_by_its_name():
    assert len(REFUSED) > 200
    for path, name, rule in REFUSED:
        table = FIELD_TABLES[path]
        inverted = any(neutral is True for neutral in rule.neutral)
        with pytest.raises(RequestError) as error:
            table.ignored(_nested(name, False if inverted else "something"))
        assert str(error.value).startswith(name.replace("[]", "[0]") + ": "), name
        for value in (None, *rule.neutral, *([] if inverted else [False, "", [], {}])):
            assert table.ignored(_nested(name, value)) == [], (name, value)


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/responses", "max_tokens"),
        ("/v1/responses", "messages"),
        ("/v1/messages", "max_completion_tokens"),
        (CHAT_PATH, "stop_sequences"),
        (CHAT_PATH, "system"),
        ("/v1/completions", "tools"),
    ],
)
def test_a_field_of_another_interface_is_refused(path, field):
    with pytest.raises(RequestError, match=f"{field}: .*another interface"):
        FIELD_TABLES[path].ignored({field: "x"})


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/responses", "modalities", ["audio"]),
        ("/v1/messages", "audio", {"voice": "x"}),
        ("/v1/messages", "web_search_options", {"user_location": {}}),
        ("/v1/completions", "documents", ["x"]),
        (CHAT_PATH, "mcp_servers", [{"url": "x"}]),
        (CHAT_PATH, "previous_response_id", "x"),
    ],
)
def test_what_one_interface_refuses_no_other_ignores(path, field, value):
    with pytest.raises(RequestError, match=f"{field}: "):
        FIELD_TABLES[path].ignored({field: value})


def test_what_asks_for_nothing_is_not_refused():
    for path, fields in (
        ("/v1/completions", {"parallel_tool_calls": True, "tool_choice": "auto", "tools": []}),
        (CHAT_PATH, {"best_of": 1, "echo": False, "suffix": ""}),
        ("/v1/responses", {"modalities": ["text"], "n": 1, "best_of": 1}),
    ):
        assert FIELD_TABLES[path].ignored(fields) == []


def test_a_value_of_any_size_or_kind_has_an_answer():
    for value in (10**400, -1, 2.5, True, [1], ["x"], {"a": 1}, "x"):
        with pytest.raises(RequestError, match="typical_p"):
            CHAT.ignored({"typical_p": value})
    assert CHAT.ignored({"typical_p": 1, "mirostat": 0, "modalities": ["text"], "separate_reasoning": True}) == []


def test_names_are_looked_up_as_they_are_and_not_as_paths():
    body = {"stream_options.include_usage": True, "messages[].role": "x", "[]": 1, "*": 2}
    assert CHAT.ignored(body) == sorted(body)


def test_ignored_fields_are_named_at_every_depth(server):
    message = {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]}
    body = {
        **GREEDY,
        "messages": [message, {**SUM[0], "mood": "good"}],
        "max_tokens": 1,
        "user": "me",
        "stream": True,
        "stream_options": {"include_usage": True, "sometimes": True},
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "description": "b"}},
    }
    with server.client.stream("POST", CHAT_PATH, json=body) as response:
        assert response.status_code == 200, response.read()
        names = response.headers["x-stepjax-ignored"].split(", ")
    assert names == [
        "messages[].content[].cache_control",
        "messages[].mood",
        "response_format.json_schema.description",
        "stream_options.sometimes",
        "user",
    ]
    body = {
        "model": "step-tiny",
        "max_tokens": 1,
        "messages": SUM,
        "metadata": {},
        "system": [{"type": "text", "text": "S"}],
    }
    body["system"][0]["cache_control"] = {"type": "ephemeral"}
    assert server.post("/v1/messages", body).headers["x-stepjax-ignored"] == "metadata, system[].cache_control"
    counted = server.post("/v1/messages/count_tokens", body).headers["x-stepjax-ignored"]
    assert counted == "max_tokens, metadata, system[].cache_control"
    assert "x-stepjax-ignored" not in server.post("/v1/messages", {**body, "metadata": None, "system": "S"}).headers


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (CHAT_PATH, "chat_template", "{{ messages }}"),
        (CHAT_PATH, "documents", [{"text": "a"}]),
        (CHAT_PATH, "typical_p", 0.5),
        (CHAT_PATH, "structured_outputs", {"structural_tag": "{}"}),
        (CHAT_PATH, "structured_outputs", {"json": {}, "disable_any_whitespace": True}),
        (CHAT_PATH, "nvext", {"greed_sampling": True}),
        ("/v1/completions", "stop_regex", "a+"),
        ("/v1/completions", "typical_p", 0.5),
        ("/v1/responses", "n", 2),
        ("/v1/responses", "context_management", [{"type": "compaction"}]),
        ("/v1/messages", "n", 2),
        ("/v1/messages", "context_management", {"edits": [{"type": "clear_tool_uses_20250919"}]}),
        ("/tokenize", "chat_template", "x"),
    ],
)
def test_what_would_change_the_answer_is_not_ignored(server, path, field, value):
    base = {
        CHAT_PATH: GREEDY,
        "/v1/completions": {"prompt": "a", "max_tokens": 1},
        "/v1/responses": {"input": "a"},
        "/v1/messages": {"model": "step-tiny", "max_tokens": 1, "messages": SUM},
        "/tokenize": {"messages": SUM},
    }[path]
    response = server.post(path, {**base, field: value})
    assert response.status_code == 400, response.text
    assert field in response.json()["error"]["message"]


def test_the_endpoint_of_the_documentation_is_a_module_and_a_line(server, monkeypatch):
    """Its body is validated by its class alone: what that lacks is ignored and named."""
    monkeypatch.setattr("stepjax.infer.serve.app.ROUTERS", (*ROUTERS, shown("router")))
    app = create_app(server.service, server.session, ServeOptions(("step-tiny",)))

    async def ask(**body: Any) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post("/count", json=body)

    response = asyncio.run(ask(text="one two", colour="red"))
    assert response.json() == {"model": "step-tiny", "words": 2, "tokens": len(server.session.encode("one two"))}
    assert response.headers["x-stepjax-ignored"] == "colour"
    assert asyncio.run(ask(text=3)).json()["error"]["message"].startswith("text: ")
    assert asyncio.run(ask(text="a", model="x" * 300)).json()["error"]["param"] == "model"
