"""`sft`, `distill` and `rl`: fine-tuning from Python, as with the commands of these names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepjax.infer.load import use_caches
from stepjax.program_cache import ProgramCache
from stepjax.startup import Startup
from stepjax.train.config.reader import change_settings, read_settings
from stepjax.train.config.tune import TuneConfig
from stepjax.train.objectives.objective import Verb
from stepjax.train.runs.folder import read_metrics
from stepjax.train.tune.run import leaves_file, tune_to_end

RECIPES = Path(__file__).parents[1] / "recipes"


@dataclass(frozen=True)
class TuneResult:
    """The folder of a finished run, its trained parameters and its metrics."""

    folder: Path  # the run folder
    steps: int  # updates, including those before an interruption
    metrics: tuple[dict[str, Any], ...]  # records of the steps, as in metrics.jsonl
    leaves: Path  # .safetensors of the trained parameters
    adapter: Path | None  # folder for ``stepjax export-adapter``; None unless an adapter was trained


def distill(config: TuneConfig | str | Path, out: str | Path, settings: Mapping[str, Any] | None = None) -> TuneResult:
    """Train a model to answer as a teacher does, on its own answers (on-policy distillation). As ``stepjax distill``.

    Args:
      config: settings, a TOML file, or the name of a recipe in the package, such as ``step-tiny-distill``.
      out: run folder; an interrupted run there is resumed.
      settings: values that override those of ``config``, by dotted name, such as ``{"optim.steps": 20}``.

    Raises:
      ConfigError: a setting is unknown or contradicts another, or the folder belongs to another run.
      TrainingError: sampler and trainer disagree, or too many batches in a row have no finite gradient.

    Example:
      >>> import stepjax, tempfile
      >>> few = {"optim.steps": 2, "optim.decay_from": 0, "optim.rows": 2, "eval.every": 0}
      >>> few |= {"rollout.prompts": 2, "rollout.max_tokens": 8}
      >>> result = stepjax.distill("step-tiny-distill", tempfile.mkdtemp(), few)
      >>> result.steps, result.adapter.name, result.metrics[0]["loss"] > 0
      (2, 'adapter', True)
    """
    return _tuned("distill", config, out, settings)


def sft(config: TuneConfig | str | Path, out: str | Path, settings: Mapping[str, Any] | None = None) -> TuneResult:
    """Train a model on examples (supervised fine-tuning). As ``stepjax sft``; arguments and errors as `distill`.

    Example:
      >>> import stepjax, tempfile
      >>> few = {"optim.steps": 2, "optim.decay_from": 0, "optim.rows": 2, "rollout.prompts": 2, "eval.every": 0}
      >>> examples = {"loss.objective": "sft", "rollout.source": "data", "teachers": {}}
      >>> result = stepjax.sft("step-tiny-distill", tempfile.mkdtemp(), {**few, **examples})
      >>> result.steps, result.leaves.name
      (2, '2.safetensors')
    """
    return _tuned("sft", config, out, settings)


def rl(config: TuneConfig | str | Path, out: str | Path, settings: Mapping[str, Any] | None = None) -> TuneResult:
    """Train a model on rewards for its own answers. As ``stepjax rl``; arguments and errors as `distill`.

    Example:
      >>> import stepjax, tempfile
      >>> few = {"optim.steps": 2, "optim.decay_from": 0, "optim.rows": 2, "eval.every": 0}
      >>> few |= {"model.path": "step-tiny", "rollout.prompts": 2, "rollout.max_tokens": 64}
      >>> rewards = {"loss.objective": "grpo", "rollout.samples": 4, "teachers": {}}
      >>> result = stepjax.rl("step-tiny-distill", tempfile.mkdtemp(), {**few, **rewards})
      >>> result.steps, "reward" in result.metrics[0]
      (2, True)
    """
    return _tuned("rl", config, out, settings)


def _tuned(
    verb: Verb, config: TuneConfig | str | Path, out: str | Path, settings: Mapping[str, Any] | None
) -> TuneResult:
    changes = {**(settings or {}), "verb": verb}
    if isinstance(config, TuneConfig):
        config = change_settings(config, changes)
    else:
        config = read_settings(TuneConfig, recipe(config), changes=changes)
    return run_tuning(config, Path(out), cache=use_caches())


def run_tuning(
    config: TuneConfig,
    folder: Path,
    *,
    cache: ProgramCache | None,
    startup: Startup | None = None,
    write: Callable[[str], object] | None = None,
) -> TuneResult:
    """Train with these settings.

    Args:
      cache, startup, write: as `tune` takes them.
    """
    _, ending = tune_to_end(config, folder, cache=cache, startup=startup, write=write)
    return TuneResult(
        folder=folder,
        steps=ending.steps,
        metrics=tuple(read_metrics(folder)),
        leaves=leaves_file(folder, ending.exported),
        adapter=folder / "adapter" if config.lora.kind == "lora" else None,
    )


def recipe(name: str | Path) -> Path:
    """The file of settings: a path, or the name of a recipe in the package."""
    path = Path(name)
    inside = RECIPES / f"{name}.toml"
    return inside if not path.exists() and inside.exists() else path
