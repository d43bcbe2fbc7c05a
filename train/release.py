"""From a finished run to a checkpoint folder in the hub's layout, with its measured accuracy beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax

from stepjax.config import ASSETS, ModelConfig
from stepjax.export import save
from stepjax.infer.load import load
from stepjax.train.config import read_pretrain
from stepjax.train.evaluate import evaluate
from stepjax.train.loop import load_weights

ITEMS = 512  # fresh held-out items per task
SEED = 20_000  # of those items; training logs nothing of them


def release(run: Path, folder: Path, *, step: int | None = None, items: int = ITEMS) -> dict[str, Any]:
    """Write the weights that ``run`` kept at ``step`` (default: its last) as bfloat16 into ``folder`` and grade them.

    ``accuracy.json`` beside the weights tells what was measured on the folder as it was written: greedy, in float32
    arithmetic on the rounded weights. Returns its content.
    """
    config = read_pretrain(run / "config.toml")
    step = config.steps if step is None else step
    model_config = ModelConfig.preset(config.model)
    save(folder, model_config, load_weights(run, step), source=ASSETS / config.model, overwrite=True)
    session = load(folder, dtype="float32")
    scores = evaluate(session, items=items, seed=SEED)
    report = {
        "recipe": {"seed": config.seed, "steps": config.steps, "weights_of_step": step},
        "measured": {"items_per_task": items, "seed": SEED, "decoding": "greedy", "drafts": session.max_drafts},
        "jax": jax.__version__,
        "tasks": {
            name: {"accuracy": round(score.accuracy, 4), "tokens_per_step": round(score.tokens_per_step, 3)}
            for name, score in scores.items()
        },
    }
    (folder / "accuracy.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report
