"""Which turns of a conversation are trained, and the token sequences that train them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from stepjax.config import ModelConfig
from stepjax.errors import ConfigError
from stepjax.text.tokenizer import IM_END, Tokenizer
from stepjax.text.tool_calls import ToolSchemas
from stepjax.train.data.forms.content import RowContent
from stepjax.train.data.tasks import ChatMessage

TrainOn = Literal["last", "all", "marked"]


class Encoder(Protocol):
    """What turns conversations into tokens: a session, or its tokenizer and template alone."""

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def config(self) -> ModelConfig: ...

    def encode(self, text: str, *, bos: bool = True) -> list[int]: ...

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]: ...


@dataclass(frozen=True)
class TrainedSequence:
    """A prompt and the tokens after it, some of which are trained."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]  # after the prompt
    mask: tuple[bool, ...]  # of ``ids``: True where the token is trained


def trained_turns(content: RowContent, train_on: TrainOn) -> tuple[int, ...]:
    """Numbers of the messages that are trained; () if the row has no turn of the assistant to train.

    ValueError: the row's weights contradict ``train_on``, or leave nothing to train.
    """
    turns = [number for number, message in enumerate(content.messages) if message["role"] == "assistant"]
    weights = {number: content.weights[number] for number in turns}
    if train_on == "last":
        last = turns[-1] if content.ends_with_answer and turns else None
        marked = [number for number in turns if weights[number] == 1 and number != last]
        if marked:
            raise ValueError(
                f"messages[{marked[0]}] is marked as trained, but train_on = 'last' trains the last turn only; set "
                "train_on to 'marked' or 'all'"
            )
        chosen = () if last is None else (last,)
    elif train_on == "all":
        chosen = tuple(turns)
    else:
        chosen = tuple(number for number in turns if weights[number] == 1)
        if turns and not chosen:
            raise ValueError("no turn has weight 1, so train_on = 'marked' trains nothing of the row")
    kept = tuple(number for number in chosen if weights[number] != 0)
    if chosen and not kept:
        raise ValueError("the weights are 0, so nothing of the row is trained")
    return kept


def trained_sequences(
    encoder: Encoder, messages: Sequence[ChatMessage], turns: Sequence[int], *, tools: ToolSchemas | None
) -> list[TrainedSequence]:
    """The sequences that train some turns of a conversation, each exactly as the model would write it.

    A turn is learned from the prompt that inference would have shown before it. The chat template leaves the thinking
    of past turns out once the user has spoken again, so the prompt of a later turn need not begin with the turn before
    it as that was written. Where it does, as within a loop of tools, the turns share a sequence. Where it does not,
    the later turn begins a sequence of its own.

    Raises:
      ConfigError: the template renders a turn differently from the prompt that it follows.
    """
    sequences: list[TrainedSequence] = []
    for turn in turns:
        prompt, ids = turn_ids(encoder, messages[:turn], messages[turn], tools=tools)
        last = sequences[-1] if sequences else None
        written = () if last is None else last.prompt + last.ids
        if last is not None and prompt[: len(written)] == written:
            between = prompt[len(written) :]
            mask = (*last.mask, *[False] * len(between), *[True] * len(ids))
            sequences[-1] = TrainedSequence(last.prompt, (*last.ids, *between, *ids), mask)
        else:
            sequences.append(TrainedSequence(prompt, ids, (True,) * len(ids)))
    return sequences


def turn_ids(
    encoder: Encoder, messages: Sequence[ChatMessage], turn: ChatMessage, *, tools: ToolSchemas | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids of the prompt, and of the assistant's turn after it up to and including the token that ends it."""
    prompt = encoder.encode_chat(messages, tools=tools)
    whole = encoder.encode_chat([*messages, turn], tools=tools, add_generation_prompt=False)
    if whole[: len(prompt)] != prompt:
        raise ConfigError("chat template: renders a past turn differently from the prompt that it was generated from")
    assert encoder.tokenizer is not None
    end = encoder.tokenizer.id_of(IM_END)
    rest = whole[len(prompt) :]
    return tuple(prompt), tuple(rest[: len(rest) - rest[::-1].index(end)] if end in rest else rest)


def reply_ids(
    encoder: Encoder, messages: Sequence[ChatMessage], replies: Sequence[ChatMessage], *, tools: ToolSchemas | None
) -> tuple[int, ...]:
    """Ids between the assistant's turn that ends ``messages`` and the assistant's next turn.

    The template leaves out the reasoning of earlier turns once a user speaks again. In an episode the model goes on
    from what it wrote, reasoning included, so only what stands behind the turn is taken.

    Raises:
      ConfigError: the template renders fewer messages than there are.
    """
    assert encoder.tokenizer is not None
    end = encoder.tokenizer.id_of(IM_END)
    before = encoder.encode_chat(messages, tools=tools, add_generation_prompt=False)
    whole = encoder.encode_chat([*messages, *replies], tools=tools)
    after = len(before) - before[::-1].index(end)
    if whole[:after] == before[:after]:
        return tuple(whole[after:])
    ends = [position for position, token in enumerate(whole) if token == end]
    num_turns = before[:after].count(end)  # one end for each message, whatever is left out of it
    if len(ends) <= num_turns:
        raise ConfigError("chat template: a reply changes how many turns before it are rendered")
    return tuple(whole[ends[num_turns - 1] + 1 :])
