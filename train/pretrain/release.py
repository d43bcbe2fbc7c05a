"""Writes a finished run as a checkpoint folder in the hub's layout, with the measured accuracy of its weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from stepjax._version import __version__
from stepjax.checkpoint.writer import check_target, save
from stepjax.config import ASSETS, ModelConfig
from stepjax.errors import TrainingError
from stepjax.infer.load import load
from stepjax.train.config.pretrain import PretrainConfig, read_pretrain
from stepjax.train.pretrain.accuracy import evaluate
from stepjax.train.pretrain.loop import load_weights, weights_file
from stepjax.weights.finite import not_finite

ITEMS = 512  # fresh held-out items per task
SEED = 20_000  # of these items; training does not measure them


def release(
    run: Path, folder: Path, *, step: int | None = None, items: int = ITEMS, require: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Write the weights that ``run`` kept at ``step`` (default: its last) as bfloat16 into ``folder``, and grade them.

    ``accuracy.json`` in the folder has the accuracy of the rounded weights: greedy, in float32 arithmetic. Returns its
    content. ``folder`` changes only after the grading.

    Args:
      require: lowest accuracy to accept, by task.

    Raises:
      TrainingError: the accuracy of a task is below ``require``. ``folder`` is not changed.
    """
    config = read_pretrain(run / "config.toml")
    step = config.steps if step is None else step
    model_config = ModelConfig.preset(config.model)
    weights = load_weights(run, step)
    if bad := not_finite(weights):
        raise TrainingError(f"{weights_file(run, step)}: {bad} has values that are not finite; give an earlier --step")
    check_target(folder, overwrite=True)

    def write(to: Path) -> None:
        save(to, model_config, weights, source=ASSETS / config.model, overwrite=True)

    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch) / "graded")
        session = load(Path(scratch) / "graded", dtype="float32")
        scores = evaluate(session, items=items, seed=SEED)
    short = [
        f"{task} {scores[task].accuracy:.3f} < {least}"
        for task, least in (require or {}).items()
        if scores[task].accuracy < least
    ]
    if short:
        raise TrainingError(f"{run}: step {step} has too low an accuracy: {', '.join(short)}; {folder} is not changed")
    report = {
        "stages": _stages(run, config, step),
        "measured": {"items_per_task": items, "seed": SEED, "decoding": "greedy", "drafts": session.max_drafts},
        "versions": {"stepjax": __version__, "jax": jax.__version__},
        "tasks": {
            name: {"accuracy": round(score.accuracy, 4), "tokens_per_step": round(score.tokens_per_step, 3)}
            for name, score in scores.items()
        },
    }
    write(folder)
    (folder / "accuracy.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _stages(run: Path, config: PretrainConfig, step: int) -> list[dict[str, Any]]:
    """The settings of all stages of these weights, first stage first, each with the hash of its weights."""
    file = weights_file(run, step)
    settings = dataclasses.asdict(config)
    start = Path(settings.pop("start_from"))
    stage = settings | {"weights_of_step": step, "weights_sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    earlier = start.parent.parent
    if not config.start_from or not (earlier / "config.toml").is_file():
        return [stage]
    return [*_stages(earlier, read_pretrain(earlier / "config.toml"), int(start.stem)), stage]
