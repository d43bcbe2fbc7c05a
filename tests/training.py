"""A training service in the test process, and a client that sends what the Tinker SDK sends."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from serving import Serving

from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.session import Session
from stepjax.train.service.extension import TrainingExtension
from stepjax.train.service.limits import ServiceLimits
from stepjax.train.service.state_files import read_checkpoint
from stepjax.train.service.training_service import TrainingService
from stepjax.train.service.wire.calls import Span
from stepjax.train.service.wire.protobuf import packed, written, written_map

PROTOBUF = "application/x-protobuf"
IDS = [[5, 9, 2, 30, 31, 7, 8], [4, 4, 18, 90, 3], [60, 2, 2, 9, 9, 9, 1, 77, 30], [8, 7]]
# Seven, of which some share a row.
SEQUENCES = [np.random.default_rng(length).integers(0, 128, (length,)).tolist() for length in (9, 30, 5, 12, 7, 40, 3)]
ENGINE = EngineConfig(
    num_slots=2,
    context=64,
    num_pages=8,
    speculate=0,
    widths=(16,),
    token_budget=16,
    adapter_slots=2,
    adapter_rank=4,
    num_snapshots=0,
)


@contextmanager
def serving(
    session: Session,
    folder: Path,
    *,
    limits: ServiceLimits | None = None,
    killed: bool = False,
    engine: EngineConfig = ENGINE,
    **options: Any,
) -> Iterator[Serving]:
    """A server with a training service that keeps its state in ``folder``.

    Args:
      killed: end as a process that is killed: nothing is written at the end.
    """
    made: list[TrainingService] = []

    def extend(session, service, serve_options):
        limits_ = limits or ServiceLimits(max_rank=4)
        made.append(TrainingService(session, service, serve_options.names, folder=folder, limits=limits_))
        return TrainingExtension(made[0])

    with Serving(session, engine, names=("tiny",), extend=extend, **options) as server:
        server.training = made[0]
        yield server
        if killed:
            for lane, work in made[0]._lanes.values():
                server.loop.call_soon_threadsafe(lane.task.cancel)
                work.done = work.saved  # nothing is written


def saved(server: Serving, path: str, *, optimizer: bool = False):
    """The state and the settings of a checkpoint."""
    return read_checkpoint(server.training.shared.registry.checkpoint_folder(path), optimizer=optimizer)


def tensor(value: Any) -> bytes:
    value = np.asarray(value)
    value = value.astype(np.int64 if value.dtype.kind == "i" else np.float32)
    return written((1, value.tobytes()), (3, 2 if value.dtype == np.int64 else 1), (4, packed(value.shape)))


def datum(tokens: Sequence[int], *, spans: Sequence[Span] = (), **inputs: Any) -> bytes:
    """A datum in protocol buffers."""
    chunk = written((1, written((1, np.asarray(tokens, "<i4").tobytes()))))
    origins = [
        written((2 if span.sampled else 1, written((1, span.sequence_id), (2, span.offset), (3, span.length))))
        for span in spans
    ]
    tensors = {name: tensor(value) for name, value in inputs.items()}
    return written((1, chunk), *written_map(2, tensors), *((3, origin) for origin in origins))


def next_tokens(ids: Sequence[int], weights: Sequence[float] | np.ndarray | None = None) -> bytes:
    """A datum of cross_entropy in which each token is to be followed by the next."""
    factors = np.ones(len(ids) - 1) if weights is None else np.asarray(weights)
    return datum(ids[:-1], target_tokens=np.asarray(ids[1:]), weights=factors.astype(np.float32))


def with_origin(prompt: Sequence[int], answer: Sequence[int], id: str) -> bytes:
    """A datum as the cookbook makes it of a sample."""
    tokens = [*prompt, *answer]
    spans = [Span(id, 0, len(prompt), sampled=False), Span(id, 0, len(answer) - 1, sampled=True)]
    weights = np.ones(len(tokens) - 1, np.float32)
    return datum(tokens[:-1], target_tokens=np.asarray(tokens[1:]), weights=weights, spans=spans)


class Client:
    """One session, in the terms of the wire."""

    def __init__(self, server: Serving, key: str = "tml-test", *, session: str | None = None, vanishes: bool = False):
        """
        Args:
          session: one that exists.
          vanishes: end without saying so.
        """
        self.vanishes = vanishes
        self.serving = server
        self.http = httpx.Client(base_url=server.url, headers={"x-api-key": key}, timeout=120)
        self._models, self._samplers = itertools.count(), itertools.count()
        body = {"tags": [], "user_metadata": None, "sdk_version": "0.38.0", "type": "create_session"}
        self.session = session or self.post("create_session", body)["session_id"]

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.vanishes:
            self.http.post(f"/api/v1/sessions/{self.session}/finish", json={"reason": {"type": "success"}})
        self.http.close()

    def send(self, path: str, body: Mapping[str, Any] | bytes, **headers: str) -> httpx.Response:
        if isinstance(body, bytes):
            return self.http.post(f"/api/v1/{path}", content=body, headers={"content-type": PROTOBUF, **headers})
        return self.http.post(f"/api/v1/{path}", json=body, headers=headers)

    def post(self, path: str, body: Mapping[str, Any] | bytes, **headers: str) -> dict[str, Any]:
        answer = self.send(path, body, **headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def get(self, path: str) -> dict[str, Any]:
        answer = self.http.get(f"/api/v1/{path}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def poll(self, promise: Mapping[str, Any] | str) -> dict[str, Any]:
        """The outcome of a promise, as JSON."""
        id = promise if isinstance(promise, str) else promise["request_id"]
        while (answer := self.send("retrieve_future", {"request_id": id})).status_code == 408:
            assert answer.json()["type"] == "try_again"
        assert answer.status_code == 200, answer.text
        return answer.json()

    def result(self, path: str, body: Mapping[str, Any] | bytes) -> dict[str, Any]:
        return self.poll(self.post(path, body))

    def model(self, *, rank: int = 4, seed: int = 7, **parts: bool) -> Model:
        lora = {"rank": rank, "seed": seed, **parts}
        number = next(self._models)
        body = {"session_id": self.session, "model_seq_id": number, "base_model": "tiny", "lora_config": lora}
        made = self.result("create_model", body)
        assert made["model_id"] == f"{self.session}:train:{number}"
        return Model(self, made["model_id"])

    def load(self, path: str, *, optimizer: bool) -> Model:
        body = {"session_id": self.session, "model_seq_id": next(self._models), "path": path, "optimizer": optimizer}
        promise = self.post("load_weights", body)
        assert self.poll(promise)["path"] == path
        return Model(self, promise["model_id"])

    def sampler(self, path: str | None = None) -> Sampling:
        source = {"base_model": "tiny"} if path is None else {"model_path": path}
        number = next(self._samplers)
        body = {"session_id": self.session, "sampling_session_seq_id": number, **source}
        return Sampling(self, self.post("create_sampling_session", body)["sampling_session_id"])


class Model:
    """A model that is trained; calls are numbered as the SDK numbers them."""

    def __init__(self, client: Client, id: str, *, first: int = 1):
        self.client, self.id = client, id
        self.numbers = itertools.count(first)

    def body(
        self, data: Sequence[bytes], loss: str = "cross_entropy", *, forward: bool = False, **config: Any
    ) -> bytes:
        settings = {
            name: written((2, value)) if isinstance(value, str) else written((1, float(value)))
            for name, value in config.items()
        }
        return written(
            (1, self.id),
            (2, next(self.numbers)),
            *((3, item) for item in data),
            (4, loss),
            (6, forward or None),
            *written_map(7, settings),
        )

    def send(self, data: Sequence[bytes], loss: str = "cross_entropy", **options: Any) -> dict[str, Any]:
        return self.client.post("forward_backward", self.body(data, loss, **options))

    def run(self, data: Sequence[bytes], loss: str = "cross_entropy", **options: Any) -> dict[str, Any]:
        return self.client.poll(self.send(data, loss, **options))

    def call(self, endpoint: str, /, **fields_: Any) -> dict[str, Any]:
        return self.client.result(endpoint, {"model_id": self.id, "seq_id": next(self.numbers), **fields_})

    def step(self, **numbers: float) -> dict[str, Any]:
        return self.call("optim_step", adam_params=numbers)

    def save(self, name: str, **fields_: Any) -> str:
        return self.call("save_weights", path=name, **fields_)["path"]

    def save_sampler(self, name: str) -> str:
        return self.call("save_weights_for_sampler", path=name)["path"]


class Sampling:
    """A sampling session."""

    def __init__(self, client: Client, id: str):
        self.client, self.id = client, id
        self.numbers = itertools.count()

    def body(self, prompt: Sequence[int], **fields_: Any) -> dict[str, Any]:
        params = fields_.pop("sampling_params", {"max_tokens": 8})
        chunks = {"chunks": [{"type": "encoded_text", "tokens": list(prompt)}]}
        numbers = {"sampling_session_id": self.id, "seq_id": next(self.numbers)}
        return {**numbers, "prompt": chunks, "sampling_params": params, **fields_}

    def run(self, prompt: Sequence[int], **fields_: Any) -> dict[str, Any]:
        return self.client.result("asample", self.body(prompt, **fields_))


def logprobs(result: Mapping[str, Any]) -> list[np.ndarray]:
    """The log-probabilities of each datum of a pass."""
    tensors = [output["logprobs"] for output in result["loss_fn_outputs"]]
    return [np.asarray(item["data"], np.float32).reshape(item["shape"]) for item in tensors]
