"""A pretraining run's settings: one TOML file, ``--set`` overrides, one frozen dataclass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from stepjax.config import PRESETS
from stepjax.errors import ConfigError
from stepjax.ranges import Range, check_ranges
from stepjax.train.config.mix import MIX
from stepjax.train.config.reader import read_settings

MAX_TOKENS = 2**26  # of a batch


@dataclass(frozen=True)
class PretrainConfig:
    """Full-parameter training of a small model on the generated tasks."""

    model: str = "step-tiny"  # name of a preset
    start_from: str = ""  # .safetensors file of weights that an earlier run kept; "": random weights
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0  # of the initial weights and of the data stream
    # data parallel; virtual devices on a CPU, where one per core was measured to be fastest
    devices: Annotated[int, Range(1, 4096)] = 2
    rows: Annotated[int, Range(1, 65_536)] = 12  # packed rows per step, a multiple of devices
    length: Annotated[int, Range(2, 2**20)] = 192  # tokens per row; 99.9 % of the examples fit
    steps: Annotated[int, Range(1, 10**8)] = 2800  # updates of the run
    peak_lr: Annotated[float, Range(1e-12, 10)] = 3e-3  # learning rate after the warm-up
    warmup_steps: Annotated[int, Range(0, 10**8)] = 100  # of a linear warm-up; 0: none
    decay_from: Annotated[int, Range(0, 10**8)] = 1600  # step at which the linear decay begins
    lr_floor: Annotated[float, Range(0, 1)] = 0.02  # of the peak, at the last step
    b1: Annotated[float, Range(0, 0.99999)] = 0.9  # decay of Adam's first moment
    b2: Annotated[float, Range(0, 0.999999)] = 0.98  # decay of Adam's second moment
    weight_decay: Annotated[float, Range(0, 10)] = 0.01  # on matrices
    clip: Annotated[float, Range(1e-6, 10**6, zero="off")] = 1.0  # largest global norm of the gradient
    mtp_from: Annotated[int, Range(0, 10**8)] = 1700  # step from which the MTP heads are trained too
    mtp_weight: Annotated[float, Range(0, 1000)] = 0.3  # weight of the mean of the three MTP losses
    balance_rate: Annotated[float, Range(0, 1000)] = 1.0  # step of the router bias per unit of learning rate
    log_every: Annotated[int, Range(0, 10**8)] = 20  # steps between records; 0: one at the end
    save_every: Annotated[int, Range(0, 10**8)] = 200  # steps between checkpoints; 0: one at the end
    # steps between measurements of the loss on held-out rows; 0: never
    held_out_every: Annotated[int, Range(0, 10**8)] = 200
    # of the examples, by task; they sum to 1
    shares: dict[str, Annotated[float, Range(0, 1)]] = field(default_factory=lambda: dict(MIX))
    keep: tuple[Annotated[int, Range(1, 10**8)], ...] = ()  # steps whose weights are kept as well as the checkpoints

    def __post_init__(self) -> None:
        if self.model not in PRESETS:
            raise ConfigError(f"model: is {self.model!r}, expected one of {', '.join(PRESETS)}")
        check_ranges(self)
        unknown = set(self.shares) - set(MIX)
        if unknown or abs(sum(self.shares.values()) - 1) > 1e-6:
            raise ConfigError(f"shares: are {self.shares}, expected shares of {', '.join(MIX)} that sum to 1")
        if self.rows * self.length > MAX_TOKENS:
            raise ConfigError(
                f"rows: {self.rows:,} rows × length {self.length:,} is more than {MAX_TOKENS:,} tokens; lower one"
            )
        if max(self.keep, default=0) > self.steps:
            raise ConfigError(f"keep: has {max(self.keep)}, expected steps from 1 to steps = {self.steps}")
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
