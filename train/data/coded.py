"""Sources whose prompts are answered and rewarded by code of the user."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from stepjax.errors import ConfigError
from stepjax.infer.session import Session
from stepjax.train.data.prompts import Prompt
from stepjax.train.data.sources import Source, Stream
from stepjax.train.data.words import Split
from stepjax.train.workers.code import CodeEpisode, SourceCode, UserCode


def with_code(stream: Stream, code: UserCode, session: Session) -> Stream:
    """The stream with the user's code of each source."""
    sources = {
        name: coded(name, source, code, session, split="train") if stream.weights[name] else source
        for name, source in stream.sources.items()
    }
    return replace(stream, sources=sources)


def coded(name: str, rows: Source, code: UserCode, session: Session, *, split: Split) -> Source:
    """The rows of a source with its code; the source itself if it has none."""
    source_code = code.of_source(name)
    return CodedSource(name, rows, source_code, session, split=split) if source_code else rows


class CodedSource:
    """The rows of another source, with the rewards, the environment or the tools of the user."""

    def __init__(self, name: str, rows: Source, code: SourceCode, session: Session, *, split: Split):
        self._name, self._rows, self._code, self._session, self._split = name, rows, code, session, split

    def row(self, seed: int, index: int, *, window: int = 1) -> Prompt:
        """
        Raises:
          ConfigError: the environment cannot be made, or the row has no messages to begin with.
        """
        return self.coded(self._rows.row(seed, index, window=window), seed, index)

    def coded(self, prompt: Prompt, seed: int, index: int) -> Prompt:
        """A prompt of the source with the code."""
        prompt = replace(prompt, code=self._code)
        if self._code.environment is None:
            return prompt
        values = {
            "row": dict(prompt.row),
            "index": prompt.index,
            "seed": int(np.random.default_rng([seed, index, 7]).integers(2**31)),
            "split": self._split,
        }
        return self._with_environment(prompt, values)

    def _with_environment(self, prompt: Prompt, values: dict[str, Any]) -> Prompt:
        """The prompt as the environment begins it."""
        what = f"data.{self._name}: row {prompt.index}"
        otherwise = prompt.new_environment
        first = self._code.open(values, otherwise=None)
        first.close()
        messages = list(prompt.messages) if first.messages is None else first.messages
        tools = first.tools or prompt.tools
        if not messages:
            raise ConfigError(
                f"{what} has no messages for an environment to answer; give the row messages in place of a raw prompt, "
                "or the environment an attribute messages"
            )
        if not (first.rewarded or self._code.rewards or prompt.row.get("answer") is not None or prompt.completion):
            raise ConfigError(
                f"{what}: nothing gives a reward; give the environment a method reward(), the source a setting reward, "
                "or the row an answer"
            )
        ids = tuple(self._session.encode_chat(messages, tools=tools))
        return replace(
            prompt,
            ids=ids,
            messages=messages,
            tools=tools,
            new_environment=self._opening(values, otherwise, first),
            completion=prompt.completion if first.messages is None else None,
            sequences=prompt.sequences if first.messages is None else (),
        )

    def _opening(self, values: dict[str, Any], otherwise: Callable, first: CodeEpisode) -> Callable[[], Any]:
        def new_environment() -> CodeEpisode:
            episode = self._code.open(values, otherwise=otherwise())
            if (episode.messages, episode.tools) != (first.messages, first.tools):
                raise ConfigError(
                    f"data.{self._name}.environment: two episodes of one row and seed begin with other messages or "
                    "tools, but all answers to a prompt must begin alike; draw random numbers from seed only"
                )
            return episode

        return new_environment
