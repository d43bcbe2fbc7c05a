"""The pretraining run: update, log, save. The same command starts a run and resumes it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax.sharding import AxisType, Mesh
from safetensors.numpy import load_file, save_file

from stepjax.config import ASSETS, ModelConfig
from stepjax.errors import ConfigError, TrainingError
from stepjax.model.layout import SingleDevice
from stepjax.model.step3p5 import abstract, initialise, params_of
from stepjax.program_cache import ProgramCache
from stepjax.startup import Startup
from stepjax.stored_function import StoredFunction, compile_together
from stepjax.train.config.pretrain import PretrainConfig
from stepjax.train.data import task_batches
from stepjax.train.data.fingerprint import file_digest
from stepjax.train.data.words import Split
from stepjax.train.losses.next_token import Losses
from stepjax.train.packing.rows import PackedRows
from stepjax.train.pretrain.step import Placement, StepReport, TrainState, make_held_out, make_step, split_biases
from stepjax.train.runs.checkpoints import Checkpoints
from stepjax.train.runs.folder import MetricsFile, check_finite, is_due, progress
from stepjax.train.runs.identity import claim, claim_content, update_settings
from stepjax.train.runs.lock import locked
from stepjax.train.runs.optimizer import adamw, learning_rate
from stepjax.whole_file import whole_file

# With step-tiny's shapes a step took 0.37 s on two cores with tokens sorted by expert, and 0.47 s with every expert on
# every token.
LAYOUT = SingleDevice(form="capacity")

FREE = ("start_from", "log_every", "save_every", "held_out_every", "keep")  # a resumed run may change them


def pretrain(
    config: PretrainConfig,
    out: Path,
    *,
    cache: ProgramCache | None = None,
    startup: Startup | None = None,
    write: Callable[[str], object] | None = None,
) -> TrainState:
    """Train in the run folder ``out``, or resume the run that is there.

    The folder holds ``config.toml`` (the resolved settings), ``metrics.jsonl``, ``checkpoints/`` (the newest three,
    each of which appears only once it is complete) and ``weights/STEP.safetensors``. A resumed run gives the same bits
    as an uninterrupted one, since a batch depends on seed and step only.

    Args:
      cache: executables of earlier runs.
      startup: shows what is done before the first step.
      write: called with a line now and then that says how far the run is, if standard error is no terminal.

    Raises:
      ConfigError: the folder belongs to a run with other settings, or there are too few devices.
      TrainingError: the loss is not finite.
    """
    out = out.resolve()  # orbax takes absolute paths only
    with locked(out):
        previous = claim(config, out, free=FREE)
        return _pretrain(config, previous, out, cache=cache, startup=startup or Startup(), write=write)


def _pretrain(
    config: PretrainConfig,
    previous: PretrainConfig,
    out: Path,
    *,
    cache: ProgramCache | None,
    startup: Startup,
    write: Callable[[str], object] | None,
) -> TrainState:
    """As `pretrain`, in a folder that is this process's own."""
    model_config = ModelConfig.preset(config.model)
    placement = Placement.data_parallel(_mesh(config.devices))
    schedule = learning_rate(
        config.peak_lr,
        warmup=config.warmup_steps,
        decay_from=config.decay_from,
        steps=config.steps,
        floor=config.lr_floor,
    )
    optimizer = adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, clip=config.clip)
    model = abstract(model_config, dtype=jnp.float32, layout=LAYOUT)
    params, biases = split_biases(_initial_weights(config, model_config))
    initial = TrainState(params, biases, optimizer.init(params), jnp.zeros((), jnp.int32))
    initial = jax.device_put(initial, placement.state)

    def functions(mtp_weight: float) -> tuple[Any, Any]:
        rate = config.balance_rate
        step = make_step(model, optimizer, schedule, placement, mtp_weight=mtp_weight, balance_rate=rate)
        held_out = make_held_out(model, placement, mtp_weight=mtp_weight)
        on_state, on_report = placement.state, placement.report
        stored: Callable[..., StoredFunction] = functools.partial(
            StoredFunction,
            identity=f"{config} {mtp_weight}",
            cache=cache,
            types=(Losses, StepReport),
            in_shardings=(on_state, placement.rows),
        )
        return (
            stored("step", step, donate_argnums=0, out_shardings=(on_state, on_report)),
            stored("held out", held_out, out_shardings=on_report),
        )

    plain, with_mtp = functions(0.0), functions(config.mtp_weight)
    claim_content(out, {"start_from": file_digest(Path(config.start_from))} if config.start_from else {})
    with Checkpoints(out, keep=3) as checkpoints:
        state = checkpoints.resume(initial)
        start = int(state.step)
        update_settings(config, previous, out)
        stream, held_out = _stream(config, start), _held_out_rows(config)
        if start < config.steps:
            with startup.stage("compiling", "preparing programs", unit="programs") as stage:
                update = (with_mtp if start >= config.mtp_from else plain)[0]
                compile_together([(update, (state, held_out))], progress=stage.advance)
        metrics = MetricsFile(out / "metrics.jsonl", start)
        with progress(config.steps, start, write=write) as advance, contextlib.closing(metrics):
            began, tokens, pending = time.perf_counter(), 0, None
            for step in range(start, config.steps):
                rows = next(stream)
                tokens += int((rows.segment_ids > 0).sum())
                update, measure = with_mtp if step >= config.mtp_from else plain
                state, report = update(state, jax.tree.map(jnp.asarray, rows))
                if pending:  # one step late, so that the device never waits for the host
                    advance(f"loss {_finite(*pending):.3f}")
                pending, done = (step, report), step + 1
                if is_due(config.log_every, step) or done == config.steps:
                    record = _record(step, report, learning_rate=float(np.asarray(schedule(step))))
                    record["tokens_per_s"] = round(tokens / (time.perf_counter() - began), 1)
                    metrics.write(record)
                    began, tokens = time.perf_counter(), 0
                if config.held_out_every and (is_due(config.held_out_every, done) or done == config.steps):
                    metrics.write(_held_out_record(step, measure(state, held_out)))
                keep = done in config.keep or done == config.steps
                if keep or is_due(config.save_every, done):
                    _finite(step, report)  # a checkpoint must not hold weights that are not finite
                    check_finite(done, weights_of(state))
                if keep:
                    save_weights(out, done, state)
                if is_due(config.save_every, done) or done == config.steps:
                    checkpoints.save(done, state, {"config": dataclasses.asdict(config)})
            if pending:
                advance(f"loss {_finite(*pending):.3f}")
    return state


def _finite(step: int, report: StepReport) -> float:
    """The step's loss. TrainingError: it or the gradient is not finite."""
    loss, norm = float(report.losses.total), float(report.gradient_norm)
    if not math.isfinite(loss + norm):
        raise TrainingError(
            f"step {step}: the loss is {loss} and the gradient's norm {norm}; the checkpoints hold earlier steps. "
            "Lower peak_lr or raise warmup_steps, in a new run folder"
        )
    return float(report.losses.next_token)


def _stream(config: PretrainConfig, step: int, *, split: Split = "train") -> Iterator[PackedRows]:
    tokenizer = tokenizers.Tokenizer.from_file(str(ASSETS / config.model / "tokenizer.json"))
    settings = task_batches.BatchSettings(config.seed, config.rows, config.length, config.shares, split)
    return task_batches.batches(tokenizer, settings, step=step)


def _held_out_rows(config: PretrainConfig) -> PackedRows:
    """A batch of held-out items, the same at every measurement."""
    return jax.tree.map(jnp.asarray, next(_stream(config, 0, split="test")))


def _initial_weights(config: PretrainConfig, model_config: ModelConfig) -> dict[str, Any]:
    random = params_of(initialise(model_config, jax.random.key(config.seed), layout=LAYOUT))
    if not config.start_from:
        return random
    file = Path(config.start_from)
    if not file.is_file():
        raise ConfigError(f"start_from: {file} is not a file; expected weights that an earlier run kept")
    weights = load_file(file)
    if {name: value.shape for name, value in weights.items()} != {name: value.shape for name, value in random.items()}:
        raise ConfigError(f"start_from: {file} does not hold the weights of {config.model}")
    return {name: jnp.asarray(value) for name, value in weights.items()}


def weights_of(state: TrainState) -> dict[str, jax.Array]:
    """All parameters of the model, router biases included, by path."""
    return state.params | state.biases


def save_weights(out: Path, step: int, state: TrainState) -> None:
    """Write the weights of ``step``. The file appears only once it is complete."""
    file = weights_file(out, step)
    file.parent.mkdir(exist_ok=True)
    with whole_file(file) as partial:
        save_file({name: np.asarray(value) for name, value in weights_of(state).items()}, partial)


def load_weights(out: Path, step: int) -> dict[str, np.ndarray]:
    """The weights that a run kept at ``step``, float32 by path. ConfigError: it kept none at this step."""
    file = weights_file(out, step)
    if not file.exists():
        kept = sorted(int(path.stem) for path in file.parent.glob("*.safetensors"))
        raise ConfigError(f"{file}: does not exist; the run kept the weights of steps {kept}")
    return load_file(file)


def weights_file(out: Path, step: int) -> Path:
    """File of the weights of a step."""
    return out / "weights" / f"{step}.safetensors"


def _mesh(devices: int) -> Mesh:
    if devices > jax.device_count():
        raise ConfigError(f"devices: is {devices}, but jax sees {jax.device_count()}; lower it")
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def _record(step: int, report: StepReport, *, learning_rate: float) -> dict[str, Any]:
    losses = report.losses
    return {
        "step": step,
        "loss": float(losses.next_token),
        "mtp_loss": [float(loss) for loss in losses.mtp],
        "accuracy": [float(accuracy) for accuracy in losses.accuracy],
        "gradient_norm": float(report.gradient_norm),
        "learning_rate": learning_rate,
        "expert_load": [float(load.max() / load.mean()) for load in map(np.asarray, losses.load)],
    }


def _held_out_record(step: int, losses: Losses) -> dict[str, Any]:
    return {
        "step": step,
        "held_out_loss": float(losses.next_token),
        "held_out_mtp_loss": [float(loss) for loss in losses.mtp],
        "held_out_accuracy": [float(accuracy) for accuracy in losses.accuracy],
    }
