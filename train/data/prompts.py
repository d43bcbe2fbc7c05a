"""What a rollout begins with, and what of it the data has already written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stepjax.errors import ConfigError, StepjaxError
from stepjax.text.tool_calls import ToolSchemas
from stepjax.train.data.environment import ExactMatch
from stepjax.train.data.files.records import RowFault
from stepjax.train.data.forms.content import RowContent
from stepjax.train.data.survey import RowReader
from stepjax.train.data.tasks import ChatMessage
from stepjax.train.data.turns import Encoder, TrainedSequence, trained_sequences
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
    sequences: tuple[TrainedSequence, ...] = ()  # of the data, where they are not the completion after ``ids`` alone
    where: str = ""  # file and line, for errors
    part: int = 0  # of the row's sequences, the one that this is
    code: SourceCode | None = None  # rewards, environment and tools of the user

    @property
    def trained(self) -> tuple[TrainedSequence, ...]:
        """The sequences of the data that train a model; empty if the row has no answer."""
        if self.sequences or self.completion is None:
            return self.sequences
        return (TrainedSequence(self.ids, self.completion, (True,) * len(self.completion)),)


def read_prompt(
    name: str, index: int, row: Mapping[str, Any], encoder: Encoder, *, where: str, reader: RowReader
) -> Prompt:
    """A prompt from a row of a file; all its columns are kept. RowFault: the row is not acceptable."""
    try:
        _, content, turns = reader.read(row)
        ids, sequences = encoded(encoder, content, turns)
    except RowFault:
        raise
    except (ValueError, StepjaxError) as error:
        raise RowFault(where, str(error)) from None
    messages, tools, answer = content.question, content.tools, content.answer
    if answer is None and content.messages and content.ends_with_answer:
        answer = content.messages[-1]["content"]
    one = sequences[0] if len(sequences) == 1 and sequences[0].prompt == ids and all(sequences[0].mask) else None
    return Prompt(
        name,
        index,
        ids,
        None if one is None else one.ids,
        lambda: ExactMatch(messages, tools, answer),
        messages,
        tools,
        reader.kept(row),
        () if one else tuple(sequences),
        where,
    )


def encoded(
    encoder: Encoder, content: RowContent, turns: Sequence[int]
) -> tuple[tuple[int, ...], list[TrainedSequence]]:
    """Ids of the prompt of a new answer, and the sequences that train what the row has."""
    if content.messages:
        sequences = trained_sequences(encoder, content.messages, turns, tools=content.tools)
        if content.ends_with_answer and len(turns) == 1 and turns[0] == len(content.messages) - 1:
            return sequences[0].prompt, sequences
        return tuple(encoder.encode_chat(content.question, tools=content.tools)), sequences
    ids = tuple(encoder.encode(content.prompt))
    if content.completion is None:
        return ids, []
    written = (*encoder.encode(content.completion, bos=False), encoder.config.eos_ids[0])
    return ids, [TrainedSequence(ids, written, (True,) * len(written))]


def check_model(encoder: Encoder, name: str) -> None:
    """ConfigError: the model lacks what conversations need."""
    if encoder.tokenizer is None:
        raise ConfigError(f"{name}: has no tokenizer.json, which rows of text need")
