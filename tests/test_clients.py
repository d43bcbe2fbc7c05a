"""The clients that people already have: the snippets of docs/serving.md, and what they make of answers and errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from serving import GREEDY, NAME, PARAMETERS, SUM, TOOL, WEATHER

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
SNIPPET = re.compile(r"<!-- client: (\w+) -->\n```\w+\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SNIPPETS = dict(SNIPPET.findall(PAGE))


def run(name: str, server, command: list[str], **options) -> str:
    """What a snippet prints, asking this server."""
    assert SNIPPETS[name].count("http://localhost:8000") == 1
    code = SNIPPETS[name].replace("http://localhost:8000", server.url)
    done = subprocess.run([*command, code], capture_output=True, text=True, timeout=120, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_has_a_snippet_for_each():
    assert set(SNIPPETS) == {"python", "langchain", "node", "curl", "anthropic"}
    for snippet in SNIPPETS.values():
        assert NAME in snippet
        assert "16384" in snippet


def test_the_python_snippet(server):
    printed = run("python", server, [sys.executable, "-c"])
    assert "carry" in printed  # of the thinking
    assert printed.rstrip()[-1].isdigit()


def test_the_curl_snippet(server):
    printed = run("curl", server, ["bash", "-c"])
    lines = [line for line in printed.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    assert '"reasoning_content":' in printed


@pytest.mark.clients
@pytest.mark.parametrize("name", ["langchain", "anthropic"])
def test_a_snippet_of_the_larger_clients(server, name):
    printed = run(name, server, [sys.executable, "-W", "ignore", "-c"])
    assert printed.rstrip()[-1].isdigit()
    assert ("carry" in printed) == (name == "langchain")


@pytest.fixture(scope="module")
def client(server):
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
        yield one


def test_whole_and_streamed(client):
    whole = client.chat.completions.create(model=NAME, **GREEDY)
    message = whole.choices[0].message
    assert (message.content, whole.choices[0].finish_reason) == ("825", "stop")
    stream = client.chat.completions.create(model=NAME, **GREEDY, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    said = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in said) == message.reasoning_content
    assert "".join(delta.content or "" for delta in said) == "825"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert sum(chunk.usage is not None for chunk in chunks) == 1


def test_several_turns_seeds_and_scores(client):
    history = [*SUM, {"role": "assistant", "content": "825", "reasoning_content": "7+8"}, *WEATHER]
    assert client.chat.completions.create(model=NAME, messages=history, max_tokens=5).choices[0].finish_reason
    sampled = {"model": NAME, "messages": SUM, "temperature": 5, "top_p": 1, "max_tokens": 20}
    sampled["extra_body"] = {"top_k": 0}
    twice = [client.chat.completions.create(**sampled, seed=3, n=2) for _ in range(2)]
    texts = [[choice.message.reasoning_content for choice in found.choices] for found in twice]
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]
    scored = client.chat.completions.create(model=NAME, **GREEDY, logprobs=True, top_logprobs=2)
    assert len(scored.choices[0].logprobs.content) == scored.usage.completion_tokens
    stopped = client.chat.completions.create(model=NAME, **GREEDY, stop="2")
    assert stopped.choices[0].message.content == "8"


def test_tools_there_and_back(client):
    asked = {"model": NAME, "temperature": 0, "max_tokens": 200, "tools": [TOOL]}
    message = client.chat.completions.create(messages=WEATHER, **asked).choices[0].message
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Havana"}
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"temp": 94, "sky": "cloudy"}'}
    history = [*WEATHER, message.model_dump(exclude_none=True), result]
    assert "94" in client.chat.completions.create(messages=history, **asked).choices[0].message.content


def test_responses_there_and_back(client):
    """A function in a namespace and a custom tool, put together by the client's own reader of streams."""
    function = {"type": "function", "name": "get_weather", "description": "Weather of a city", "strict": False}
    tools = [{"type": "namespace", "name": "city", "description": "", "tools": [function | {"parameters": PARAMETERS}]}]
    asked: dict[str, Any] = {"model": NAME, "input": WEATHER, "temperature": 0, "tools": tools}
    with client.responses.stream(**asked, tool_choice="required") as stream:
        call = stream.get_final_response().output[-1]
    assert (call.type, call.name, call.namespace) == ("function_call", "get_weather", "city")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": '{"temp": 94, "sky": "cloudy"}'}
    history = [*WEATHER, call.model_dump(exclude_none=True), result]
    assert "94" in client.responses.create(**{**asked, "input": history}).output_text
    format = {"type": "grammar", "syntax": "regex", "definition": "[a-z]{3,9}"}
    custom = {"type": "custom", "name": "say", "description": "Says a word", "format": format}
    with client.responses.stream(
        **{**asked, "tools": [custom]}, tool_choice={"type": "custom", "name": "say"}
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "response.custom_tool_call_input.delta"]
        call = stream.get_final_response().output[-1]
    assert (call.type, call.name, call.input) == ("custom_tool_call", "say", "".join(deltas))
    result = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "said"}
    history = [*WEATHER, call.model_dump(exclude_none=True), result]
    assert client.responses.create(**{**asked, "input": history, "tools": [custom]}).status == "completed"


def test_curl_there_and_back(server):
    def ask(messages: list[Any]) -> dict[str, Any]:
        body = {"messages": messages, "temperature": 0, "tools": [TOOL]}
        command = [
            "curl",
            "-sS",
            f"{server.url}/v1/chat/completions",
            "-H",
            "Content-Type: application/json",
            "-d",
            "@-",
        ]
        done = subprocess.run(command, input=json.dumps(body), capture_output=True, text=True, timeout=60, check=True)
        return json.loads(done.stdout)["choices"][0]["message"]

    answer = ask(WEATHER)
    (call,) = answer["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Havana"}
    result = {"role": "tool", "tool_call_id": call["id"], "content": '{"temp": 94, "sky": "cloudy"}'}
    assert "94" in ask([*WEATHER, answer, result])["content"]


def test_completions_and_responses_and_models(client):
    found = client.completions.create(model=NAME, prompt=["What is", "Hello"], max_tokens=4, temperature=0, logprobs=1)
    assert [choice.index for choice in found.choices] == [0, 1]
    asked = {"model": NAME, "input": SUM[0]["content"], "temperature": 0, "max_output_tokens": 80}
    assert client.responses.create(**asked).output_text == "825"
    events = list(client.responses.create(**asked, stream=True))
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == "825"
    assert [each.id for each in client.models.list()] == ["step-tiny", NAME]


def test_errors_are_the_clients_own(client, server):
    chat = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as bad:
        chat(model=NAME, **{**GREEDY, "temperature": -1})
    assert (bad.value.param, bad.value.code) == ("temperature", "invalid_value")
    assert bad.value.type == "invalid_request_error"
    assert bad.value.request_id
    with pytest.raises(openai.NotFoundError):
        chat(model="gpt-9", **GREEDY)
    with pytest.raises(openai.BadRequestError, match="context"):
        chat(model=NAME, messages=[{"role": "user", "content": "x" * 40000}])
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=NAME, input="x")


NODE = """
import OpenAI from "openai";
import assert from "node:assert";
const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none", maxRetries: 0 });
const asked = JSON.parse(process.argv[3]);
const whole = await client.chat.completions.create(asked);
let thought = "", said = "", usage = 0;
const stream = await client.chat.completions.create({...asked, stream: true, stream_options: {include_usage: true}});
for await (const chunk of stream) {
  thought += chunk.choices[0]?.delta?.reasoning_content ?? "";
  said += chunk.choices[0]?.delta?.content ?? "";
  usage += chunk.usage?.completion_tokens ?? 0;
}
assert.equal(said, whole.choices[0].message.content);
assert.equal(thought, whole.choices[0].message.reasoning_content);
assert.equal(usage, whole.usage.completion_tokens);
await assert.rejects(client.chat.completions.create({...asked, temperature: -1}), OpenAI.BadRequestError);
await assert.rejects(client.chat.completions.create({...asked, model: "gpt-9"}), OpenAI.NotFoundError);
const schema = {type: "object", properties: {sum: {type: "integer", minimum: 0, maximum: 9999}}, required: ["sum"]};
const format = {type: "json_schema", json_schema: {name: "sum", strict: true, schema}};
const held = await client.chat.completions.parse({...asked, response_format: format});
assert.deepEqual(Object.keys(JSON.parse(held.choices[0].message.content)), ["sum"]);
const tool = {type: "function", function: {name: "add", parameters: schema}};
const called = await client.chat.completions.create({...asked, tools: [tool], tool_choice: "required"});
assert.deepEqual(Object.keys(JSON.parse(called.choices[0].message.tool_calls[0].function.arguments)), ["sum"]);
const [weather, question] = JSON.parse(process.argv[4]);
const turn = {model: asked.model, temperature: 0, tools: [weather]};
const answer = await client.chat.completions.stream({...turn, messages: [question]}).finalMessage();
const [call] = answer.tool_calls;
assert.deepEqual(JSON.parse(call.function.arguments), {city: "Havana"});
const result = {role: "tool", tool_call_id: call.id, content: '{"temp": 94, "sky": "cloudy"}'};
const last = await client.chat.completions.create({...turn, messages: [question, answer, result]});
assert.match(last.choices[0].message.content, /94/);
const response = await client.responses.create({model: asked.model, input: asked.messages[0].content, temperature: 0});
console.log(response.output_text);
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """A folder with npm's openai; kept between runs, since only the first may need a network."""
    folder = Path("~/.cache/stepjax/node").expanduser()
    if not (folder / "node_modules" / "openai").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--no-audit", "--no-fund", "openai@6"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            pytest.skip(f"npm has no openai: {done.stderr[-300:]}")
    home = tmp_path_factory.mktemp("node")
    (home / "node_modules").symlink_to(folder / "node_modules")
    return home


@pytest.mark.slow
@pytest.mark.node
def test_the_node_client(server, packages):
    node = shutil.which("node")
    assert node
    printed = run("node", server, [node, "--input-type=module", "-e"], cwd=packages)
    assert "carry" in printed
    script = packages / "checks.mjs"
    script.write_text(NODE)
    command = [node, str(script), server.url, json.dumps({"model": NAME, **GREEDY}), json.dumps([TOOL, *WEATHER])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "825\n"


LANGCHAIN = """
import sys
from langchain_nvidia_ai_endpoints import ChatNVIDIA
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool

url, name = sys.argv[1:]
chat = ChatNVIDIA(base_url=url + "/v1", api_key="none", model=name, temperature=0, max_tokens=200)
whole = chat.invoke("What is 467 + 358?")
assert whole.content == "825", whole
assert "carry" in whole.additional_kwargs["reasoning_content"]
chunks = list(chat.stream("What is 467 + 358?"))
assert "".join(chunk.content for chunk in chunks) == "825"
counted = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
assert [each["output_tokens"] for each in counted if each["output_tokens"]] == [whole.usage_metadata["output_tokens"]]

@tool
def get_weather(city: str) -> str:
    "Weather of a city"
    return '{"temp": 94, "sky": "cloudy"}'

asked = [HumanMessage("How is the weather in Havana now?")]
answer = chat.bind_tools([get_weather]).invoke(asked)
(call,) = answer.tool_calls
assert (call["name"], call["args"]) == ("get_weather", {"city": "Havana"}), call
schema = {"title": "Weather", "type": "object", "required": ["city", "temp"], "properties": {
    "city": {"type": "string", "maxLength": 12}, "temp": {"type": "integer", "minimum": -99, "maximum": 999}}}
held = chat.with_structured_output(schema).invoke(asked)
assert set(held) == {"city", "temp"}, held
forced = chat.bind_tools([get_weather], tool_choice="required").invoke("What is the weather in Paris?")
assert forced.tool_calls[0]["name"] == "get_weather", forced
result = ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])
assert "94" in chat.bind_tools([get_weather]).invoke([*asked, answer, result]).content
try:
    chat.bind(temperature=-1).invoke("x")
except Exception as error:
    assert "temperature" in str(error), error
else:
    raise AssertionError("no error")
"""

ANTHROPIC = """
import sys, anthropic, pydantic
from typing import Literal
url, name = sys.argv[1:]
client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
asked = {"model": name, "max_tokens": 200, "messages": [{"role": "user", "content": "What is 467 + 358?"}]}
asked["extra_body"] = {"temperature": 0}
whole = client.messages.create(**asked)
assert [block.type for block in whole.content] == ["thinking", "text"], whole
assert whole.content[1].text == "825"
with client.messages.stream(**asked) as stream:
    final = stream.get_final_message()
assert [block.type for block in final.content] == ["thinking", "text"], final
assert final.content[0].thinking == whole.content[0].thinking
assert final.content[1].text == "825"
assert final.usage.output_tokens == whole.usage.output_tokens
schema = {"type": "object", "properties": {"city": {"type": "string"}}}
tools = [{"name": "get_weather", "description": "Weather of a city", "input_schema": schema}]
weather = {**asked, "tools": tools, "messages": [{"role": "user", "content": "How is the weather in Havana now?"}]}
with client.messages.stream(**weather) as stream:
    called = stream.get_final_message()
assert (called.stop_reason, called.content[-1].input) == ("tool_use", {"city": "Havana"}), called
forced = client.messages.create(**{**weather, "tool_choice": {"type": "tool", "name": "get_weather"}})
assert (forced.stop_reason, forced.content[-1].input) == ("tool_use", {"city": "Havana"}), forced
class Weather(pydantic.BaseModel):
    city: Literal["Havana", "Rome"]
    temp: int
del weather["tools"]
held = client.messages.parse(**weather, output_format=Weather)
assert isinstance(held.parsed_output, Weather), held
assert client.messages.count_tokens(model=name, messages=asked["messages"]).input_tokens > 10
for change, kind in (({"max_tokens": -1}, anthropic.BadRequestError), ({"model": "x"}, anthropic.NotFoundError)):
    try:
        client.messages.create(**{**asked, **change})
    except kind as error:
        assert error.body["type"] == "error"
    else:
        raise AssertionError("no error")
"""


LITELLM = """
import sys, json, litellm
url, name, tool, question = sys.argv[1:]
tool, question = json.loads(tool), json.loads(question)
for provider in ("openai", "hosted_vllm"):
    asked = {"model": provider + "/" + name, "api_base": url + "/v1", "api_key": "none"}
    asked |= {"temperature": 0, "tools": [tool]}
    whole = litellm.completion(messages=question, **asked).choices[0]
    assert whole.finish_reason == "tool_calls", whole
    (call,) = whole.message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Havana"}, call
    chunks = list(litellm.completion(messages=question, stream=True, **asked))
    joined = litellm.stream_chunk_builder(chunks).choices[0].message
    assert joined.tool_calls[0].function == call.function, joined
    assert joined.reasoning_content == whole.message.reasoning_content
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"temp": 94, "sky": "cloudy"}'}
    history = [*question, whole.message.model_dump(exclude_none=True), result]
    assert "94" in litellm.completion(messages=history, **asked).choices[0].message.content
    response = litellm.responses(input=question, **{**asked, "tools": [{"type": "function", **tool["function"]}]})
    assert response.output[-1].name == "get_weather", response
asked["model"] = "openai/" + name
try:
    litellm.completion(messages=[{"role": "user", "content": "x" * 60000}], **asked)
except litellm.ContextWindowExceededError:
    pass
else:
    raise AssertionError("no error")
"""


@pytest.mark.litellm
def test_litellm(server):
    command = [sys.executable, "-W", "ignore", "-c", LITELLM, server.url, NAME, json.dumps(TOOL), json.dumps(WEATHER)]
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@pytest.mark.clients
@pytest.mark.parametrize("script", [LANGCHAIN, ANTHROPIC], ids=["langchain", "anthropic"])
def test_the_larger_clients(server, script):
    command = [sys.executable, "-W", "ignore", "-c", script, server.url, NAME]
    environment = {**os.environ, "NVIDIA_API_KEY": "none"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
