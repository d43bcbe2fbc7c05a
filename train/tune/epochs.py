"""How many steps a run of so many passes over its files has."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

from stepjax.errors import ConfigError
from stepjax.train.config.tune import TuneConfig
from stepjax.train.data.sources import SplitRows
from stepjax.train.tune.data_check import file_sources, tell


def with_steps(config: TuneConfig) -> TuneConfig:
    """The settings with `optim.steps` in place of `optim.epochs`; as they are without epochs.

    Every row of every file that is trained is read at least so often. Sources keep their shares, so files that give
    more than their part are read more often. What each file does is said on the terminal.

    Raises:
      ConfigError: no source has an end, or the steps are too many.
    """
    epochs = config.optim.epochs
    if not epochs:
        return config
    files = file_sources(config)
    if not files:
        raise ConfigError(
            f"optim.epochs: is {epochs:g}, but no source of this run has an end (kinds "
            f"{', '.join(sorted({data.kind for data in config.data.values()}))}); give optim.steps"
        )
    sizes = {name: len(SplitRows.open(name, data).trained) for name, data in files.items()}
    shares = {name: Fraction(str(data.weight)) for name, data in config.data.items() if data.weight}
    total, prompts = sum(shares.values()), config.rollout.prompts
    steps = max(
        math.ceil(math.ceil(Fraction(str(epochs)) * size) * total / (shares[name] * prompts))
        for name, size in sizes.items()
    )
    read = {name: float(steps * prompts * shares[name] / total / size) for name, size in sizes.items()}
    times = ", ".join(f"data.{name} {count:.4g} times" for name, count in read.items())
    changed = dataclasses.replace(config, optim=dataclasses.replace(config.optim, epochs=0.0, steps=steps))
    tell(f"optim.epochs: {epochs:g} are {steps:,} steps of {prompts} rows, which read {times}")
    return changed
