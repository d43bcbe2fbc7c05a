"""Every block of code in the README runs, or says why not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)


class Block(NamedTuple):
    """A fenced block, its language and what the comment above it says."""

    mark: str
    language: str
    code: str


def blocks() -> list[Block]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [Block(found["mark"] or "", found["language"], found["code"]) for found in BLOCK.finditer(text)]


RUN = [block for block in blocks() if block.language in ("bash", "python") and not block.mark]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the blocks run, one after the other as a reader would; ``stepjax`` there is this checkout's."""
    home = tmp_path_factory.mktemp("reader")
    command = home / "bin" / "stepjax"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m stepjax "$@"\n')
    command.chmod(0o755)
    return home


def test_every_block_runs_or_says_why_not():
    marks = [block.mark for block in blocks() if block.mark]
    assert marks
    assert all(re.fullmatch(r"ci: (test|generate)|not run: .+|output", mark) for mark in marks)
    assert {block.language for block in blocks()} <= {"bash", "python", "text", "json"}
    assert len(RUN) >= 5


@pytest.mark.parametrize("block", RUN, ids=[f"{i}: {block.code.splitlines()[0][:50]}" for i, block in enumerate(RUN)])
def test_a_block_runs(folder, block):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    command = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
    done = subprocess.run(
        [*command, block.code], capture_output=True, text=True, cwd=folder, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout
