"""``stepjax serve`` as a process: what it prints, what it logs, how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from stepjax.cli import main

ROOT = Path(__file__).resolve().parent.parent
QUESTION = {"messages": [{"role": "user", "content": "What is 467 + 358?"}], "temperature": 0, "max_tokens": 60}
SECRET = "sk-a-key-that-no-log-may-hold"


class Process:
    """The command, from its banner on."""

    def __init__(self, *flags: str, **environment: str):
        command = [sys.executable, "-m", "stepjax", "serve", "step-tiny", "--port", "0", "--max-seqs", "2"]
        self.process = subprocess.Popen(
            [*command, "--context", "2048", "--speculate", "3", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": os.environ["XLA_FLAGS"], **environment},
        )
        self.log: list[str] = []
        threading.Thread(target=self._read_log, daemon=True).start()
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


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 -subj /CN=localhost"
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1"], cwd=folder, check=True, capture_output=True
    )
    return folder


@pytest.fixture
def plain() -> Iterator[Process]:
    one = Process("--log-format", "json", STEPJAX_API_KEY=SECRET)
    yield one
    one.process.kill()


def test_streams_end_and_the_process_with_them(plain):
    """SIGTERM while answers run: each ends by itself, the process with exit code 0, and nothing secret was logged."""
    headers = {"authorization": f"Bearer {SECRET}"}
    assert "step-tiny on" in plain.banner
    assert "answers together" in plain.banner
    assert SECRET not in plain.banner
    began = threading.Barrier(5)

    def stream(_: int) -> list[str]:
        lines = []
        address, body = f"{plain.url}/v1/chat/completions", {**QUESTION, "stream": True}
        with httpx.stream("POST", address, json=body, headers=headers, timeout=60) as found:
            for line in found.iter_lines():
                if not lines:
                    began.wait(60)
                lines.append(line)
        return [line for line in lines if line]

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(stream, at) for at in range(4)]
        began.wait(60)
        assert plain.end() == 0
        ended = [each.result() for each in running]
    for lines in ended:
        assert lines[-1] == "data: [DONE]"
        assert '"finish_reason":"stop"' in lines[-2]
    records = [json.loads(line) for line in plain.log]
    assert any("/v1/chat/completions status=200" in record["message"] for record in records)
    assert any("draining" in record["message"] for record in records)
    logged = "".join(plain.log)
    assert SECRET not in logged
    assert "467" not in logged


def test_the_line_for_the_shell_works_over_tls(certificate):
    one = Process("--tls-cert", str(certificate / "cert.pem"), "--tls-key", str(certificate / "key.pem"))
    try:
        line = next(line for line in one.banner.splitlines() if "curl" in line)
        command = f"{line} -s --cacert {certificate}/cert.pem"
        found = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
        assert json.loads(found.stdout)["choices"][0]["message"]["content"]
        assert one.end() == 0
    finally:
        one.process.kill()


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
