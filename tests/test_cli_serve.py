"""``stepjax serve`` as a process: what it prints, what it logs, how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import psutil
import pytest

from stepjax.cli import main
from stepjax.infer.serve.server import Server, ServerConfig

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "What is 467 + 358?"
QUESTION = {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "max_tokens": 60}
SECRET = "sk-a-key-that-no-log-may-hold"


class Process:
    """The command, from its banner on. One answer at a time and a short context, for little to compile."""

    def __init__(self, *flags: str, **environment: str):
        command = [sys.executable, "-m", "stepjax", "serve", "step-tiny", "--port", "0", "--max-seqs", "1"]
        self.process = subprocess.Popen(
            [*command, "--context", "128", "--speculate", "3", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": os.environ["XLA_FLAGS"], **environment},
        )
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        self.banner = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.banner += line
            if "curl" in line:
                break
        found = re.search(r"^\s*(https?://\S+)$", self.banner, re.MULTILINE)
        assert found, "".join(self.log)
        self.url = found[1]

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(self.process.stderr)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(60)
        self._reader.join(60)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


@pytest.fixture
def certificate(tmp_path) -> Path:
    command = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 -subj /CN=localhost"
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1"], cwd=tmp_path, check=True, capture_output=True
    )
    return tmp_path


@pytest.fixture
def process(certificate) -> Iterator[Process]:
    files = ("--tls-cert", str(certificate / "cert.pem"), "--tls-key", str(certificate / "key.pem"))
    one = Process(*files, "--log-format", "json", STEPJAX_API_KEY=SECRET)
    yield one
    one.close()


def test_from_the_banner_to_the_signal(process, certificate):
    """The line for the shell works; then SIGTERM while answers run: each ends by itself, the process with exit code 0,
    and nothing secret was logged.
    """
    assert "step-tiny on 1 × cpu" in process.banner
    assert "1 answers together, context 128 tokens" in process.banner
    assert f"{process.url}/ in a browser" in process.banner
    assert SECRET not in process.banner
    line = next(line for line in process.banner.splitlines() if "curl" in line)
    found = subprocess.run(
        f"{line} -s --cacert {certificate}/cert.pem",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "STEPJAX_API_KEY": SECRET},
    )
    assert json.loads(found.stdout)["choices"][0]["message"]["content"]
    assert listening(process.process.pid) == {("127.0.0.1", int(process.url.rpartition(":")[2]))}

    headers = {"authorization": f"Bearer {SECRET}"}
    trusted = ssl.create_default_context(cafile=certificate / "cert.pem")
    began = threading.Barrier(5)

    def stream(_: int) -> list[str]:
        lines = []
        address, body = f"{process.url}/v1/chat/completions", {**QUESTION, "stream": True}
        with httpx.stream("POST", address, json=body, headers=headers, timeout=60, verify=trusted) as answer:
            for each in answer.iter_lines():
                if not lines:
                    began.wait(60)
                lines.append(each)
        return [each for each in lines if each]

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(stream, at) for at in range(4)]
        began.wait(60)
        assert process.end() == 0
        ended = [each.result() for each in running]
    for lines in ended:
        assert lines[-1] == "data: [DONE]"
        assert '"finish_reason":"stop"' in lines[-2]
    process.close()
    records = [json.loads(each) for each in process.log]
    assert any("/v1/chat/completions status=200" in record["message"] for record in records)
    assert any("draining" in record["message"] for record in records)
    start = [record["message"] for record in records if record["logger"] == "stepjax.infer.commands.serve"]
    assert start[0].startswith(f"listening on {process.url}")  # before jax is imported
    done = [line.partition(": done")[0] for line in start if ": done" in line]
    assert done[:3] == ["starting jax", "loading step-tiny", "building the engine"]
    assert sorted(done[3:]) == ["preparing programs", "starting the compiler of grammars"]
    assert start[-1].startswith("ready after")
    logged = "".join(process.log)
    assert SECRET not in logged
    assert PROMPT not in logged
    # A request's id, its duration and a record's time are digits that may hold any of the prompt's by chance.
    assert "467" not in "".join(re.sub(r"\b(id|seconds)=\S+", "", record["message"]) for record in records)


def test_a_signal_before_the_start_is_complete_ends_at_once(monkeypatch):
    """While programs are compiled, which nothing can interrupt."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: SimpleNamespace(call_soon_threadsafe=lambda *_: None))
    service: Any = SimpleNamespace(ready=asyncio.Event())
    server = Server(cast(Any, None), service, ServerConfig())
    server.handle_exit(signal.SIGTERM, None)
    assert codes == [0]
    service.ready.set()
    Server(cast(Any, None), service, ServerConfig()).handle_exit(signal.SIGTERM, None)
    assert codes == [0]


def listening(pid: int) -> set[tuple[str, int]]:
    """Addresses that a process and its children accept connections on."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    sockets = [each for one in family for each in one.net_connections("inet") if each.status == psutil.CONN_LISTEN]
    return {(each.laddr.ip, each.laddr.port) for each in sockets}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tls-cert", "cert.pem"], "expected both or none"),
        (["--api-key", "two words"], "API key"),
        (["--api-key-file", "no-such-file"], "no-such-file"),
        (["no-such-model"], "no-such-model"),
    ],
)
def test_bad_flags_are_refused_before_the_weights_are_read(capsys, flags, said):
    assert main(["serve", *flags]) == 1
    assert said in capsys.readouterr().err
