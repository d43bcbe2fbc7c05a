"""What readiness promises: no request waits for a compiler, whatever it asks for, and a folder of programs survives."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import pytest
from adapters import lora_config, trained
from serving import PARAMETERS, TOOL, WEATHER, Serving

from stepjax.adapters.peft import export_adapter
from stepjax.cache_folder import TEMPORARY
from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.load import load

ROOT = Path(__file__).resolve().parent.parent
CONFIG = EngineConfig(
    num_slots=4, context=2048, num_pages=80, widths=(16, 64), token_budget=64,
    adapter_slots=2, adapter_rank=6, adapter_expert_rank=3,
)  # fmt: skip
SCHEMA = {"type": "json_schema", "json_schema": {"name": "place", "schema": PARAMETERS}}
# Each adds to a chat request; a request takes some of them at random, and at most one form of its answer.
OPTIONS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "temperature": lambda rng: {"temperature": rng.choice([0, 0.7, 1.5])},
    "top_p": lambda rng: {"top_p": rng.uniform(0.1, 1)},
    "top_k": lambda rng: {"top_k": rng.randint(0, 50)},
    "min_p": lambda rng: {"min_p": rng.uniform(0, 0.5)},
    "seed": lambda rng: {"seed": rng.randint(0, 2**40)},
    "n": lambda rng: {"n": rng.randint(1, 4)},
    "stop": lambda rng: {"stop": rng.choice(["7", ["carry", "="]]), "include_stop_str_in_output": True},
    "stop_token_ids": lambda rng: {"stop_token_ids": rng.sample(range(100), rng.randint(1, 9))},
    "min_tokens": lambda rng: {"min_tokens": rng.randint(1, 4)},
    "ignore_eos": lambda rng: {"ignore_eos": True},
    "repetition_penalty": lambda rng: {"repetition_penalty": rng.uniform(0.5, 2)},
    "presence_penalty": lambda rng: {"presence_penalty": rng.uniform(-2, 2)},
    "frequency_penalty": lambda rng: {"frequency_penalty": rng.uniform(-2, 2)},
    "logit_bias": lambda rng: {"logit_bias": {str(rng.randrange(500)): 3 for _ in range(rng.choice([1, 20, 200]))}},
    "allowed_token_ids": lambda rng: {"allowed_token_ids": rng.sample(range(500), rng.choice([1, 30, 400]))},
    "prompt_logprobs": lambda rng: {"prompt_logprobs": rng.randint(0, 5)},
    "logprobs": lambda rng: {"logprobs": True, "top_logprobs": rng.randint(0, 20)},
    "thinking": lambda rng: {"thinking_token_budget": rng.randint(0, 8)},
    "priority": lambda rng: {"priority": rng.randint(-3, 3)},
    "cache_salt": lambda rng: {"cache_salt": rng.choice("ab")},
    "truncate": lambda rng: {"truncate_prompt_tokens": rng.randint(1, 40)},
    "stream": lambda rng: {"stream": True, "stream_options": {"include_usage": True}},
    "adapter": lambda rng: {"model": rng.choice(["a", "b"])},
}
FORMS: tuple[dict[str, Any], ...] = (
    {"response_format": SCHEMA},
    {"response_format": {"type": "json_object"}},
    {"guided_regex": "[0-9]{1,6}"},
    {"guided_choice": ["yes", "no"]},
    {"messages": WEATHER, "tools": [TOOL], "tool_choice": "required"},
    {"messages": WEATHER, "tools": [TOOL]},
)


def request(rng: random.Random) -> dict[str, Any]:
    """A chat with a prompt of some 20 to 1,200 tokens and options at random."""
    sums = " ".join(f"{rng.randint(1, 999)} + {rng.randint(1, 999)}" for _ in range(rng.choice([1, 1, 3, 12, 100])))
    body: dict[str, Any] = {"messages": [{"role": "user", "content": f"What is {sums}?"}], "max_tokens": 12}
    for name in rng.sample(sorted(OPTIONS), rng.randint(0, 6)):
        body |= OPTIONS[name](rng)
    return body | rng.choice(FORMS) if rng.random() < 0.3 else body


def ask(server: Serving, body: dict[str, Any]) -> None:
    response = server.post("/v1/chat/completions", body)
    # Options may contradict each other, such as a grammar and allowed tokens; that must be said, not fail.
    assert response.status_code == 200 or response.status_code == 400, (json.dumps(body), response.text)


@pytest.mark.slow
@pytest.mark.long
def test_no_request_waits_for_a_compiler(tmp_path, caplog):
    """500 requests with every option in a seeded order, eight at a time, while a thread compiles what steps want."""
    session, lora = load("step-tiny", dtype="float32"), lora_config()
    with Serving(session, CONFIG, adapter_updates=True) as server:
        for seed, name in enumerate("ab"):
            factors = trained(session.config, lora, seed=seed)
            folder = export_adapter(tmp_path / name, session.config, factors, lora)
            body = {"lora_name": name, "lora_path": str(folder)}
            assert server.post("/v1/load_lora_adapter", body).status_code == 200
        rng = random.Random(16)
        bodies = [request(rng) for _ in range(500)]
        used = {name for body in bodies for name in body}
        assert used >= {key for make in OPTIONS.values() for key in make(rng)} | {key for form in FORMS for key in form}
        with jax.log_compiles(), caplog.at_level(logging.INFO), ThreadPoolExecutor(8) as pool:
            for _ in pool.map(lambda body: ask(server, body), bodies):
                pass
    compiled = [record for record in caplog.records if re.match(r"compil", record.getMessage(), re.IGNORECASE)]
    assert [record.getMessage() for record in compiled if record.threadName != "compile"] == []
    assert server.exit_code == 0


class Command:
    """``stepjax serve`` with little to compile, on a folder of programs of its own."""

    def __init__(self, root: Path):
        flags = "--port 0 --max-seqs 1 --context 128 --speculate 0 --log-level debug".split()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "STEPJAX_CACHE_DIR": str(root)}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stepjax", "serve", "step-tiny", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(self.process.stderr)

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        assert any("curl" in line for line in self.process.stdout), "".join(self.log)

    def kill_while_it_writes(self, folder: Path) -> None:
        """With SIGKILL, as soon as a file is there that it has not put in place yet."""
        deadline, prefix = time.monotonic() + 900, f"{TEMPORARY}{self.process.pid}-"
        while not any(name.startswith(prefix) for name in (os.listdir(folder) if folder.is_dir() else ())):
            assert time.monotonic() < deadline
            assert self.process.poll() is None, "".join(self.log)
            time.sleep(0.0002)
        self.process.send_signal(signal.SIGKILL)
        assert self.process.wait(60) == -signal.SIGKILL

    def end(self) -> str:
        """Its log."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(300) == 0
        self.close()
        return "".join(self.log)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(60)
        self._reader.join(60)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


@pytest.mark.slow
@pytest.mark.long
def test_servers_share_a_folder_of_programs_and_may_be_killed(tmp_path):
    """Two at once on an empty folder, one killed in the middle of a write; both start again without compiling."""
    root = tmp_path / "cache"
    commands = [Command(root), Command(root)]
    try:
        killed, kept = commands
        killed.kill_while_it_writes(root / "programs")
        kept.wait_until_ready()
        assert "program cache: compiled" in kept.end()
        again = [Command(root), Command(root)]
        commands += again
        for command in again:
            command.wait_until_ready()
        for command in again:
            log = command.end()
            assert "program cache: loaded" in log
            assert "program cache: compiled" not in log
            assert "cannot be used" not in log
    finally:
        for command in commands:
            command.close()
