"""The training run: resume, step, log, save. The same command starts a run and takes it up again."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import tokenizers
from jax.sharding import AxisType, Mesh
from safetensors.numpy import load_file, save_file

from stepjax.config import ASSETS, ModelConfig
from stepjax.errors import ConfigError, TrainingError
from stepjax.model.layout import SingleDevice
from stepjax.model.step3p5 import abstract, initialise, params_of
from stepjax.train.config.pretrain import PretrainConfig
from stepjax.train.data import task_batches
from stepjax.train.data.words import Split
from stepjax.train.losses.next_token import Losses
from stepjax.train.packing.rows import PackedRows
from stepjax.train.pretrain.step import Placement, StepReport, TrainState, make_held_out, make_step, split_biases
from stepjax.train.runs.folder import MetricsFile, claim, progress, resume
from stepjax.train.runs.optimizer import adamw, learning_rate

# At step-tiny's shapes sorting tokens by expert took 0.37 s a step on two cores, running every expert on every token
# 0.47 s.
LAYOUT = SingleDevice(form="capacity")


def pretrain(config: PretrainConfig, out: Path) -> TrainState:
    """Train, or go on training, in the run folder ``out``.

    The folder holds ``config.toml`` (the resolved settings), ``metrics.jsonl``, ``checkpoints/`` (the newest three,
    each whole or not there at all) and ``weights/STEP.safetensors``. A resumed run is bitwise the run that was not
    interrupted: a batch is a function of seed and step.

    Raises:
      ConfigError: the folder belongs to a run with other settings, or there are too few devices.
      TrainingError: the loss is no longer a number.
    """
    out = out.resolve()  # orbax takes absolute paths only
    claim(config, out)
    model_config = ModelConfig.preset(config.model)
    placement = Placement.copied(_mesh(config.devices))
    schedule = learning_rate(
        config.peak_lr,
        warmup=config.warmup_steps,
        decay_from=config.decay_from,
        steps=config.steps,
        floor=config.lr_floor,
    )
    optimizer = adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, clip=config.clip)
    model = abstract(model_config, dtype=jnp.float32, layout=LAYOUT)
    params, biases = split_biases(_first_weights(config, model_config))
    fresh = TrainState(params, biases, optimizer.init(params), jnp.zeros((), jnp.int32))
    fresh = jax.device_put(fresh, placement.state)

    def functions(mtp_weight: float) -> tuple[Any, Any]:
        return (
            make_step(model, optimizer, schedule, placement, mtp_weight=mtp_weight, balance_rate=config.balance_rate),
            make_held_out(model, placement, mtp_weight=mtp_weight),
        )

    plain, with_mtp = functions(0.0), functions(config.mtp_weight)
    newest: Any = ocp.training.preservation_policies.LatestN(3)
    with ocp.training.Checkpointer(str(out / "checkpoints"), preservation_policy=newest) as checkpointer:
        state = resume(checkpointer, fresh)
        start = int(state.step)
        stream, held_out = _stream(config, start), _held_out_rows(config)
        metrics = MetricsFile(out / "metrics.jsonl", start)
        with progress(config.steps, start) as advance, contextlib.closing(metrics):
            began, tokens, pending = time.perf_counter(), 0, None
            for step in range(start, config.steps):
                rows = next(stream)
                tokens += int((rows.segment_ids > 0).sum())
                update, measure = with_mtp if step >= config.mtp_from else plain
                state, report = update(state, jax.tree.map(jnp.asarray, rows))
                if pending:  # one step late, so that the device never waits for the host
                    advance(f"loss {_finite(*pending):.3f}")
                pending, done = (step, report), step + 1
                if step % config.log_every == 0 or done == config.steps:
                    record = _record(step, report, learning_rate=float(np.asarray(schedule(step))))
                    record["tokens_per_s"] = round(tokens / (time.perf_counter() - began), 1)
                    metrics.write(record)
                    began, tokens = time.perf_counter(), 0
                if config.held_out_every and (done % config.held_out_every == 0 or done == config.steps):
                    metrics.write(_held_out_record(step, measure(state, held_out)))
                keep = done in config.keep or done == config.steps
                if keep or done % config.save_every == 0:
                    _finite(step, report)  # never leave a checkpoint that cannot be gone on from
                if keep:
                    save_weights(out, done, state)
                if done % config.save_every == 0 or done == config.steps:
                    checkpointer.save(done, state)
            if pending:
                advance(f"loss {_finite(*pending):.3f}")
    return state


def _finite(step: int, report: StepReport) -> float:
    """The step's loss. TrainingError if it or the gradient is no number: what follows would be none either."""
    loss, norm = float(report.losses.total), float(report.gradient_norm)
    if not math.isfinite(loss + norm):
        raise TrainingError(
            f"step {step}: the loss is {loss} and the gradient's norm {norm}; the checkpoints hold the steps before. "
            "Lower peak_lr or lengthen warmup_steps in a new run folder"
        )
    return float(report.losses.next_token)


def _stream(config: PretrainConfig, step: int, *, split: Split = "train") -> Iterator[PackedRows]:
    tokenizer = tokenizers.Tokenizer.from_file(str(ASSETS / config.model / "tokenizer.json"))
    draw = task_batches.BatchSettings(config.seed, config.rows, config.length, config.shares, split)
    return task_batches.batches(tokenizer, draw, step=step)


def _held_out_rows(config: PretrainConfig) -> PackedRows:
    """One batch of items that no step trains on, the same at every measurement."""
    return jax.tree.map(jnp.asarray, next(_stream(config, 0, split="test")))


def _first_weights(config: PretrainConfig, model_config: ModelConfig) -> dict[str, Any]:
    drawn = params_of(initialise(model_config, jax.random.key(config.seed), layout=LAYOUT))
    if not config.start_from:
        return drawn
    file = Path(config.start_from)
    if not file.is_file():
        raise ConfigError(f"start_from: {file} is not a file; name weights that an earlier run kept")
    found = load_file(file)
    if {name: value.shape for name, value in found.items()} != {name: value.shape for name, value in drawn.items()}:
        raise ConfigError(f"start_from: {file} does not hold the weights of {config.model}")
    return {name: jnp.asarray(value) for name, value in found.items()}


def weights_of(state: TrainState) -> dict[str, jax.Array]:
    """All parameters of the model, router biases included, by path."""
    return state.params | state.biases


def save_weights(out: Path, step: int, state: TrainState) -> None:
    """Keep the weights of ``step``; the file is there whole or not at all."""
    file = weights_file(out, step)
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file({name: np.asarray(value) for name, value in weights_of(state).items()}, partial)
    partial.replace(file)


def load_weights(out: Path, step: int) -> dict[str, np.ndarray]:
    """The weights that a run kept at ``step``, by path, float32."""
    file = weights_file(out, step)
    if not file.exists():
        kept = sorted(int(each.stem) for each in file.parent.glob("*.safetensors"))
        raise ConfigError(f"{file}: not there; the run kept the weights of steps {kept}")
    return load_file(file)


def weights_file(out: Path, step: int) -> Path:
    """Where a run keeps the weights of a step."""
    return out / "weights" / f"{step}.safetensors"


def _mesh(devices: int) -> Mesh:
    if devices > jax.device_count():
        raise ConfigError(f"devices: is {devices}, but jax sees {jax.device_count()}; lower it")
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def _record(step: int, report: StepReport, *, learning_rate: float) -> dict[str, Any]:
    found = report.losses
    return {
        "step": step,
        "loss": float(found.next_token),
        "mtp_loss": [float(each) for each in found.mtp],
        "accuracy": [float(each) for each in found.accuracy],
        "gradient_norm": float(report.gradient_norm),
        "learning_rate": learning_rate,
        "expert_load": [float(load.max() / load.mean()) for load in map(np.asarray, found.load)],
    }


def _held_out_record(step: int, found: Losses) -> dict[str, Any]:
    return {
        "step": step,
        "held_out_loss": float(found.next_token),
        "held_out_mtp_loss": [float(each) for each in found.mtp],
        "held_out_accuracy": [float(each) for each in found.accuracy],
    }
