"""A run's settings: one TOML file, ``--set`` overrides, one frozen dataclass."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepjax.config import PRESETS
from stepjax.errors import ConfigError
from stepjax.train.tasks import MIX


@dataclass(frozen=True)
class PretrainConfig:
    """Full-parameter training of a small model on the generated tasks."""

    model: str = "step-tiny"  # preset whose configuration is trained
    start_from: str = ""  # weights that an earlier run kept (a .safetensors file); "" draws fresh ones
    seed: int = 0  # of the initial weights and of the data stream
    devices: int = 2  # data parallel; on a CPU virtual devices, one a core measured fastest
    rows: int = 12  # packed rows per step, a multiple of devices
    length: int = 192  # tokens per row; 99.9 % of the examples fit
    steps: int = 2800
    peak_lr: float = 3e-3
    warmup_steps: int = 100
    decay_from: int = 1600  # step at which the linear decay begins
    lr_floor: float = 0.02  # of the peak, at the last step
    b1: float = 0.9
    b2: float = 0.98
    weight_decay: float = 0.01  # on matrices
    clip: float = 1.0  # global norm of the gradient
    mtp_from: int = 1700  # step at which the MTP heads join
    mtp_weight: float = 0.3  # of the mean of the three MTP losses
    balance_rate: float = 1.0  # step of the router bias per unit of learning rate
    log_every: int = 20  # steps
    save_every: int = 200  # steps between checkpoints
    held_out_every: int = 200  # steps between losses on held-out rows; 0 is never
    shares: dict[str, float] = field(default_factory=lambda: dict(MIX))  # of the tasks, by example; they sum to 1
    keep: tuple[int, ...] = ()  # steps whose weights are kept beside the checkpoints, to ship or to study

    def __post_init__(self) -> None:
        if self.model not in PRESETS:
            raise ConfigError(f"model: is {self.model!r}, expected one of {', '.join(PRESETS)}")
        for name in ("devices", "rows", "length", "steps", "warmup_steps", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: is {getattr(self, name)}, expected at least 1")
        unknown = set(self.shares) - set(MIX)
        if unknown or abs(sum(self.shares.values()) - 1) > 1e-6 or min(self.shares.values()) < 0:
            raise ConfigError(f"shares: are {self.shares}, expected shares of {', '.join(MIX)} that sum to 1")
        if self.rows % self.devices:
            raise ConfigError(f"rows: {self.rows} rows cannot be split over devices = {self.devices}")
        if not self.warmup_steps < self.decay_from < self.steps:
            raise ConfigError(
                f"decay_from: is {self.decay_from}, expected between warmup_steps = {self.warmup_steps} and "
                f"steps = {self.steps}"
            )


def read_pretrain(path: Path, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Read a TOML file and apply ``name=value`` overrides, whose values are TOML too.

    Raises:
      ConfigError: the file cannot be read, or a key or a value's type is unknown; the message names the key.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from None
    for override in overrides:
        found |= _override(override)
    defaults = dataclasses.asdict(PretrainConfig())
    for name, value in found.items():
        if name not in defaults:
            raise ConfigError(f"{path}: {name} is not a setting; there are {', '.join(defaults)}")
        found[name] = _typed(name, value, defaults[name])
    return PretrainConfig(**found)


def write_resolved(config: PretrainConfig, path: Path) -> None:
    """The settings of a run as they were used, as TOML that `read_pretrain` reads again."""
    lines = [f"{name} = {_toml(value)}" for name, value in dataclasses.asdict(config).items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_toml(each)}" for name, each in value.items()) + "}"
    return json.dumps(value)


def _override(text: str) -> dict[str, Any]:
    name, equals, value = text.partition("=")
    try:
        if not equals:
            raise ValueError
        return {name.strip(): tomllib.loads(f"value = {value}")["value"]}
    except ValueError:
        raise ConfigError(f'--set {text}: expected name=value, as peak_lr=1e-3 or model="step-tiny"') from None


def _typed(name: str, value: Any, default: Any) -> Any:
    """The value in its setting's type; a whole number stands for a float."""
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, dict) and isinstance(value, dict):
        return {key: _typed(f"{name}.{key}", each, 0.0) for key, each in value.items()}
    if isinstance(default, tuple) and isinstance(value, list) and all(type(each) is int for each in value):
        return tuple(value)
    if type(value) is not type(default):
        raise ConfigError(f"{name}: is {value!r}, expected a {type(default).__name__}")
    return value
