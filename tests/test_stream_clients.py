"""What other clients make of streams: each joins the same answer as it reads whole, whatever a step brings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted import SCRIPTS, ScriptedEngine
from serving import Serving

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}

ANTHROPIC = """
import anthropic
client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
tools = [{"name": "get_weather", "input_schema": schema}]
for top_k in range(1, count + 1):
    asked = {"model": "step-tiny", "max_tokens": 400, "messages": [{"role": "user", "content": "x"}], "tools": tools}
    asked["extra_body"] = {"top_k": top_k}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        final = stream.get_final_message()

    def said(message):
        blocks = [block.model_dump(exclude={"id", "parsed_output"}, exclude_none=True) for block in message.content]
        return blocks, message.stop_reason, message.usage.output_tokens

    assert said(final) == said(whole), (top_k, final, whole)
"""

LANGCHAIN = """
from langchain_nvidia_ai_endpoints import ChatNVIDIA
from langchain_openai import ChatOpenAI

tool = {"type": "function", "function": {"name": "get_weather", "description": "", "parameters": schema}}
for top_k in range(1, count + 1):
    nvidia = ChatNVIDIA(base_url=url + "/v1", api_key="none", model="step-tiny", max_tokens=400)
    openai = ChatOpenAI(base_url=url + "/v1", api_key="none", model="step-tiny", max_tokens=400, stream_usage=True)
    for chat, extra in ((openai, {"extra_body": {"top_k": top_k}}), (nvidia, {"top_k": top_k})):
        bound = chat.bind_tools([tool]).bind(**extra)
        whole = bound.invoke("x")
        joined = None
        for chunk in bound.stream("x"):
            joined = chunk if joined is None else joined + chunk

        def said(message):
            calls = [(call["name"], call["args"]) for call in message.tool_calls]
            thought = message.additional_kwargs.get("reasoning_content")
            return message.content, calls, message.invalid_tool_calls, thought, message.usage_metadata["output_tokens"]

        assert said(joined) == said(whole), (top_k, type(chat), said(joined), said(whole))
"""

LITELLM = """
import litellm
tool = {"type": "function", "function": {"name": "get_weather", "description": "", "parameters": schema}}
for top_k in range(1, count + 1):
    asked = {"model": "hosted_vllm/step-tiny", "api_base": url + "/v1", "api_key": "none", "max_tokens": 400}
    asked |= {"messages": [{"role": "user", "content": "x"}], "tools": [tool], "top_k": top_k}
    whole = litellm.completion(**asked)
    chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    joined = litellm.stream_chunk_builder(chunks)

    def said(answer):
        choice = answer.choices[0]
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
        thought = getattr(choice.message, "reasoning_content", None)
        return choice.message.content or "", calls, thought, answer.usage.completion_tokens

    assert said(joined) == said(whole), (top_k, said(joined), said(whole))
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == [whole.choices[0].finish_reason], (top_k, reasons)  # the builder takes that of the usage chunk
"""

NODE = """
import assert from "node:assert";
import OpenAI from "openai";
import { generateText, jsonSchema, streamText, tool } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";

const [url, count, schema] = [process.argv[2], Number(process.argv[3]), JSON.parse(process.argv[4])];
const client = new OpenAI({ baseURL: url + "/v1", apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "x" }];
for (let top_k = 1; top_k <= count; top_k++) {
  const tools = [{ type: "function", function: { name: "get_weather", parameters: schema } }];
  const asked = { model: "step-tiny", messages, max_tokens: 400, tools, top_k };
  const whole = await client.chat.completions.create(asked);
  const joined = await client.chat.completions.stream(asked).finalChatCompletion();
  const said = (answer) => {
    const { finish_reason, message } = answer.choices[0];
    const calls = (message.tool_calls ?? []).map((call) => [call.function.name, call.function.arguments]);
    return [message.content ?? "", calls, finish_reason]; // of fields it does not know, it keeps the last delta
  };
  assert.deepEqual(said(joined), said(whole));

  const fetchWith = (address, init) => {
    return fetch(address, { ...init, body: JSON.stringify({ ...JSON.parse(init.body), top_k }) });
  };
  const provider = createOpenAICompatible({ name: "stepjax", baseURL: url + "/v1", apiKey: "none", fetch: fetchWith });
  const options = { model: provider("step-tiny"), prompt: "x", maxOutputTokens: 400, maxRetries: 0 };
  options.tools = { get_weather: tool({ inputSchema: jsonSchema(schema) }) };
  const generated = await generateText(options);
  const stream = streamText({ ...options, onError: ({ error }) => { throw error; } });
  const told = async (result) => [
    await result.text, await result.reasoningText, await result.finishReason,
    (await result.toolCalls).map((call) => [call.toolName, call.input]),
  ];
  assert.deepEqual(await told(stream), await told(generated));
}
"""


@pytest.fixture(scope="module", params=[1, 4, 300], ids="{} tokens a step".format)
def scripted(request, step_tiny) -> Iterator[Serving]:
    with Serving(step_tiny, engine=ScriptedEngine(step_tiny)) as serving:
        assert isinstance(serving.engine, ScriptedEngine)
        serving.engine.most, serving.engine.reader = request.param, serving.loop
        yield serving


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(ANTHROPIC, id="anthropic", marks=pytest.mark.clients),
        pytest.param(LANGCHAIN, id="langchain", marks=pytest.mark.clients),
        pytest.param(LITELLM, id="litellm", marks=pytest.mark.litellm),
    ],
)
def test_a_client_joins_what_it_reads_whole(scripted, script):
    given = f"url, count, schema = {scripted.url!r}, {len(SCRIPTS)}, {SCHEMA!r}\n"
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    command = [sys.executable, "-W", "ignore", "-c", given + script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """A folder with npm's clients; kept between runs, since only the first may need a network."""
    folder = Path("~/.cache/stepjax/node-streams").expanduser()
    if not (folder / "node_modules" / "ai").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        names = ["openai@6", "ai@5", "@ai-sdk/openai-compatible@1", "zod@4"]
        command = ["npm", "install", "--no-audit", "--no-fund", *names]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            pytest.skip(f"npm does not have them: {done.stderr[-300:]}")
    home = tmp_path_factory.mktemp("node")
    (home / "node_modules").symlink_to(folder / "node_modules")
    return home


@pytest.mark.slow
@pytest.mark.node
def test_the_clients_of_node_join_what_they_read_whole(scripted, packages):
    node = shutil.which("node")
    assert node
    script = packages / "streams.mjs"
    script.write_text(NODE)
    command = [node, str(script), scripted.url, str(len(SCRIPTS)), json.dumps(SCHEMA)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
