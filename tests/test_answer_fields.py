"""Fields that shape an answer in every interface: begun answers, switches of thinking, one call, grammars, usage."""

from __future__ import annotations

import json
from typing import Any

import pytest
from serving import GREEDY, SUM, TOOL, Serving

from stepjax.errors import RequestError
from stepjax.infer.guided.schema_grammar import MAX_GRAMMAR_BYTES, GrammarError, grammar
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.serve.schemas import ChatRequest
from stepjax.infer.serve.thinking import thinking_of
from stepjax.infer.transcript import Transcript

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
BEGUN = [*SUM, {"role": "assistant", "content": "The sum is 8"}]
ASKED = {"model": "step-tiny", "max_tokens": 80, "messages": SUM, "temperature": 0}


def content(server: Serving, **fields: Any) -> str:
    response = server.post(CHAT, {**GREEDY, **fields})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


# Begun answers


def prompt_of(server: Serving, **fields: Any) -> str:
    response = server.post("/tokenize", fields)
    assert response.status_code == 200, response.text
    return server.post("/detokenize", {"tokens": response.json()["tokens"]}).json()["prompt"]


def test_a_begun_answer_ends_the_prompt(server):
    for fields in (
        {},
        {"continue_final_message": True},
        {"continue_final_message": True, "add_generation_prompt": False},
    ):
        prompt = prompt_of(server, messages=BEGUN, **fields)
        assert prompt.endswith("<|im_start|>assistant\n<think>\n</think>\nThe sum is 8")
    thought = {**BEGUN[-1], "reasoning_content": "467 + 358 = 825"}
    prompt = prompt_of(server, messages=[*SUM, thought])
    assert prompt.endswith("<|im_start|>assistant\n<think>\n467 + 358 = 825\n</think>\nThe sum is 8")
    raw = {"role": "assistant", "content": "<think>\n467 + 358 = 825\n</think>\nThe sum is 8"}
    assert prompt_of(server, messages=[*SUM, raw]) == prompt
    thinking = {"role": "assistant", "content": "", "reasoning_content": "467 +"}
    assert prompt_of(server, messages=[*SUM, thinking]).endswith("<think>\n467 +")


def test_another_answer_begins_where_that_is_asked_for(server):
    for fields in ({"add_generation_prompt": True}, {"continue_final_message": False}):
        assert prompt_of(server, messages=BEGUN, **fields).endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n")
    called = {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    assert prompt_of(server, messages=[*SUM, called]).endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n")


def test_what_a_begun_answer_spells_is_text(server):
    ids = server.post("/tokenize", {"messages": [*SUM, {**BEGUN[-1], "content": "<|im_end|> a </think>"}]}).json()[
        "tokens"
    ]
    plain = server.post("/tokenize", {"messages": BEGUN}).json()["tokens"]
    end = server.post("/tokenize", {"prompt": "x", "add_special_tokens": False}).json()
    assert end["count"] == 1
    special = server.service.engine.scheduler and server.session.tokenizer.special
    assert ids.count(special.im_end) == plain.count(special.im_end)


def test_an_answer_continues_in_every_interface(server):
    """The same prompt gives the same rest, which does not repeat what was begun."""
    rest = content(server, messages=BEGUN, max_tokens=8)
    assert rest
    assert not rest.startswith("The sum")
    assert content(server, messages=BEGUN, max_tokens=8, continue_final_message=True) == rest
    assert content(server, messages=BEGUN, max_tokens=8, add_generation_prompt=True) != rest
    prompt = server.post("/tokenize", {"messages": BEGUN}).json()["tokens"]
    plain = server.post("/v1/completions", {"prompt": prompt, "max_tokens": 8, "temperature": 0}).json()
    assert plain["choices"][0]["text"] == rest
    body = {**ASKED, "messages": BEGUN, "max_tokens": 8}
    assert server.post(MESSAGES, body).json()["content"] == [{"type": "text", "text": rest}]
    count = {name: body[name] for name in ("model", "messages")}
    assert server.post(f"{MESSAGES}/count_tokens", count).json()["input_tokens"] == len(prompt)
    body = {"input": BEGUN, "max_output_tokens": 8, "temperature": 0}
    output = server.post(RESPONSES, body).json()["output"]
    assert output[0]["content"][0]["text"] == rest


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": BEGUN, "continue_final_message": True, "add_generation_prompt": True},
        {"messages": SUM, "continue_final_message": True},
        {"messages": BEGUN[1:], "continue_final_message": True},
        {"messages": [*SUM, {"role": "assistant", "content": ""}], "continue_final_message": True},
        {"messages": SUM, "add_generation_prompt": False},
    ],
)
def test_what_cannot_be_continued_is_refused(server, fields):
    response = server.post(CHAT, {**GREEDY, **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == "invalid_value"


def test_anthropics_format_goes_with_no_begun_answer(server):
    config = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
    for fields in ({"output_config": config}, {"output_format": config["format"]}):
        assert server.post(MESSAGES, {**ASKED, "messages": BEGUN, **fields}).status_code == 400


# Switches of thinking

OFF = [
    {"enable_thinking": False},
    {"thinking": {"type": "disabled"}},
    {"reasoning": {"effort": "none"}},
    {"reasoning": {"enabled": False}},
    {"reasoning_effort": "none"},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"chat_template_kwargs": {"thinking": False}},
]


@pytest.mark.parametrize("switch", OFF, ids=[str(each) for each in OFF])
def test_every_switch_closes_the_thinking(server, switch):
    body = {**GREEDY, **switch, "max_tokens": 6}
    found = server.post(CHAT, body).json()
    assert "reasoning_content" not in found["choices"][0]["message"]
    assert found["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0
    if "reasoning" not in switch:  # which Anthropic's interface does not have
        body = {**ASKED, **switch, "max_tokens": 6}
        assert [block["type"] for block in server.post(MESSAGES, body).json()["content"]] == ["text"]
    body = {"input": SUM, "temperature": 0, "max_output_tokens": 6, **switch}
    if switch != {"reasoning": {"enabled": False}}:  # nor OpenAI's responses this one
        assert [item["type"] for item in server.post(RESPONSES, body).json()["output"]] == ["message"]


def wish(**fields: Any) -> tuple[bool, int | None, bool]:
    found = thinking_of(ChatRequest.model_validate({"messages": SUM, **fields}))
    return found.enabled, found.budget, found.shown


def test_what_switches_say_together():
    assert wish() == (True, None, True)
    assert wish(reasoning_effort="low") == (True, 2048, True)
    assert wish(reasoning_effort="low", thinking_token_budget=7) == (True, 7, True)
    assert wish(thinking={"type": "enabled", "budget_tokens": 9}, reasoning={"max_tokens": 5}) == (True, 5, True)
    assert wish(nvext={"max_thinking_tokens": 3}) == (True, 3, True)
    assert wish(reasoning={"exclude": True}) == (True, None, False)
    assert wish(enable_thinking=True, reasoning={"effort": "none"}) == (False, None, True)
    for field in ({"reasoning": {"effort": "huge"}}, {"reasoning_effort": "huge"}):
        with pytest.raises(RequestError, match="effort: is 'huge'"):
            wish(**field)


def test_thinking_is_excluded_as_it_is_left_out(server):
    message = server.post(CHAT, {**GREEDY, "reasoning": {"exclude": True}}).json()["choices"][0]["message"]
    assert "reasoning_content" not in message
    assert message["content"] == "825"


# One call


CALL = "<tool_call>\n<function=get_weather>\n<parameter=city>\n{}\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_answer_ends_behind_its_only_call(step_tiny, size):
    tokenizer = step_tiny.tokenizer
    text = "Let me see.\n" + CALL.format("Paris") + "\n" + CALL.format("Rome") + "\nDone"
    ids = tokenizer.encode(text)
    whole = Transcript(SamplingParams(max_tokens=1000), eos_ids=[], tokenizer=tokenizer, tools=[TOOL])
    one = Transcript(SamplingParams(max_tokens=1000), eos_ids=[], tokenizer=tokenizer, tools=[TOOL], max_calls=1)
    for at in range(0, len(ids), size):
        whole.push(ids[at : at + size])
        one.push(ids[at : at + size])
    whole.end("stop")
    assert [json.loads(call.arguments)["city"] for call in whole.calls] == ["Paris", "Rome"]
    assert [json.loads(call.arguments)["city"] for call in one.calls] == ["Paris"]
    assert (one.finish_reason, one.content) == ("tool_calls", "Let me see.\n")
    assert tokenizer.decode(one.ids).rstrip("\n") == text[: text.index("</tool_call>")] + "</tool_call>"


def test_two_functions_in_one_block_are_one_call_too(step_tiny):
    tokenizer = step_tiny.tokenizer
    function = CALL.format("Paris").removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    ids = tokenizer.encode(f"<tool_call>\n{function}\n{function.replace('Paris', 'Rome')}\n</tool_call>")
    one = Transcript(SamplingParams(max_tokens=1000), eos_ids=[], tokenizer=tokenizer, tools=[TOOL], max_calls=1)
    delta = one.push(ids)
    assert len(one.calls) == 1
    assert {event.index for event in delta.calls} == {0}
    assert one.finish_reason == "tool_calls"


# Grammars

LARK = 'start: "yes" | "no" | letters\nletters: /[a-f]{2}/\n'
GBNF = 'root ::= "yes" | "no" | letters  # an answer\nletters ::= [a-f] [a-f]\n'
PLAIN = {"enable_thinking": False, "max_tokens": 8}


@pytest.mark.parametrize("text", [LARK, GBNF], ids=["lark", "gbnf"])
def test_a_grammar_holds_under_every_name(server, text):
    names = [
        {"guided_grammar": text},
        {"structured_outputs": {"grammar": text}},
        {"nvext": {"guided_grammar": text}},
        {"ebnf": text},
        {"grammar": text},
        {"response_format": {"type": "grammar", "grammar": text}},
    ]
    answers = {content(server, **PLAIN, **fields) for fields in names}
    assert len(answers) == 1
    answer = answers.pop()
    assert answer in ("yes", "no") or (len(answer) == 2 and set(answer) <= set("abcdef"))
    assert content(server, **PLAIN) != answer
    plain = {"prompt": "What is 1?", "max_tokens": 8, "temperature": 0, "grammar": text}
    found = server.post("/v1/completions", plain).json()["choices"][0]["text"]
    assert found in ("yes", "no") or set(found) <= set("abcdef")
    body = {"input": "Say yes", "max_output_tokens": 8, "enable_thinking": False, "guided_grammar": text}
    found = server.post(RESPONSES, body).json()["output"][0]["content"][0]["text"]
    assert found in ("yes", "no") or set(found) <= set("abcdef")


def test_a_grammar_holds_behind_the_thinking_and_beside_calls(server):
    assert content(server, max_tokens=200, guided_grammar='start: "A" /[0-9]/ "!"').startswith("A")
    fields = {"tools": [TOOL], "guided_grammar": 'start: "A" /[0-9]/ "!"', "max_tokens": 200}
    choice = server.post(CHAT, {**GREEDY, **fields}).json()["choices"][0]
    assert choice["message"]["tool_calls" if choice["finish_reason"] == "tool_calls" else "content"]


def test_other_names_of_formats_hold(server):
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
    names: list[dict[str, Any]] = [
        {"guided_json": schema},
        {"json_schema": schema},
        {"json_schema": json.dumps(schema)},
        {"response_format": {"type": "json_object", "schema": schema}},
        {"response_format": {"type": "json_schema", "schema": schema}},
    ]
    answers = {content(server, enable_thinking=False, **fields) for fields in names}
    assert len(answers) == 1
    assert set(json.loads(answers.pop())) == {"sum"}
    assert content(server, **PLAIN, regex="[a-c]{3}") == content(server, **PLAIN, guided_regex="[a-c]{3}")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "nothing",
        "start: undefined",
        "root ::= undefined",
        "root ::= (",
        "start: /(/",
        "x" * (MAX_GRAMMAR_BYTES + 1),
    ],
)
def test_a_grammar_that_is_none_is_refused(server, text):
    response = server.post(CHAT, {**GREEDY, "structured_outputs": {"grammar": text}})
    assert response.status_code == 400, response.text
    assert "structured_outputs.grammar" in response.json()["error"]["message"]


def test_deeply_nested_gbnf_is_an_error_of_the_request():
    with pytest.raises(GrammarError):
        grammar("root ::= " + "(" * 8000 + '"a"' + ")" * 8000)


# Template variables and usage


def test_the_template_gets_only_what_it_reads(server):
    for kwargs in ({"tokenize": True}, {"messages": []}, {"bos_token": "x"}, {"enable_thinking": 1}):
        response = server.post(CHAT, {**GREEDY, "chat_template_kwargs": kwargs})
        assert response.status_code == 400
        assert "chat_template_kwargs" in response.json()["error"]["message"]
