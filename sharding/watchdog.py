"""A thread in each process of a cluster that ends it when another is lost: never a silent hang.

jax notices a peer that died, but not one that is alive and stuck, and a collective waits for either without end. Here
every process tells process 0 once a second that it lives, and hears the same from it, over a connection of its own.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hmac
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

from stepjax.errors import ClusterError
from stepjax.sharding.listener import Listener

EXIT_CODE = 75  # of a process that ends because another was lost (EX_TEMPFAIL: starting all of them again may help)
BEAT_S = 1.0
GRACE_S = 3.0  # that a process has to end by itself after another said why it gives up
LAST_WORDS_S = 3.0  # at most, to print the reason: stderr may be a pipe that nobody reads
STARVED_S = 5.0  # beyond the timeout, after which a process whose lock this thread never gets ends, too

_HELLO, _NONCE, _PROOF = 16, 16, 32  # bytes of a process's number, of a random number and of a proof of the key
_ALIVE, _BYE, _FAILED = b".", b"bye", b"failed "


@dataclass
class _Peer:
    """A connection, and when it was last heard."""

    socket: socket.socket
    process: int
    heard: float = field(default_factory=time.monotonic)
    unread: bytes = b""
    welcome: bytes = b""  # by which process 0 shows that it has the key, too


class _Refused(ConnectionResetError):
    """The other side hung up, or showed that it lacks the key. That tells more than a timeout after it."""


class Watchdog:
    """Watches the other processes while its ``with`` block runs, and ends this one if one of them is lost.

    A process is lost when its connection closes without a goodbye, when it is silent for ``timeout_s``, or when it says
    that it failed. The stacks of all threads then go to stderr and the process exits with `EXIT_CODE`, even while its
    main thread waits inside a collective.

    Raises:
      ClusterError: on entry, when the processes do not find each other within ``join_s``.
    """

    def __init__(
        self,
        address: tuple[str, int],
        num_processes: int,
        process: int,
        *,
        timeout_s: float,
        join_s: float,
        key: bytes = b"",
    ):
        """
        Args:
          address: where process 0 listens.
          key: of the cluster. A process that does not have it cannot join.
        """
        self.process, self.key, self._num_processes = process, key, num_processes
        self._address, self._timeout_s, self._join_s = address, timeout_s, join_s
        self._peers: list[_Peer] = []
        self._lock = threading.Lock()  # of the sockets' sending side
        self._done = threading.Event()
        self._deadline: tuple[float, str] | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @property
    def host(self) -> str:
        """Where process 0 is."""
        return self._address[0]

    def __enter__(self) -> Self:
        try:
            self._peers = self._accept() if self.process == 0 else [self._connect()]
        except OSError as error:
            host, port = self._address
            raise ClusterError(
                f"{host}:{port}: the processes did not find each other within {self._join_s:.0f} s ({error}); is this "
                f"process 0's address and are all {self._num_processes} started?"
            ) from error
        self._arm()
        _running.append(self)
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.give_up(f"process {self.process} failed: {type(error).__name__}: {error}")
            return
        self._stop(_BYE)

    def give_up(self, reason: str) -> None:
        """Tell the others that this process ends without them, and why."""
        self._stop(_FAILED + reason.replace("\n", " ").encode()[:500])

    def expect(self, what: str | None, within_s: float = 0.0) -> None:
        """End this process unless a call with None follows within ``within_s`` seconds; ``what`` names the work."""
        self._deadline = (time.monotonic() + within_s, f"{what} took longer than {within_s:.0f} s") if what else None

    def _accept(self) -> list[_Peer]:
        peers: list[_Peer] = []
        deadline = time.monotonic() + self._join_s
        with Listener(*self._address, self._num_processes) as server:
            while missing := {*range(1, self._num_processes)} - {peer.process for peer in peers}:
                try:
                    connection = server.accept(deadline - time.monotonic())
                except TimeoutError:
                    raise TimeoutError(f"missing: process {', '.join(map(str, sorted(missing)))}") from None
                if peer := _introduced(connection, {*range(1, self._num_processes)}, self.key):
                    for old in [other for other in peers if other.process == peer.process]:  # that was started again
                        old.socket.close()
                        peers.remove(old)
                    peers.append(peer)
        now = time.monotonic()
        for peer in peers:
            peer.heard = now
            with contextlib.suppress(OSError):
                peer.socket.sendall(peer.welcome + _ALIVE + b"\n")  # tells it that all are here
        return peers

    def _connect(self) -> _Peer:
        deadline = time.monotonic() + self._join_s
        refusal: OSError | None = None
        while True:
            try:
                connection = socket.create_connection(self._address, timeout=5)
                try:
                    self._introduce(connection, deadline)
                except OSError:
                    connection.close()
                    raise
                return _Peer(connection, 0)
            except OSError as error:
                refusal = error if isinstance(error, _Refused) else refusal
                if time.monotonic() > deadline:
                    raise refusal or error from None
                time.sleep(0.2)

    def _introduce(self, connection: socket.socket, deadline: float) -> None:
        """Join process 0, which answers when all are here. OSError: it does not, or either side lacks the key."""
        name, nonce = f"{self.process:<{_HELLO}}".encode(), secrets.token_bytes(_NONCE)
        theirs = _exactly(connection, _NONCE)
        connection.sendall(name + nonce + _proof(self.key, b"join", theirs, nonce, name))
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        welcome = _exactly(connection, _PROOF)
        if not hmac.compare_digest(welcome, _proof(self.key, b"welcome", nonce, theirs, name)):
            raise _Refused("who listens there is not process 0 of this job")
        connection.settimeout(5)

    def _watch(self) -> None:
        try:
            self._listen()
        except Exception as error:  # without this thread nobody would watch
            self._fall(f"its watchdog failed: {error!r}")

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer.socket, selectors.EVENT_READ, peer)
            beaten = 0.0
            while not self._done.is_set():
                if time.monotonic() - beaten >= BEAT_S:
                    beaten = time.monotonic()
                    self._tell(_ALIVE)
                    self._arm()
                for key, _ in selector.select(timeout=BEAT_S / 4):
                    self._hear(selector, key.data)
                self._check()

    def _hear(self, selector: selectors.BaseSelector, peer: _Peer) -> None:
        try:
            data = peer.socket.recv(4096)
        except OSError:
            data = b""
        if not data:
            self._fall(f"process {peer.process} is gone: its connection closed without a goodbye")
        peer.heard = time.monotonic()
        *lines, peer.unread = (peer.unread + data).split(b"\n")
        for line in lines:
            if line == _BYE:
                selector.unregister(peer.socket)
                with self._lock:
                    self._peers.remove(peer)
                peer.socket.close()
                return
            if line.startswith(_FAILED):
                reason = line.removeprefix(_FAILED).decode(errors="replace")
                self._tell(line)  # to those who hear of it only through process 0
                self._done.wait(GRACE_S)
                self._fall(reason)

    def _check(self) -> None:
        now = time.monotonic()
        for peer in self._peers:
            if now - peer.heard > self._timeout_s:
                self._fall(f"process {peer.process} has been silent for {now - peer.heard:.0f} s")
        deadline = self._deadline
        if deadline and now > deadline[0]:
            self._fall(deadline[1])

    def _tell(self, line: bytes) -> None:
        with self._lock:
            for peer in self._peers:
                with contextlib.suppress(OSError):  # a lost peer is noticed where it is heard
                    peer.socket.sendall(line + b"\n")

    def _stop(self, last: bytes) -> None:
        self._done.set()  # first: the other side may hang up as soon as it has heard the last line
        self._tell(last)
        _running.clear()
        if threading.current_thread() is not self._thread and self._thread.is_alive():
            self._thread.join(timeout=2 * BEAT_S)
        faulthandler.cancel_dump_traceback_later()
        for peer in self._peers:
            _hang_up(peer.socket)

    def _fall(self, reason: str) -> None:
        """End this process, whatever its other threads wait for."""
        if self._done.is_set():
            return
        threading.Thread(target=_end_after, args=(LAST_WORDS_S,), daemon=True).start()
        try:
            self._tell(_FAILED + reason.encode())
            print(f"stepjax: process {self.process} ends: {reason}. Its threads:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        finally:
            os._exit(EXIT_CODE)

    def _arm(self) -> None:
        """Let faulthandler, whose thread needs no lock of Python's, end the process (with 1) if this thread starves."""
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # stderr may be no file
            faulthandler.dump_traceback_later(self._timeout_s + STARVED_S, exit=True)


_running: list[Watchdog] = []  # this process's, if it is one of several


@contextlib.contextmanager
def deadline(what: str, within_s: float) -> Iterator[None]:
    """End this process, if it is one of several, when the ``with`` block takes longer than ``within_s`` seconds."""
    for watchdog in _running:
        watchdog.expect(what, within_s)
    try:
        yield
    finally:
        for watchdog in _running:
            watchdog.expect(None)


def key() -> bytes:
    """The key of the cluster that this process is one of; empty if it is alone."""
    return _running[0].key if _running else b""


def process_and_leader() -> tuple[int, str]:
    """The number of this process, and the host of process 0; 0 and an empty string if this process is alone."""
    return (_running[0].process, _running[0].host) if _running else (0, "")


def _hang_up(connection: socket.socket, within_s: float = 1.0) -> None:
    """Close without a reset, which could overtake the last line: the other side has read it when it closes, too."""
    deadline = time.monotonic() + within_s
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
        while (left := deadline - time.monotonic()) > 0:
            connection.settimeout(left)
            if not connection.recv(4096):
                break
    connection.close()


def _end_after(seconds: float) -> None:
    time.sleep(seconds)
    os._exit(EXIT_CODE)


def _introduced(connection: socket.socket, expected: set[int], key: bytes) -> _Peer | None:
    """The process that connected, if it is one of those that are expected and has the key."""
    connection.settimeout(5)
    with contextlib.suppress(OSError, ValueError):
        nonce = secrets.token_bytes(_NONCE)
        connection.sendall(nonce)
        hello = _exactly(connection, _HELLO + _NONCE + _PROOF)
        name, theirs, proof = hello[:_HELLO], hello[_HELLO : _HELLO + _NONCE], hello[_HELLO + _NONCE :]
        if hmac.compare_digest(proof, _proof(key, b"join", nonce, theirs, name)) and int(name) in expected:
            return _Peer(connection, int(name), welcome=_proof(key, b"welcome", theirs, nonce, name))
    connection.close()
    return None


def _proof(key: bytes, what: bytes, *parts: bytes) -> bytes:
    """What only a process with the key can say: a digest of both sides' random numbers, which no other join has."""
    return hmac.digest(key, what + b"".join(parts), "sha256")


def _exactly(connection: socket.socket, size: int) -> bytes:
    """So many bytes. ConnectionResetError: the other side hung up."""
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise _Refused("process 0 turned this one away; do both have the same STEPJAX_KEY, of one job?")
        data += more
    return data
