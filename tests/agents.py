"""Agents from npm, and answers by a script, so that a model of a million parameters can take part in an agent's turn.

The script is a grammar: the model is held to a call of the agent's own tool, and after its result to a text. Everything
else is as for any request. ``python tests/agents.py`` installs the agents (1.1 GB) where the tests look for them.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from stepjax.infer.engine.engine import Engine
    from stepjax.infer.guided.guide import Constraint
    from stepjax.infer.serve.schemas import ChatRequest, SampledRequest
    from stepjax.infer.serve.service import EngineRequest
    from stepjax.infer.session import Session

FOLDER = Path("~/.cache/stepjax/agents").expanduser()
PACKAGES = {
    "codex": "@openai/codex@0.171.0",
    "claude": "@anthropic-ai/claude-code@2.1.197",
    "opencode": "opencode-ai@1.18.33",
}
THINKING = 8  # tokens
# What the model sees instead of an agent's prompt, which is read, rendered and tokenised, but would take minutes.
QUESTION = [{"role": "user", "content": "What is 467 + 358?"}]


def executable(name: str) -> str | None:
    """The path of an installed agent."""
    return shutil.which(name, path=FOLDER / "node_modules" / ".bin") or shutil.which(name)


@contextmanager
def scripted_calls(arguments: Mapping[str, Mapping[str, str]], text: str) -> Iterator[list[ChatRequest]]:
    """While this is open, an answer calls the first of these tools that is offered, and is ``text`` after a result.

    Args:
      arguments: of each tool, by its name.

    Yields:
      The requests with tools, as they come.
    """
    from stepjax.infer.guided.guide import Constraint
    from stepjax.infer.guided.schema_grammar import choice, grammar_of
    from stepjax.infer.guided.tool_grammar import tool_calls
    from stepjax.infer.serve import requests
    from stepjax.infer.serve.schemas import ChatRequest

    chats: list[ChatRequest] = []

    def constraint_of(
        session: Session,
        body: SampledRequest,
        *,
        in_reasoning: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Constraint:
        if tools and isinstance(body, ChatRequest):
            chats.append(body.model_copy())  # the server frees the messages of its own
        functions = {tool["function"]["name"] for tool in tools or ()}
        name = next((name for name in arguments if name in functions), None)
        returned = any(message["role"] == "tool" for message in getattr(body, "messages", ()))
        content = calls = None
        if name is None or returned:
            content = choice([text], "script")
        else:
            properties = {key: {"const": value} for key, value in arguments[name].items()}
            schema = {"type": "object", "properties": properties, "required": list(properties)}
            calls = tool_calls([{"function": {"name": name, "parameters": schema}}], several=False)
        grammar = grammar_of(content, calls, after_thinking=in_reasoning)
        return Constraint(
            session.masks,
            thinking=in_reasoning,
            budget=THINKING if in_reasoning else None,
            matcher=session.grammars.compile(grammar, name="script"),
            calls=calls is not None,
            ends=frozenset(session.grammars.eos_ids),
        )

    engine_request = requests.engine_request

    def short_request(
        engine: Engine, session: Session, body: SampledRequest, ids: list[int], **options: Any
    ) -> EngineRequest:
        body = body.model_copy(update={"temperature": 0})
        return engine_request(engine, session, body, session.encode_chat(QUESTION), **options)

    with mock.patch.multiple(requests, constraint_of=constraint_of, engine_request=short_request):
        yield chats


def install() -> None:
    """Install the agents, and run the scripts of theirs that npm may have left out."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", *PACKAGES.values()], cwd=FOLDER, check=True)
    for script in ("@anthropic-ai/claude-code/install.cjs", "opencode-ai/postinstall.mjs"):
        subprocess.run(["node", FOLDER / "node_modules" / script], cwd=FOLDER, check=True)


if __name__ == "__main__":
    install()
