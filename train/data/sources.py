"""Prompts and completions of each step. A batch depends on seed and step only, so a step number is enough to resume."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stepjax.errors import ConfigError
from stepjax.infer.session import Session
from stepjax.text.tokenizer import IM_END
from stepjax.text.tool_calls import ToolSchemas
from stepjax.train.config.tune import DataSettings
from stepjax.train.data import tasks
from stepjax.train.data.environment import ExactMatch, environment
from stepjax.train.data.tasks import ChatMessage
from stepjax.train.data.words import Split
from stepjax.train.environments.episode import Environment
from stepjax.train.workers.code import CodeEpisode, SourceCode


@dataclass(frozen=True)
class Prompt:
    """What a rollout begins with."""

    source: str  # name of its data source
    index: int  # of the row in its source
    ids: tuple[int, ...]
    completion: tuple[int, ...] | None  # of the data, up to and including the token that ends the turn
    new_environment: Callable[[], Environment | CodeEpisode]  # begins an episode
    messages: Sequence[ChatMessage]  # empty for raw text
    tools: ToolSchemas | None = None
    row: Mapping[str, Any] = field(default_factory=dict)  # the row of the file, with columns that only rewards read
    code: SourceCode | None = None  # rewards, environment and tools of the user


class Source(Protocol):
    """Rows by index, without end."""

    def row(self, seed: int, index: int) -> Prompt: ...


class TaskSource:
    """Generated items. Row i depends on seed and i only."""

    def __init__(self, name: str, settings: DataSettings, session: Session, *, split: Split = "train"):
        self._name, self._settings, self._session = name, settings, session
        self._split: Split = split

    def row(self, seed: int, index: int) -> Prompt:
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

    def row(self, seed: int, index: int) -> Prompt:
        return Prompt(self._name, index, (), None, lambda: ExactMatch(()), ())


class JsonLinesSource:
    """A file of one JSON object a line, in a new order each epoch. Lines are read by offset, so the file stays on disk.

    A row has ``messages`` in OpenAI form and optionally ``tools``, or ``prompt`` and optionally ``completion`` as raw
    text. If the last message is the assistant's, it is the completion. ``answer`` is the text that exact match and
    rewards compare with.
    """

    def __init__(self, name: str, path: Path, session: Session):
        self._name, self._path, self._session = name, path, session
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
        self._offsets = self._line_starts()
        if not len(self._offsets):
            raise ConfigError(f"{path}: holds no rows, expected one JSON object a line")

    def __len__(self) -> int:
        return len(self._offsets)

    def row(self, seed: int, index: int) -> Prompt:
        epoch, position = divmod(index, len(self))
        order = np.random.default_rng([seed, epoch, 2]).permutation(len(self)) if len(self) > 1 else np.zeros(1, int)
        return self.line(int(order[position]))

    def line(self, number: int) -> Prompt:
        """The row of a line, counted from 0 and without empty lines."""
        where = f"{self._path}:{number + 1}"
        begin, end = self._offsets[number]
        try:
            row = json.loads(self._map[begin:end])
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: not readable as JSON ({error})") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: holds a JSON {type(row).__name__}, expected an object")
        return read_row(self._name, number, row, self._session, where=where)

    def _line_starts(self) -> np.ndarray:
        """Begin and end of each line that is not empty: int64 [N, 2]."""
        raw = np.frombuffer(self._map, np.uint8)
        ends = np.flatnonzero(raw == ord("\n")).astype(np.int64)
        ends = np.concatenate([ends, [len(raw)]]) if len(raw) and (not len(ends) or ends[-1] + 1 < len(raw)) else ends
        starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
        pairs = np.stack([starts, ends], axis=1) if len(ends) else np.zeros((0, 2), np.int64)
        return pairs[pairs[:, 1] > pairs[:, 0]]


class ArrayRecordSource:
    """Rows as in `JsonLinesSource`, in ArrayRecord files that grain reads, for a corpus of several files."""

    def __init__(self, name: str, pattern: str, session: Session):
        try:
            import grain
        except ImportError:
            raise ConfigError(
                f"data.{name}: array_record needs grain; install the extra as pip install 'stepjax[grain]'"
            ) from None
        root = Path(pattern)
        files = sorted(str(path) for path in root.parent.glob(root.name))
        if not files:
            raise ConfigError(f"{pattern}: no such files")
        self._grain, self._name, self._session, self._pattern = grain, name, session, pattern
        self._rows: Any = grain.sources.ArrayRecordDataSource(files)
        self._shuffled: dict[int, Any] = {}

    def row(self, seed: int, index: int) -> Prompt:
        if seed not in self._shuffled:
            order = self._grain.MapDataset.range(len(self._rows)).seed(seed).shuffle().repeat()
            self._shuffled[seed] = order
        number = int(self._shuffled[seed][index])
        where = f"{self._pattern}, record {number}"
        try:
            row = json.loads(self._rows[number])
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: not readable as JSON ({error})") from None
        return read_row(self._name, number, row, self._session, where=where)


@dataclass(frozen=True)
class Stream:
    """Prompts of each step, from several sources in proportion to their weights."""

    sources: Mapping[str, Source]
    weights: Mapping[str, float]
    seed: int
    prompts: int  # of a step

    def batch(self, step: int) -> list[Prompt]:
        """The prompts of one step. Each source is read in its own order and goes on where the steps before it ended."""
        names = [name for name, weight in self.weights.items() if weight]
        if len(names) == 1:
            first = step * self.prompts
            return [self.sources[names[0]].row(self.seed, first + i) for i in range(self.prompts)]
        shares = np.asarray([self.weights[name] for name in names])
        drawn = self._quotas(shares / shares.sum(), step + 1) - self._quotas(shares / shares.sum(), step)
        before = self._quotas(shares / shares.sum(), step)
        prompts = []
        for name, start, count in zip(names, before, drawn, strict=True):
            prompts += [self.sources[name].row(self.seed, int(start + i)) for i in range(count)]
        return prompts

    def _quotas(self, shares: np.ndarray, steps: int) -> np.ndarray:
        """Rows of each source in the first ``steps`` steps. They add up, and each is within one row of its share."""
        ends = np.floor(np.cumsum(shares) * steps * self.prompts + 1e-6).astype(np.int64)
        ends[-1] = steps * self.prompts
        return np.diff(ends, prepend=0)


def open_stream(data: Mapping[str, DataSettings], session: Session, *, seed: int, prompts: int) -> Stream:
    """The stream of these settings. ConfigError: a file is missing or cannot be read."""
    sources = {name: open_source(name, settings, session) for name, settings in data.items()}
    return Stream(sources, {name: settings.weight for name, settings in data.items()}, seed, prompts)


def open_source(name: str, settings: DataSettings, session: Session, *, split: Split = "train") -> Source:
    if settings.kind == "tasks":
        return TaskSource(name, settings, session, split=split)
    if settings.kind == "environment":
        return EnvironmentSource(name)
    if settings.kind == "jsonl":
        return JsonLinesSource(name, Path(settings.path), session)
    return ArrayRecordSource(name, settings.path, session)


def read_row(name: str, index: int, row: Mapping[str, Any], session: Session, *, where: str) -> Prompt:
    """A prompt from a row of a file; other columns are kept. ConfigError: a column is missing or of another type."""
    if ("messages" in row) == ("prompt" in row):
        keys = ", ".join(map(repr, sorted(row)))
        raise ConfigError(f"{where}: has {keys}; expected messages (and tools) or prompt (and completion), and answer")
    answer = row.get("answer")
    for column in ("prompt", "completion", "answer"):
        if not isinstance(row.get(column, ""), str):
            raise ConfigError(f"{where}: {column} is {row[column]!r}, expected text")
    if "prompt" in row:
        ids = tuple(session.encode(row["prompt"]))
        text = row.get("completion")
        eos = session.config.eos_ids[0]
        completion = None if text is None else (*session.encode(text)[1:], eos)
        return Prompt(name, index, ids, completion, lambda: ExactMatch((), None, answer), (), row=row)
    messages, tools = list(row["messages"]), row.get("tools")
    completion = None
    if messages and messages[-1].get("role") == "assistant":
        *messages, target = messages
        ids, completion = turn_ids(session, messages, target, tools=tools)
        answer = target.get("content") if answer is None else answer
    else:
        ids = tuple(session.encode_chat(messages, tools=tools))
    return Prompt(name, index, ids, completion, lambda: ExactMatch(messages, tools, answer), messages, tools, row)


def turn_ids(
    session: Session, messages: Sequence[ChatMessage], turn: ChatMessage, *, tools: ToolSchemas | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids of the prompt, and of the assistant's turn after it up to and including the token that ends it."""
    prompt = session.encode_chat(messages, tools=tools)
    whole = session.encode_chat([*messages, turn], tools=tools, add_generation_prompt=False)
    if whole[: len(prompt)] != prompt:
        raise ConfigError("chat template: renders a past turn differently from the prompt that it was generated from")
    assert session.tokenizer is not None
    end = session.tokenizer.id_of(IM_END)
    rest = whole[len(prompt) :]
    return tuple(prompt), tuple(rest[: len(rest) - rest[::-1].index(end)] if end in rest else rest)


def reply_ids(
    session: Session, messages: Sequence[ChatMessage], replies: Sequence[ChatMessage], *, tools: ToolSchemas | None
) -> tuple[int, ...]:
    """Ids between the assistant's turn that ends ``messages`` and the assistant's next turn.

    The template leaves out the reasoning of earlier turns once a user speaks again. In an episode the model goes on
    from what it wrote, reasoning included, so only what stands behind the turn is taken.

    Raises:
      ConfigError: the template renders fewer messages than there are.
    """
    assert session.tokenizer is not None
    end = session.tokenizer.id_of(IM_END)
    before = session.encode_chat(messages, tools=tools, add_generation_prompt=False)
    whole = session.encode_chat([*messages, *replies], tools=tools)
    after = len(before) - before[::-1].index(end)
    if whole[:after] == before[:after]:
        return tuple(whole[after:])
    ends = [position for position, token in enumerate(whole) if token == end]
    num_turns = before[:after].count(end)  # one end for each message, whatever is left out of it
    if len(ends) <= num_turns:
        raise ConfigError("chat template: a reply changes how many turns before it are rendered")
    return tuple(whole[ends[num_turns - 1] + 1 :])
