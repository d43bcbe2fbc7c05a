"""A pretraining run's settings: one TOML file, ``--set`` overrides, one frozen dataclass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stepjax.config import PRESETS
from stepjax.errors import ConfigError
from stepjax.train.config.mix import MIX
from stepjax.train.config.reader import read_settings


@dataclass(frozen=True)
class PretrainConfig:
    """Full-parameter training of a small model on the generated tasks."""

    model: str = "step-tiny"  # name of a preset
    start_from: str = ""  # .safetensors file of weights that an earlier run kept; "": random weights
    seed: int = 0  # of the initial weights and of the data stream
    devices: int = 2  # data parallel; virtual devices on a CPU, where one per core was measured to be fastest
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
    mtp_from: int = 1700  # step from which the MTP heads are trained too
    mtp_weight: float = 0.3  # weight of the mean of the three MTP losses
    balance_rate: float = 1.0  # step of the router bias per unit of learning rate
    log_every: int = 20  # steps
    save_every: int = 200  # steps between checkpoints
    held_out_every: int = 200  # steps between measurements of the loss on held-out rows; 0: never
    shares: dict[str, float] = field(default_factory=lambda: dict(MIX))  # of the examples, by task; they sum to 1
    keep: tuple[int, ...] = ()  # steps whose weights are kept as well as the checkpoints

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
    """The settings of a pretraining run. Errors as `stepjax.train.config.reader.read_settings`."""
    return read_settings(PretrainConfig, path, overrides)
