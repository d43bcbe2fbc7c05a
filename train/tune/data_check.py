"""Looks at the data of a run before anything is loaded or compiled."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np

from stepjax.errors import ConfigError
from stepjax.train.config.tune import DataSettings, TuneConfig
from stepjax.train.data.encoder import TextModel
from stepjax.train.data.files.records import counted
from stepjax.train.data.lengths import Lengths, look
from stepjax.train.data.sources import SplitRows
from stepjax.train.data.survey import MAX_FAULTS, fault_lines
from stepjax.train.data.wanted import Wanted, unwanted
from stepjax.train.objectives.table import find_objective
from stepjax.train.runs.identity import is_first_process

LOOKED_AT = 200  # rows of a source that are rendered before a run


def check_data(config: TuneConfig) -> None:
    """Read every row that will be trained or evaluated, and say what each source holds.

    Raises:
      ConfigError: rows are bad, or lack what the run wants of them, or none of a source fits a row of a batch. The
        first bad rows are named by file and line.
    """
    model = None
    for name, settings in _sources(config).items():
        rows = SplitRows.open(name, settings)
        faults = unwanted(rows.survey, rows.records, _wanted(config, name))
        if faults:
            lines = "\n  ".join(fault_lines(faults, MAX_FAULTS))
            raise ConfigError(f"data.{name}: {counted(len(faults), 'bad row')}\n  {lines}")
        model = model or TextModel.open(config.model.path)
        length = config.optim.length if config.data_writes else config.rollout.context or config.optim.length
        lengths = look(
            settings, rows.records, rows.trained, model, length=length, writes=not config.data_writes, most=LOOKED_AT
        )
        if lengths.faults:
            lines = "\n  ".join(fault_lines(lengths.faults, MAX_FAULTS))
            raise ConfigError(f"data.{name}: {counted(len(lengths.faults), 'bad row')} of {LOOKED_AT}\n  {lines}")
        if len(lengths.left_out) == lengths.looked_at:
            raise ConfigError(
                f"data.{name}: none of {counted(lengths.looked_at)} fits {length} tokens (prompts have "
                f"{min(lengths.prompts)} to {max(lengths.prompts)}); raise optim.length"
            )
        for line in (*_about(name, settings, rows, config), *_about_lengths(name, lengths, length)):
            tell(line)


def tell(line: str) -> None:
    """Write a line to the terminal, on the first process only. An empty line is nothing to say."""
    if line and is_first_process():
        print(line, file=sys.stderr)


def file_sources(config: TuneConfig) -> dict[str, DataSettings]:
    """The sources that are trained and have rows of files."""
    return {name: data for name, data in config.data.items() if data.weight and data.has_files}


def _sources(config: TuneConfig) -> dict[str, DataSettings]:
    """The sources of files that are read, the file of evaluation among them."""
    return file_sources(config) | ({"eval.file": DataSettings(path=config.eval.file)} if config.eval.file else {})


def _wanted(config: TuneConfig, name: str) -> Wanted:
    if name not in config.data:
        return "answer"
    if config.data_writes:
        return "completion"
    has_reward = config.data[name].reward or config.data[name].environment
    return "answer" if find_objective(config.loss.objective).uses_rewards and not has_reward else "prompt"


def _about(name: str, settings: DataSettings, rows: SplitRows, config: TuneConfig) -> Iterator[str]:
    forms = ", ".join(f"{count:,} {form}" for form, count in rows.survey.forms().items())
    held_out = f", {len(rows.held_out):,} held out" if len(rows.held_out) else ""
    shared = f", {rows.num_shared:,} left out because held_out_path asks the same" if rows.num_shared else ""
    yield f"data.{name}: {counted(len(rows.survey))} of {settings.path} ({forms}){held_out}{shared}"
    if name in config.data and not len(rows.held_out) and config.eval.every:
        yield f"data.{name}: no row is held out, so eval_held_out_* leave it out; set held_out or held_out_path"


def _about_lengths(name: str, lengths: Lengths, length: int) -> Iterator[str]:
    some = "" if lengths.looked_at == lengths.num_rows else f" of {lengths.looked_at:,} that were looked at"
    for places, what in ((lengths.cut, "cut"), (lengths.left_out, "left out")):
        if places:
            example = f"such as {places[0]}"
            yield f"data.{name}: {counted(len(places))}{some} {what} at {length} tokens, {example}"
    if lengths.sequences:
        median, most = int(np.median(lengths.sequences)), max(lengths.sequences)
        yield f"data.{name}: the median row has {median} tokens, the longest {most}"
