"""A library with the interface of `verifiers` that the adapter uses; tests put it where that name is imported from."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from dataclasses import dataclass


@dataclass
class ClientConfig:
    api_base_url: str
    api_key_var: str
    max_retries: int = 10


class Rubric:
    def __init__(self, funcs, weights):
        self.funcs, self.weights = funcs, weights
        self.has_group_rewards = False

    async def score_rollout(self, state):
        state["metrics"], state["reward"] = {}, 0.0
        for function, weight in zip(self.funcs, self.weights, strict=True):
            try:
                value = float(await function(completion=state["completion"], answer=state["answer"]))
            except Exception:
                value = 0.0  # as the library does
            state["metrics"][function.__name__] = value
            state["reward"] += weight * value


def post(client: ClientConfig, messages: list, tools: list) -> dict:
    body = json.dumps({"model": "stepjax", "messages": messages, "tools": tools}).encode()
    request = urllib.request.Request(
        f"{client.api_base_url}/chat/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)["choices"][0]["message"]


class Environment:
    def __init__(self, *, rewrites: bool, fails: bool, grouped: bool):
        self.rewrites = rewrites

        def told(completion, answer):
            return answer in completion[-1]["content"]

        def turns(completion, answer):
            return 1 / 0 if fails else sum(message["role"] == "assistant" for message in completion)

        self.rubric = Rubric([told, turns], [1.0, 0.1])
        self.rubric.has_group_rewards = grouped

    def get_dataset(self):
        return [{"prompt": [{"role": "user", "content": f"Say {word}."}], "answer": word} for word in ("a", "b")]

    def get_eval_dataset(self):
        return [{"prompt": [{"role": "user", "content": "Say c."}], "answer": "c"}]

    async def rollout(self, row, client, model, sampling_args):
        messages = list(row["prompt"])
        begin = len(messages)
        state = {"answer": row["answer"], "error": None, "completion": []}
        for question in ("More?", None):
            try:
                answer = await asyncio.to_thread(post, client, messages, [])
            except urllib.error.HTTPError as error:
                state["error"] = None if "maximum context length" in error.read().decode() else error
                break
            messages = [*messages, {"role": "assistant", "content": answer["content"]}]
            if question:
                messages = [*messages, {"role": "user", "content": question}]
            if self.rewrites:
                messages = [{"role": "user", "content": "Something else."}, *messages[1:]]
        state["completion"] = messages[begin:]
        return state


def load_environment(name, *, rewrites=False, fails=False, grouped=False):
    if name != "echo":
        raise ValueError(f"Could not import {name!r} environment")
    return Environment(rewrites=rewrites, fails=fails, grouped=grouped)
