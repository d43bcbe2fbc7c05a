"""The real Tinker SDK and its cookbook, unmodified, against the training service with step-tiny."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tinker_loops
from serving import Serving

from stepjax.infer.engine.config import EngineConfig
from stepjax.train.service.extension import TrainingExtension
from stepjax.train.service.limits import ServiceLimits
from stepjax.train.service.training_service import TrainingService

pytestmark = [pytest.mark.tinker, pytest.mark.slow, pytest.mark.long]
ROOT = Path(__file__).resolve().parent.parent
ENGINE = EngineConfig(
    num_slots=8, context=256, num_pages=64, speculate=0, widths=(64,), token_budget=64, adapter_slots=4, adapter_rank=8
)


@pytest.fixture(scope="module")
def server(step_tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    assets = Path(tinker_loops.__file__).parent.parent / "stepjax" / "assets" / "step-tiny"

    def extend(session, service, options):
        limits = ServiceLimits(max_rank=8)
        made = TrainingService(session, service, options.names, folder=folder, limits=limits, tokenizer=str(assets))
        return TrainingExtension(made)

    with Serving(step_tiny, ENGINE, names=("step-tiny",), extend=extend, keys=("tml-test",)) as server:
        yield server


def run(server: Serving, loop: str, folder: Path) -> dict[str, Any]:
    """What a loop prints."""
    python = tinker_loops.interpreter()
    assert python
    variables = {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-test", "HOME": str(folder)}
    ended = subprocess.run(
        [python, tinker_loops.__file__, loop, str(folder)],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return json.loads(ended.stdout.splitlines()[-1])


def test_the_sdk(server, tmp_path):
    found = run(server, "sdk", tmp_path)
    assert found["losses"][-1] < found["losses"][0]
    assert all(norm > 0 for norm in found["norms"])
    assert {"loss:sum", "surrogate_loss:sum"} <= {*found["custom"]} | {"surrogate_loss:sum"}
    assert found["wide"][1] == 3
    for tokens, logprobs, reason in found["answers"]:
        assert len(tokens) == len(logprobs) <= 8
        assert reason in ("stop", "length")
    assert found["gap"] < 1e-4
    assert "99999" in found["refused"]
    assert found["same"][0] == found["same"][1]
    assert found["rank"] == 8
    assert found["listed"]
    assert found["kl"] > 0


def test_supervised_training_learns_and_resumes(server, tmp_path):
    nll = run(server, "supervised", tmp_path)["nll"]
    assert len(nll) >= 10
    assert nll[-1] < nll[0] / 2


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo"])
def test_reinforcement_runs(server, tmp_path, loss):
    """The sampler's policy is the trainer's: the KL between them at each step is that of rounding."""
    found = run(server, loss, tmp_path)
    assert len(found["reward"]) == 3
    assert all(abs(value) < 1e-3 for value in found["kl"])


@pytest.mark.parametrize("loop", ["distilled", "two_teachers"])
def test_distillation_runs(server, tmp_path, loop):
    kl = run(server, loop, tmp_path)["kl"]
    assert len(kl) == 2
    assert abs(kl[0]) < 1e-3  # the student begins as its teacher
