"""The training service in two processes: the second follows the first, and one batch is one update of sft."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import numpy as np
import pytest
from checkpoints import speaking_folder
from devices import with_devices
from ports import two_free_ports
from sft_updates import ADAM
from training import IDS, SEQUENCES, Client, logprobs, next_tokens, with_origin

from stepjax.infer.load import load
from stepjax.train.service.state_files import read_checkpoint

ROOT = Path(__file__).resolve().parent.parent
MESH = "expert=2,tensor=2"
pytestmark = [pytest.mark.slow, pytest.mark.long]


class Pair:
    """``stepjax serve --train`` in two processes of two devices each, from the time on when it answers."""

    def __init__(self, model: Path, folder: Path):
        place = ["--coordinator", f"localhost:{two_free_ports()}", "--processes", "2", "--process-id"]
        engine = ["--max-seqs", "1", "--context", "64", "--speculate", "0", "--max-loras", "2", "--max-lora-rank", "4"]
        served = ["--mesh", MESH, "--dtype", "float32", "--served-model-name", "tiny", "--port", "0"]
        train = ["--train", "--train-folder", str(folder), "--train-replay"]
        command = [sys.executable, "-m", "stepjax", "serve", str(model), *served, *engine, *train, *place]
        self.logs: list[list[str]] = [[], []]
        self.processes = [
            subprocess.Popen(
                [*command, str(number)],
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
                env={**with_devices(2), "PYTHONPATH": str(ROOT)},
            )
            for number in (0, 1)
        ]
        try:
            self._wait()
        except BaseException:
            self.kill()
            raise

    def _wait(self) -> None:
        """Until the first process answers."""
        ready = threading.Event()
        for process, log in zip(self.processes, self.logs, strict=True):
            threading.Thread(target=self._read, args=(process, log, ready), daemon=True).start()
        assert ready.wait(1200), self.tail()
        assert all(process.poll() is None for process in self.processes), self.tail()
        found = re.search(r"listening on (http://\S+);", "".join(self.logs[0]))
        assert found, self.tail()
        self.url = found[1]

    def _read(self, process: Any, log: list[str], ready: threading.Event) -> None:
        with contextlib.suppress(ValueError):  # it was closed at the end
            for line in process.stderr:
                log.append(line)
                if "ready after" in line:
                    ready.set()
        ready.set()

    def tail(self) -> str:
        return "\n".join("".join(log[-40:]) for log in self.logs)

    def end(self) -> list[int]:
        """The exit codes after the signal that launchers send to all processes."""
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        return [process.wait(120) for process in self.processes]

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait(60)
            if process.stderr is not None:
                process.stderr.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return speaking_folder(tmp_path_factory.mktemp("hosts") / "model")


@pytest.fixture
def update(model, tmp_path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two processes that write what one update of sft makes of a fresh adapter. They run beside the server."""
    command = [sys.executable, str(ROOT / "tests" / "two_processes.py"), str(two_free_ports())]
    running = [
        subprocess.Popen(
            [*command, str(number), "update", str(model), MESH, str(tmp_path / "update.npz")],
            env={**with_devices(2), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        )
        for number in (0, 1)
    ]
    yield running
    for process in running:
        process.kill()
        process.wait(60)


@pytest.fixture
def pair(model, tmp_path) -> Iterator[Pair]:
    with Pair(model, tmp_path / "trained") as pair:
        yield pair


def client_of(pair: Pair) -> Client:
    return Client(cast("Any", SimpleNamespace(url=pair.url)))


def test_two_processes_train_as_sft_and_sample_as_they_train(update, pair, model, tmp_path):
    """Leaves and moments of a batch in one, three and seven calls are those of sft in two processes, to 1e-6; saved and
    loaded; the sampler's scores are the trainer's; both processes end by themselves.
    """
    assert [process.wait(1200) for process in update] == [0, 0]
    with np.load(tmp_path / "update.npz") as file:
        expected = dict(file)
    tokens = sum(len(ids) - 1 for ids in SEQUENCES)
    data = [next_tokens(ids, np.full(len(ids) - 1, 1 / tokens)) for ids in SEQUENCES]
    with client_of(pair) as client:
        for chunks in (1, 3, 7):
            trained = client.model(seed=7)
            for part in np.array_split(np.arange(len(data)), chunks):
                trained.send([data[i] for i in part])
            trained.step(**ADAM)
            path = trained.save(f"in-{chunks}")
            run, _, name = path.removeprefix("tinker://").split("/")
            folder = tmp_path / "trained" / "checkpoints" / run.replace(":", ".") / "weights" / name
            after, _ = read_checkpoint(folder, optimizer=True)
            for key, value in expected.items():
                kind, _, leaf = key.partition(":")
                np.testing.assert_allclose(
                    getattr(after, kind)[leaf], value, atol=1e-6, rtol=0, err_msg=f"{key} in {chunks}"
                )
        loaded = client.load(path, optimizer=True)
        scores = [each.run(data, forward=True)["metrics"] for each in (trained, loaded)]
        assert scores[0] == scores[1]
        sampler = client.sampler(trained.save_sampler("policy"))
        params = {"max_tokens": 6, "seed": 3, "stop": []}
        answer = sampler.run(IDS[0], sampling_params=params)["sequences"][0]
        whole = [*IDS[0], *answer["tokens"]]
        scored = logprobs(trained.run([next_tokens(whole)], forward=True))[0][len(IDS[0]) - 1 :]
        np.testing.assert_allclose(answer["logprobs"], scored, atol=2e-5)
        tokenizer = load(model, dtype="float32").tokenizer
        assert tokenizer
        text = tokenizer.decode(answer["tokens"][2:3])
        promise = client.post("asample", sampler.body(IDS[0], sampling_params={**params, "stop": [text]}))
        stopped = client.poll(promise)["sequences"][0]
        assert stopped["stop_reason"] == "stop"
        replayed = with_origin(IDS[0], stopped["tokens"], promise["sample_sequence_ids"][0])
        found = trained.run([replayed], forward=True)["metrics"]
        assert found["replayed:sum"] == len(IDS[0]) + len(stopped["tokens"]) - 1
        taught = trained.run([next_tokens(IDS[0])], "reverse_kl", teacher="tiny", forward=True)
        assert taught["metrics"]["kl:sum"] > 0
        assert trained.step(learning_rate=1e-3)["metrics"]["no_gradient"] == 1
    assert httpx.get(f"{pair.url}/health").status_code == 200
    assert pair.end() == [0, 0], pair.tail()
