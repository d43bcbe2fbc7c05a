"""Real agents, set up as docs/serving.md says: each runs a command of the model's, reads its result, and ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from agents import executable, scripted_calls
from serving import NAME, Serving

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
SNIPPETS = dict(re.findall(r"<!-- agent: (\w+) -->\n```\w+\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
COMMAND = "echo 825 > made.txt; echo made $((800 + 25))"
# The tools by which the agents run commands.
SCRIPT = {
    "exec_command": {"cmd": COMMAND},
    "Bash": {"command": COMMAND},
    "bash": {"command": COMMAND, "description": "Makes a file"},
}
TEXT = "The file is made."
ASKED = "Write 825 to made.txt"


def environment(home: Path) -> dict[str, str]:
    """Of a user who has nothing set up; no agent then looks for its own service."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TERM") if name in os.environ}
    return {**kept, "HOME": str(home), "XDG_CONFIG_HOME": str(home / ".config"), "IS_SANDBOX": "1"}


def run(command: list[str], folder: Path, variables: dict[str, str]) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def home(tmp_path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A project, which agents look for by its .git."""
    project = tmp_path / "project"
    project.mkdir()
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    return project


def codex(server, home: Path, folder: Path, *, model: str = NAME) -> str:
    (home / ".codex").mkdir(parents=True)
    (home / ".codex" / "config.toml").write_text(snippet("codex", server).replace(NAME, model))
    command = [str(executable("codex")), "exec", "--dangerously-bypass-approvals-and-sandbox", ASKED]
    return run(command, folder, environment(home))


def claude(server, home: Path, folder: Path) -> str:
    home.mkdir()
    path = Path(str(executable("claude"))).parent
    variables = environment(home)
    script = snippet("claude", server).replace("What is in this folder?", ASKED)
    return run(["bash", "-euc", script], folder, {**variables, "PATH": f"{path}:{variables['PATH']}"})


def opencode(server, home: Path, folder: Path) -> str:
    home.mkdir()
    (folder / "opencode.json").write_text(snippet("opencode", server))
    return run([str(executable("opencode")), "run", ASKED], folder, environment(home))


def snippet(name: str, server) -> str:
    assert SNIPPETS[name].count("http://localhost:8000") == 1
    assert NAME in SNIPPETS[name]
    return SNIPPETS[name].replace("http://localhost:8000", server.url)


def test_the_page_has_a_snippet_for_each():
    assert set(SNIPPETS) == {"codex", "claude", "opencode"}


@pytest.mark.agents
def test_codex_searches_for_tools_and_patches_a_file(step_tiny, home, folder):
    """Under the name of a model that it knows, Codex offers a custom tool, and a search instead of namespaces."""
    patch = "*** Begin Patch\n*** Add File: made.txt\n+825\n*** End Patch\n"
    with Serving(step_tiny, names=("gpt-5.5",)) as server:
        with scripted_calls({"apply_patch": {"input": patch}}, TEXT):
            assert TEXT in codex(server, home / "patch", folder, model="gpt-5.5")
        assert (folder / "made.txt").read_text() == "825\n"
        with scripted_calls({"tool_search": {"query": "spawn agent"}}, TEXT) as chats:
            assert TEXT in codex(server, home / "search", folder, model="gpt-5.5")
    first, second = ({tool["function"]["name"] for tool in body.tools or ()} for body in chats[-2:])
    assert "multi_agent_v1__spawn_agent" in second - first


def conversation(body: Any) -> list[Any]:
    """The messages of a chat without ids, which no prompt holds."""
    return json.loads(re.sub(r'"call_[0-9a-f]+"', '"call"', json.dumps(body.messages)))


@pytest.mark.agents
@pytest.mark.parametrize("agent", [codex, claude, opencode], ids=lambda agent: agent.__name__)
def test_an_agent_completes_a_turn_with_a_call(server, home, folder, agent):
    with scripted_calls(SCRIPT, TEXT) as chats:
        printed = agent(server, home, folder)
    assert TEXT in printed
    assert (folder / "made.txt").read_text() == "825\n"
    first, second = (conversation(body) for body in chats[-2:])
    assert second[: len(first)] == first  # the prefix cache finds the whole first prompt
    answer, result = second[len(first) :]
    assert json.loads(json.dumps(answer["tool_calls"][0]["function"]["arguments"]))
    assert answer["reasoning_content"].strip()
    assert "made 825" in result["content"]
    assert "billing" not in json.dumps(second)
