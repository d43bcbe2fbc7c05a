"""Prompts and completions of each step. A batch depends on seed and step only, so a step number is enough to resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from stepjax.errors import ConfigError
from stepjax.train.config.tune import DataSettings
from stepjax.train.data import tasks
from stepjax.train.data.environment import ExactMatch, environment
from stepjax.train.data.files.records import Records, counted, read_row_at
from stepjax.train.data.order import RowOrder
from stepjax.train.data.prompts import Prompt, read_prompt
from stepjax.train.data.quotas import Quotas
from stepjax.train.data.survey import MAX_FAULTS, RowReader, Survey, fault_lines, known_survey, open_records
from stepjax.train.data.turns import Encoder, turn_ids
from stepjax.train.data.words import Split
from stepjax.train.environments.episode import Environment


class Source(Protocol):
    """Rows by index, without end."""

    def row(self, seed: int, index: int, *, window: int = 1) -> Prompt:
        """The row at an index. Rows of a file do not recur within ``window`` successive indices."""
        ...


class TaskSource:
    """Generated items. Row i depends on seed and i only."""

    def __init__(self, name: str, settings: DataSettings, session: Encoder, *, split: Split = "train"):
        self._name, self._settings, self._session = name, settings, session
        self._split: Split = split

    def row(self, seed: int, index: int, *, window: int = 1) -> Prompt:
        rng = np.random.default_rng([seed, index, 1])
        shares = {name: share for name, share in self._settings.shares.items() if share}
        return self.prompt(tasks.draw(rng, self._split, shares), index)

    def prompt(self, item: tasks.Item, index: int) -> Prompt:
        def new_environment() -> Environment:
            return environment(item, tools_answer=self._settings.tools)

        episode = new_environment()
        if len(episode.messages) == len(item.messages):
            ids, completion = turn_ids(self._session, item.messages, item.target, tools=item.tools)
        else:  # the tool answers during the episode
            ids = tuple(self._session.encode_chat(episode.messages, tools=item.tools))
            completion = None
        row = {"task": item.task, "answer": item.answer}
        return Prompt(self._name, index, ids, completion, new_environment, episode.messages, item.tools, row)


class EnvironmentSource:
    """Episodes without a file: the environment of the user makes the prompt from index and seed."""

    def __init__(self, name: str):
        self._name = name

    def row(self, seed: int, index: int, *, window: int = 1) -> Prompt:
        return Prompt(self._name, index, (), None, lambda: ExactMatch(()), ())


class FileSource:
    """Rows of files, in a new order each epoch. They are read by place, so the files stay on disk."""

    def __init__(self, name: str, settings: DataSettings, session: Encoder, *, split: Split = "train"):
        """
        Raises:
          ConfigError: a file cannot be read, or rows are bad; they are named.
        """
        self._name, self._session = name, session
        self._reader = RowReader(settings)
        self.rows = SplitRows.open(name, settings)
        self._records = self.rows.held_out_records if split == "test" else self.rows.records
        self._numbers = self.rows.held_out if split == "test" else self.rows.trained
        self._orders: dict[tuple[int, int], RowOrder] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    def row(self, seed: int, index: int, *, window: int = 1) -> Prompt:
        if (seed, window) not in self._orders:
            self._orders[seed, window] = RowOrder(len(self), seed, window=window)
        return self.line(int(self._numbers[self._orders[seed, window][index]]))

    def at(self, number: int) -> Prompt:
        """Row ``number`` of the split, in the order of the files."""
        return self.line(int(self._numbers[number]))

    def line(self, number: int) -> Prompt:
        """A row by its number in the files, counted from 0, whatever the split."""
        row, where = read_row_at(self._records, number), self._records.where(number)
        return read_prompt(self._name, number, row, self._session, where=where, reader=self._reader)


@dataclass(frozen=True)
class SplitRows:
    """The rows of a source that are trained, and those that are held out."""

    records: Records
    survey: Survey  # of all rows of the path
    trained: np.ndarray  # int64: numbers of rows
    held_out: np.ndarray  # int64: numbers of rows, of ``held_out_records``
    held_out_records: Records
    num_shared: int = 0  # rows of the path that are left out, since held_out_path asks the same

    @classmethod
    def open(cls, name: str, settings: DataSettings) -> SplitRows:
        """ConfigError: a file cannot be read, rows are bad, or nothing is left to train."""
        records, survey = _surveyed(name, settings, settings.path)
        everything = survey.numbers
        if settings.held_out_path:
            others, asked = _surveyed(name, settings, settings.held_out_path)
            shared = np.isin(survey.questions, asked.questions)
            rows = cls(records, survey, everything[~shared], np.arange(len(asked)), others, int(shared.sum()))
        else:
            held = held_out_rows(survey.questions, settings.held_out)
            rows = cls(records, survey, everything[~held], everything[held], records)
        if not len(rows.trained):
            raise ConfigError(
                f"data.{name}: no row is left to train: {settings.path} has {counted(len(survey))}, all of them held "
                "out; rows that ask the same are held out together"
            )
        return rows


def held_out_rows(questions: np.ndarray, share: float) -> np.ndarray:
    """Which rows are held out, bool [N]: those whose questions have the smallest hashes.

    Rows that ask the same are all held out or all trained, wherever they stand, so at least ``share`` of the rows and
    at least one of them are held out.

    Args:
      questions: a hash of what each row asks, uint64 [N].
    """
    if not share:
        return np.zeros(len(questions), bool)
    count = max(1, round(share * len(questions)))
    return questions <= np.partition(questions, count - 1)[count - 1]


def _surveyed(name: str, settings: DataSettings, path: str) -> tuple[Records, Survey]:
    """Rows that are all good, and what they are. ConfigError: some are bad; the first of them are named."""
    try:
        records = open_records(settings, path)
    except ConfigError as error:
        raise ConfigError(f"data.{name}: {error}") from None
    survey = known_survey(settings, records, path)
    if survey.faults:
        lines = "\n  ".join(fault_lines(survey.faults, MAX_FAULTS))
        raise ConfigError(f"data.{name}: {counted(len(survey.faults), 'bad row')}\n  {lines}")
    return records, survey


@dataclass(frozen=True)
class Stream:
    """Prompts of each step, from several sources in proportion to their weights."""

    sources: Mapping[str, Source]
    weights: Mapping[str, float]
    seed: int
    prompts: int  # of a step

    def batch(self, step: int) -> list[Prompt]:
        """The prompts of one step. Each source is read in its own order and goes on where the steps before it ended.

        There are exactly ``prompts`` of them, no row twice, and after any step each source has given its share of all
        rows to within one. A source with fewer rows than its part of a batch gives each of them equally often.
        """
        before, after = self._quotas.after(step * self.prompts), self._quotas.after((step + 1) * self.prompts)
        prompts = []
        for name, start, end, window in zip(self._names, before, after, self._windows, strict=True):
            source = self.sources[name]
            prompts += [source.row(self.seed, index, window=window) for index in range(start, end)]
        return prompts

    @cached_property
    def _names(self) -> list[str]:
        return [name for name, weight in self.weights.items() if weight]

    @cached_property
    def _quotas(self) -> Quotas:
        return Quotas([self.weights[name] for name in self._names])

    @cached_property
    def _windows(self) -> list[int]:
        return self._quotas.most(self.prompts)


def open_stream(data: Mapping[str, DataSettings], session: Encoder, *, seed: int, prompts: int) -> Stream:
    """The stream of these settings. ConfigError: a file is missing or cannot be read, or rows are bad."""
    sources = {name: open_source(name, settings, session) for name, settings in data.items() if settings.weight}
    return Stream(sources, {name: settings.weight for name, settings in data.items()}, seed, prompts)


def open_source(name: str, settings: DataSettings, session: Encoder, *, split: Split = "train") -> Source:
    if settings.kind == "tasks":
        return TaskSource(name, settings, session, split=split)
    if settings.kind == "environment":
        return EnvironmentSource(name)
    return FileSource(name, settings, session, split=split)
