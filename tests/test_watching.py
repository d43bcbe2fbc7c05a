"""The watchdog alone, without jax: how processes meet, and that nothing keeps a lost one's peers from ending."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from ports import two_free_ports

from stepjax.sharding.watchdog import EXIT_CODE

ROOT = Path(__file__).resolve().parent.parent


class Watching:
    """Processes that run ``watching.py``; those of a group meet at the same port."""

    def __init__(self, ended: ExitStack):
        self._ended, self.port = ended, two_free_ports()

    def start(
        self, process: int, *, of: int = 2, task: str = "idle", host: str = "localhost", stderr: int = subprocess.PIPE
    ) -> subprocess.Popen[bytes]:
        words = [host, self.port, of, process, 2, task]
        started = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "watching.py"), *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self._ended.enter_context(started)
        self._ended.callback(started.kill)
        return started


@pytest.fixture
def group() -> Iterator[Watching]:
    with ExitStack() as ended:
        yield Watching(ended)


def ready(*processes: subprocess.Popen[bytes]) -> None:
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"


def test_early_processes_wait_for_a_late_one(group):
    """For longer than the silence that ends them later; one of them is even started again meanwhile."""
    early = [group.start(0, of=3), group.start(1, of=3)]
    time.sleep(3)
    early[1].kill()
    early[1].wait()
    early[1] = group.start(1, of=3)
    time.sleep(1)
    assert [process.poll() for process in early] == [None, None]
    late = group.start(2, of=3)
    ready(*early, late)
    time.sleep(3)
    assert [process.poll() for process in (*early, late)] == [None] * 3
    late.kill()
    assert [process.wait(10) for process in early] == [EXIT_CODE] * 2


def test_processes_may_end_seconds_apart(group):
    assert [process.wait(20) for process in [group.start(j, of=3, task="end") for j in range(3)]] == [0, 0, 0]


@pytest.mark.parametrize("full", [False, True])
def test_nobody_needs_to_read_the_last_words(group, full):
    """stderr is a pipe whose reader has gone, or has stopped reading."""
    reader, writer = os.pipe()
    first, second = group.start(0), group.start(1, stderr=writer)
    ready(first, second)
    if full:
        os.set_blocking(writer, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writer, bytes(4096))
        os.set_blocking(writer, True)
    else:
        os.close(reader)
    first.kill()
    assert second.wait(10) == EXIT_CODE
    os.close(writer)
    if full:
        os.close(reader)


def test_a_process_that_never_gives_up_its_lock_ends_as_well(group):
    first, second = group.start(0, task="lock"), group.start(1, task="lock")
    assert first.wait(15) == EXIT_CODE
    assert second.wait(15) == 1  # by faulthandler, from outside Python
    assert second.stderr
    assert b"watching.py" in second.stderr.read()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this host speaks IPv4 only")
def test_addresses_of_six(group):
    """The listener takes both kinds."""
    processes = [group.start(0, of=3), group.start(1, of=3, host="::1"), group.start(2, of=3, host="127.0.0.1")]
    ready(*processes)
