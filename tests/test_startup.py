"""The stages of a start: what terminals, logs and /health show of them, and what answers while the model loads."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import time
from typing import Any

import httpx
import pytest
from rich.console import Console

from stepjax.cli import main
from stepjax.infer.commands.progress import StartBars
from stepjax.infer.serve.middleware import ApiKeys
from stepjax.infer.serve.replies import warming_up
from stepjax.infer.serve.server import Gate
from stepjax.startup import StartLines, Startup


def test_stages_say_how_far_they_are():
    startup = Startup()
    assert startup.name == "starting"
    with startup.stage("loading", "loading it", unit="bytes") as loading:
        loading.advance(2**20, 3 * 2**20)
        with startup.stage("compiling", "compiling it", unit="programs") as compiling:
            assert startup.name == "loading"
            assert compiling.count == ""
            compiling.advance(1, 4)
            assert startup.as_dict()["stages"][1].items() >= {"stage": "compiling", "done": 1, "total": 4}.items()
            text = str(warming_up(startup))
    assert loading.count == "1.0 of 3.0 MiB"
    assert text == "the server is warming up; loading it 1.0 of 3.0 MiB; compiling it 1 of 4 programs"
    assert startup.name == "compiling"  # the last, when none runs
    assert not any(stage["running"] for stage in startup.as_dict()["stages"])
    assert str(warming_up(startup)) == "the server is warming up"


def test_lines_for_a_log():
    lines: list[str] = []
    startup = Startup(StartLines(lines.append))
    with startup.stage("loading", "loading it", unit="bytes") as stage:
        for part in range(3):
            stage.advance((1 + part) * 2**20, 3 * 2**20)
    with startup.stage("compiling", "compiling it", unit="programs") as stage:
        for done in range(3):
            stage.advance(done, 2)
    with pytest.raises(ValueError, match="bad"), startup.stage("building", "building it"):
        raise ValueError("bad")
    texts = [line.rpartition(" in ")[0] or line.partition(" after ")[0] for line in lines]
    assert texts == [
        "loading it",
        "loading it: done, 3.0 MiB",
        "compiling it",
        "compiling it: 1 of 2 programs",
        "compiling it: done, 2 programs",
        "building it",
    ]


def test_a_long_stage_is_not_silent():
    lines: list[str] = []
    startup = Startup(StartLines(lines.append, quiet_s=0.01))
    with startup.stage("compiling", "compiling it", unit="programs") as stage:
        stage.advance(0, 2)
        end = time.monotonic() + 60
        while len(lines) < 3 and time.monotonic() < end:
            time.sleep(0.01)
    assert lines[1].startswith("compiling it: 0 of 2 programs after ")


def test_bars_on_a_terminal_disappear():
    file = io.StringIO()
    startup = Startup(StartBars(Console(file=file, force_terminal=True, width=100)))
    for _ in range(2):  # a second one may follow later, as in a chat
        with startup.stage("loading", "loading it", unit="bytes") as stage:
            stage.advance(2**20, 2**21)
            with startup.stage("compiling", "compiling it", unit="programs"):
                pass
            stage.advance(2**21, 2**21)
        assert file.getvalue().rstrip("\r").endswith("\x1b[2K\x1b[?25h")  # the line is erased, the cursor is back
    assert "1.0 of 2.0 MiB" in file.getvalue() or "2.0 of 2.0 MiB" in file.getvalue()


@pytest.mark.slow
def test_generate_says_what_it_waits_for(capsys):
    assert main(["generate", "--tokens", _tokens("[[0, 5, 300]]"), "--max-tokens", "4", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["finish_reason"]
    stages = [line.split(": ")[1] for line in err.splitlines() if ": done" in line]
    assert stages == ["starting jax", "loading step-tiny", "preparing programs"]
    assert "preparing programs: done, 2 programs" in err


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def _tokens(text: str) -> str:
    with open("tokens.json", "w") as file:
        file.write(text)
    return "tokens.json"


def test_a_server_that_cannot_load_ends_with_the_reason(capsys):
    """After its socket is open: the error ends the process, as it would have before."""
    root, handlers = logging.getLogger(), logging.getLogger().handlers[:]
    level = root.level
    try:
        assert main(["serve", "step-tiny", "--port", "0", "--context", "1", "--max-seqs", "1"]) == 1
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    assert "context: is 1, expected 2 to 32768" in capsys.readouterr().err


class Application:
    """Notes what an ASGI application is told."""

    def __init__(self, *, fails: bool = False):
        self.told: list[str] = []
        self._fails = fails

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.told.append(scope["type"])
        if scope["type"] == "lifespan":
            self.told.append((await receive())["type"])
            if self._fails:
                await send({"type": "lifespan.startup.failed", "message": "no room"})
                return
            await send({"type": "lifespan.startup.complete"})
            self.told.append((await receive())["type"])
            await send({"type": "lifespan.shutdown.complete"})
            return
        await send({"type": "http.response.start", "status": 418, "headers": []})
        await send({"type": "http.response.body", "body": b""})


async def _lifespan(gate: Gate) -> tuple[asyncio.Queue[Any], asyncio.Future[None]]:
    """Start a gate as a server does; returns what it is told, and the call."""
    told, said = asyncio.Queue[Any](), asyncio.Queue[Any]()
    call = asyncio.ensure_future(gate({"type": "lifespan"}, told.get, said.put))
    await told.put({"type": "lifespan.startup"})
    assert (await said.get())["type"] == "lifespan.startup.complete"
    return told, call


def test_the_gate_answers_health_checks_until_the_application_takes_over(caplog):
    async def check() -> None:
        startup = Startup()
        gate = Gate(startup, ApiKeys(["key"]))
        told, call = await _lifespan(gate)
        client = httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://server")
        with startup.stage("compiling", "compiling it", unit="programs") as stage:
            stage.advance(1, 3)
            for path in ("/health", "/health/ready"):
                answer = await client.get(path)
                assert answer.status_code == 503
                assert answer.headers["retry-after"]
                body = answer.json()
                assert body["stage"] == "compiling"
                assert body["stages"][0].items() >= {"done": 1, "total": 3, "unit": "programs"}.items()
                assert body["error"]["code"] == "warming_up"
        assert (await client.get("/health/live")).status_code == 200
        assert (await client.post("/v1/chat/completions", json={})).status_code == 401
        refused = await client.post("/v1/chat/completions", json={}, headers={"x-api-key": "key"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "warming_up"
        anthropic = await client.post("/v1/messages", json={}, headers={"x-api-key": "key"})
        assert anthropic.json()["type"] == "error"
        application = Application()
        await gate.open(application)
        assert (await client.get("/health")).status_code == 418
        await told.put({"type": "lifespan.shutdown"})
        await call
        assert application.told == ["lifespan", "lifespan.startup", "http", "lifespan.shutdown"]

    with caplog.at_level(logging.INFO):
        asyncio.run(check())
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("stepjax")]
    assert any("/v1/messages" in line for line in lines)
    assert not any("/health" in line for line in lines)  # also while they say 503


def test_an_application_that_does_not_start_stays_outside():
    async def check() -> None:
        gate = Gate(Startup(), ApiKeys([]))
        told, call = await _lifespan(gate)
        with pytest.raises(RuntimeError, match="no room"):
            await gate.open(Application(fails=True))
        await told.put({"type": "lifespan.shutdown"})
        await call

    asyncio.run(check())
