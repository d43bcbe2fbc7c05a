"""The watchdog alone, without jax: how processes meet, and that nothing keeps a lost one's peers from ending."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from ports import two_free_ports

from stepjax.errors import ClusterError
from stepjax.sharding import watchdog
from stepjax.sharding.listener import Listener, addresses
from stepjax.sharding.watchdog import EXIT_CODE, Watchdog

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_processes_may_end_seconds_apart(group):
    assert [process.wait(20) for process in [group.start(j, of=3, task="end") for j in range(3)]] == [0, 0, 0]


@pytest.mark.slow
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


@pytest.mark.slow
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


def joined(port: int, key: bytes) -> Watchdog:
    return Watchdog(("localhost", port), 2, 1, timeout_s=5, join_s=1, key=key)


@pytest.mark.slow
def test_who_has_another_key_cannot_join():
    """And does not take the place of the process that has it."""
    port = two_free_ports()
    leader = Watchdog(("localhost", port), 2, 0, timeout_s=5, join_s=20, key=b"right")
    entered: list[Watchdog] = []
    thread = threading.Thread(target=lambda: entered.append(leader.__enter__()))
    thread.start()
    for stranger in (b"wrong", b""):
        with pytest.raises(ClusterError, match=r"turned this one away; do both have the same STEPJAX_KEY"):
            joined(port, stranger).__enter__()
    for noise in (b"", b"1".ljust(16), b"1".ljust(16) + bytes(48), b"GET / HTTP/1.1\r\n\r\n" * 9):
        with socket.create_connection(("localhost", port)) as connection:
            connection.sendall(noise)
    follower = joined(port, b"right")
    follower.__enter__()
    thread.join(10)
    assert entered == [leader]
    assert watchdog.key() == b"right"
    for side in (follower, leader):
        side.__exit__(None, None, None)
    assert watchdog.key() == b""


@pytest.mark.slow
def test_who_listens_without_the_key_is_not_process_0():
    with Listener("localhost", 0, 1) as server:

        def impostor() -> None:
            connection = server.accept(10)
            connection.sendall(bytes(16))
            connection.recv(64)
            connection.sendall(bytes(32) + b".\n")
            connection.close()

        thread = threading.Thread(target=impostor)
        thread.start()
        lonely = Watchdog(("localhost", server.port), 2, 1, timeout_s=5, join_s=1, key=b"right")
        with pytest.raises(ClusterError, match="who listens there is not process 0 of this job"):
            lonely.__enter__()
        thread.join()


def test_process_0_listens_only_where_it_must():
    with Listener("localhost", 0, 1) as server:
        assert set(server.hosts) <= {"127.0.0.1", "::1"}
        assert server.port > 0
    with Listener("127.0.0.1", 0, 1) as server:
        assert set(server.hosts) <= {"127.0.0.1", "::1"}
    with Listener("no-such-host.invalid", 0, 1) as server:  # a name that only the others know
        assert server.hosts in (["::"], ["0.0.0.0"])
    assert addresses("192.0.2.1") == ["192.0.2.1"]
    with Listener("192.0.2.1", 0, 1) as server:  # an address that this host does not have, as behind a service
        assert server.hosts in (["::"], ["0.0.0.0"])


def test_a_name_of_this_host_that_means_a_loopback_address_means_all(monkeypatch):
    """As in the /etc/hosts of some distributions; from the others it could not be reached."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("127.0.1.1", 0))])
    assert addresses("this-host") == []
