"""``stepjax chat``: through a pipe, and on a terminal with Ctrl-C and Ctrl-D."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import select
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import speaking_folder

from stepjax.cli import main
from stepjax.infer.commands.chat import Conversation
from stepjax.infer.load import load
from stepjax.infer.sampling.params import SamplingParams

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return speaking_folder(tmp_path_factory.mktemp("whole") / "model")


def talk(monkeypatch, said: str, *flags: object) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    return main(["chat", "--max-tokens", "40", "--temperature", "0", *map(str, flags)])


@pytest.mark.slow
def test_a_conversation_through_a_pipe(capsys, monkeypatch):
    assert talk(monkeypatch, "\nWhat is 467 + 358?\n/help\n/what now\n/reset\n/exit\nWhat is 1 + 1?\n") == 0
    out = capsys.readouterr().out
    assert out.count("825") == 1
    assert (
        out.index("825")
        < out.index("Ctrl-C stops an answer")
        < out.index("/what is not a command")
        < out.index("(forgotten)")
    )
    assert out.endswith("(forgotten)\n")
    assert talk(monkeypatch, "") == 0  # the end of the input


def test_chat_refuses_at_the_start_what_no_answer_could_do(capsys, monkeypatch, whole, tmp_path):
    bare = shutil.copytree(whole, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    assert talk(monkeypatch, "hello\n", "--model", bare) == 1
    assert "no tokenizer.json" in capsys.readouterr().err
    assert talk(monkeypatch, "hello\n", "--speculate", 9) == 1
    assert "speculate: is 9" in capsys.readouterr().err


@pytest.mark.slow
def test_a_message_that_cannot_be_answered_leaves_the_conversation_as_it_was(capsys, whole):
    session = load(whole, dtype="float32")
    chat = Conversation(session, SamplingParams(max_tokens=2), system="s", speculate=0)
    chat.answer("x" * 20_000)
    assert "context is 8192" in capsys.readouterr().err
    assert chat.messages == [{"role": "system", "content": "s"}]
    chat.answer("hi")
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]


class Terminal:
    """A process on a terminal of its own, so that Ctrl-C and Ctrl-D are what they are."""

    START = (  # with Ctrl-C as at a terminal: a shell's background jobs, and their children, ignore it
        "import fcntl, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from stepjax.cli import main; sys.exit(main(sys.argv[1:]))"
    )

    def __init__(self, *args: object):
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, b"\x28\0\xc8\0\0\0\0\0")  # 40 lines of 200 characters
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
        env.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.START, *map(str, args)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env=env,
        )
        os.close(theirs)
        self._unread = b""

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def until(self, expected: str, seconds: float = 240) -> str:
        """What is shown up to and with ``expected``."""
        deadline = time.monotonic() + seconds
        while expected.encode() not in self._unread:
            ready, _, _ = select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{expected!r} did not come; shown: {self._unread[-2000:]!r}"
            try:
                self._unread += os.read(self._ours, 65536)
            except OSError:  # the other side was closed
                pytest.fail(f"{expected!r} did not come before the end; shown: {self._unread[-2000:]!r}")
        shown, _, self._unread = self._unread.partition(expected.encode())
        return (shown + expected.encode()).decode(errors="replace")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def terminal(whole) -> Iterator[Terminal]:
    one = Terminal("chat", "--model", whole, "--temperature", "0", "--max-tokens", "4000", "--speculate", "0")
    yield one
    one.close()


@pytest.mark.long
@pytest.mark.slow
def test_chat_on_a_terminal(terminal):
    terminal.until("Ctrl-C stops an answer")
    terminal.until("> ")
    terminal.type("half a line")
    terminal.until("half a line")
    time.sleep(0.5)  # Python's readline misses an interrupt that comes before it waits for keys
    terminal.type("\x03")  # drops the line
    terminal.until("> ")
    terminal.type("/help\n")
    terminal.until("/reset forgets the conversation")
    terminal.until("> ")
    for _ in range(2):
        terminal.type("hello\n")
        shown = terminal.until("\x1b[2m")  # the thinking, which has no end here, is dimmed
        assert "(stopped)" not in shown
        terminal.type("\x03")
        terminal.until("(stopped)", 60)
        terminal.until("> ")
    terminal.type("/reset\n")
    terminal.until("(forgotten)")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.process.wait(60) == 0
