"""One engine on several hosts: process 0 schedules, the others replay its orders on their own devices.

Orders are numbered and sent over TCP as JSON, each with a keyed digest. Process 0 draws the key, and the others receive
it when the cluster starts. No message is trusted before its digest is checked, and nothing is unpickled. A program that
is not compiled yet is announced first: no process launches it until all have compiled it.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import hmac
import json
import secrets
import socket
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from stepjax.adapters.lora import LoraConfig
from stepjax.errors import ClusterError
from stepjax.infer.engine.executor import Assignment, Executor, Mask, Order, Progress
from stepjax.infer.engine.sequence import HostMove, PageUpdate, RingCopy, Row, StepPlan
from stepjax.infer.hosts import agreed
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.steps.state import Emitted
from stepjax.sharding import watchdog
from stepjax.sharding.listener import Listener

JOIN_S = 300.0  # time limit for all processes to connect, and to compile an announced program
MAX_BYTES = 64 * 2**20  # of a message
_HEAD = struct.Struct(">IQ")  # bytes of the payload, number of the message
_DIGEST = hashlib.sha256
# What else the processes do together: by kind, what carries out the content of an order. True: the leader waits for it.
OrderHandlers = Mapping[str, Callable[[Any], bool]]


class Channel:
    """Numbered, authenticated messages over one connection. Each direction has its own count."""

    def __init__(self, connection: socket.socket, key: bytes, *, leads: bool):
        self._socket, self._sent, self._received = connection, 0, 0
        out, back = (b"orders", b"answers") if leads else (b"answers", b"orders")
        self._out, self._back = (hmac.digest(key, name, _DIGEST) for name in (out, back))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: Any) -> None:
        self.send_encoded(_encoded(message))

    def send_encoded(self, payload: bytes) -> None:
        """Send a message that is encoded already, for several channels."""
        head = _HEAD.pack(len(payload), self._sent)
        self._sent += 1
        self._socket.sendall(head + payload + hmac.digest(self._out, head + payload, _DIGEST))

    def receive(self) -> Any:
        """The next message.

        Raises:
          ClusterError: the number or the digest is wrong, or the connection has ended.
        """
        head = self._exactly(_HEAD.size)
        size, number = _HEAD.unpack(head)
        if size > MAX_BYTES:
            raise ClusterError(f"replay: a message of {size} bytes, expected at most {MAX_BYTES}")
        payload, digest = self._exactly(size), self._exactly(_DIGEST().digest_size)
        if not hmac.compare_digest(digest, hmac.digest(self._back, head + payload, _DIGEST)):
            raise ClusterError("replay: a message does not carry this job's digest; does another job use the port?")
        if number != self._received:
            raise ClusterError(f"replay: message {number} arrived, expected {self._received}")
        self._received += 1
        return json.loads(payload)

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            more = self._socket.recv(min(count - len(data), 2**20))
            if not more:
                raise ClusterError("replay: the other process closed the connection")
            data += more
        return bytes(data)


class Leader:
    """An `Executor` whose orders all processes carry out."""

    def __init__(self, executor: Executor, channels: Iterable[Channel]):
        self.executor, self._channels = executor, list(channels)

    def run(self, order: Order) -> Emitted:
        """`Executor.run` on all processes. The order is sent before it is launched here."""
        if not self.executor.prepared(order):
            self.tell("prepare", encode(order))
            self.executor.prepare(order)
            self.wait()
        self.tell("run", encode(order))
        return self.executor.run(order)

    def warm(
        self,
        decode: Iterable[tuple[int, int]],
        prefill: Iterable[tuple[int, int]],
        *,
        progress: Progress | None = None,
    ) -> None:
        """`Executor.warm` on all processes; ``progress`` is that of this one."""
        decode, prefill = list(decode), list(prefill)
        self.tell("warm", [decode, prefill])
        self.executor.warm(decode, prefill, progress=progress)
        self.wait()

    def load_adapter(self, slot: int, adapter: Mapping[str, Any], lora: LoraConfig) -> None:
        """`Executor.load_adapter` on all processes, which get the factors from this one."""
        factors = {name: np.asarray(value, np.float32) for name, value in adapter.items()}
        shapes = {name: value.shape for name, value in factors.items()}
        self.tell("adapter", [slot, dataclasses.asdict(lora), shapes])
        self.executor.load_adapter(slot, agreed(factors), lora)
        self.wait()

    def close(self) -> None:
        """Tell the followers that the engine has ended, and close the connections."""
        self.tell("end", None)
        for channel in self._channels:
            channel.close()

    def tell(self, kind: str, content: Any) -> None:
        """Send an order to all followers.

        Args:
          kind: one that they know from `follow`, or from their handlers.
          content: JSON.

        Raises:
          ClusterError: it is too long for a message. Nothing has been sent.
        """
        payload = _encoded([kind, content])
        if len(payload) > MAX_BYTES:
            raise ClusterError(f"replay: an order of {len(payload)} bytes, expected at most {MAX_BYTES}")
        for channel in self._channels:
            channel.send_encoded(payload)

    def wait(self) -> None:
        """Until all followers have carried out an order that they answer."""
        for channel in self._channels:
            answer = channel.receive()
            if answer != "ready":
                raise ClusterError(f"replay: a process answered {answer!r}, expected that it is ready")


def follow(executor: Executor, channel: Channel, others: OrderHandlers | None = None) -> None:
    """Carry out the leader's orders until it ends.

    Args:
      others: for orders that are not the engine's.
    """
    others = {**executor.handlers, **(others or {})}
    while True:
        kind, content = channel.receive()
        if kind == "end":
            executor.close()
            channel.close()
            return
        if kind == "run":
            executor.run(decode(content))
            continue
        if kind in others:
            if not others[kind](content):
                continue
        elif kind == "adapter":
            slot, lora, shapes = content
            factors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
            executor.load_adapter(slot, agreed(factors), LoraConfig(**_tuples(lora)))
        elif kind == "prepare":
            executor.prepare(decode(content))
        else:
            executor.warm(*([tuple(shape) for shape in part] for part in content))
        channel.send("ready")


def connect(host: str, identity: str) -> list[Channel]:
    """Connect the processes of a cluster; all call this together.

    Args:
      host: address of process 0.
      identity: settings of model and engine, which must be equal on all processes.

    Returns: on process 0 a channel to each other process, elsewhere the channel to process 0.

    Raises:
      ClusterError: a process does not connect in time, or has different settings.
    """
    if jax.process_index() == 0:
        with Listener(host, 0, jax.process_count()) as server:
            drawn = secrets.token_bytes(32)
            agreed(np.frombuffer(server.port.to_bytes(4, "big") + drawn, np.uint8))
            return _accept(server, _key(drawn), identity)
    shared = bytes(np.asarray(agreed(np.zeros(36, np.uint8))))
    return [_join((host, int.from_bytes(shared[:4], "big")), _key(shared[4:]), identity)]


def _key(drawn: bytes) -> bytes:
    """The key of this engine's channels, from that of the cluster, with which its processes joined."""
    return hmac.digest(watchdog.key(), drawn, _DIGEST)


def _accept(server: Listener, key: bytes, identity: str) -> list[Channel]:
    channels: dict[int, Channel] = {}
    while len(channels) < jax.process_count() - 1:
        try:
            connection = server.accept(JOIN_S)
        except TimeoutError:
            raise ClusterError(f"replay: {len(channels)} of {jax.process_count() - 1} processes connected") from None
        connection.settimeout(JOIN_S)
        channel = Channel(connection, key, leads=True)
        try:
            process, theirs = channel.receive()
        except (ClusterError, OSError, ValueError):  # not a process of this job: wait for the others
            channel.close()
            continue
        if theirs != identity:
            raise ClusterError(f"replay: process {process} runs {theirs}, expected {identity} as on process 0")
        channels[process] = channel
    for channel in channels.values():
        channel.send("welcome")
    return list(channels.values())


def _join(address: tuple[str, int], key: bytes, identity: str) -> Channel:
    try:
        connection = socket.create_connection(address, timeout=JOIN_S)
    except OSError as error:
        raise ClusterError(f"replay: process 0 is not at {address[0]}:{address[1]} ({error})") from None
    channel = Channel(connection, key, leads=False)
    channel.send([jax.process_index(), identity])
    if channel.receive() != "welcome":
        raise ClusterError("replay: process 0 did not welcome this one")
    connection.settimeout(None)  # the leader may be idle for long; the watchdog notices if it ends
    return channel


def _encoded(message: Any) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode()


def encode(order: Order) -> dict[str, Any]:
    """An order as JSON values: what executors need of it. A decode step of thousands of sequences is told by a bit for
    each slot.
    """
    assignments = [[*item[:1], dataclasses.asdict(item.params), *item[2:]] for item in order.assignments]
    plan = {field.name: getattr(order.plan, field.name) for field in dataclasses.fields(order.plan)}
    if order.plan.kind == "decode":
        plan["rows"] = f"{sum(1 << row.slot for row in order.plan.rows):x}"
    masks = [[slot, base64.b64encode(zlib.compress(words, 1)).decode()] for slot, words in order.masks]
    return {**order._asdict(), "plan": plan, "assignments": assignments, "masks": masks}


def decode(content: dict[str, Any]) -> Order:
    """The order that `encode` encoded; the rows of a decode step have a slot and a width only."""
    plan = content["plan"]
    return Order(
        **{
            **content,
            "plan": StepPlan(
                **{
                    **plan,
                    "rows": _rows(plan),
                    "resets": tuple(plan["resets"]),
                    "page_updates": tuple(
                        PageUpdate._make([*update[:2], tuple(update[2])]) for update in plan["page_updates"]
                    ),
                    "restores": tuple(RingCopy(*copy) for copy in plan["restores"]),
                    "saves": tuple(RingCopy(*copy) for copy in plan["saves"]),
                    "moves": tuple(HostMove(*move) for move in plan["moves"]),
                }
            ),
            "assignments": tuple(
                Assignment(slot, SamplingParams(**_tuples(params)), tuple(prompt), tuple(output), adapter)
                for slot, params, prompt, output, adapter in content["assignments"]
            ),
            "masks": tuple(Mask(slot, zlib.decompress(base64.b64decode(words))) for slot, words in content["masks"]),
        }
    )


def _rows(plan: dict[str, Any]) -> tuple[Row, ...]:
    if plan["kind"] == "prefill":
        return tuple(Row._make([*row[:4], tuple(row[4]), row[5]]) for row in plan["rows"])
    bits = int(plan["rows"], 16)
    return tuple(Row(slot, "", 0, plan["width"]) for slot in range(bits.bit_length()) if bits >> slot & 1)


def _tuples(value: Any) -> Any:
    """The value with every list as a tuple again."""
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
