"""Teachers: the interface of all, and a teacher whose model is in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.errors import ConfigError
from stepjax.infer.sampling.sampler import mask_padding
from stepjax.infer.session import Session
from stepjax.model.step3p5 import Params, Step3p5, bind
from stepjax.stored_function import StoredFunction
from stepjax.train.config.tune import TeacherSettings
from stepjax.train.data.prompts import Prompt
from stepjax.train.losses.logprobs import TopScores
from stepjax.train.packing.rows import PackedRows, pack_sequences, packed_chunk
from stepjax.train.rollouts.sampler import Rollout
from stepjax.train.teachers.same_ids import check_same_ids


@dataclass(frozen=True)
class Scored:
    """A teacher's log-probabilities of the tokens of one rollout, in their order."""

    logprobs: np.ndarray  # float32 [n]
    top_ids: np.ndarray | None = None  # int32 [n, K]
    top_logprobs: np.ndarray | None = None  # float32 [n, K]


class Scorer(Protocol):
    """A teacher that gives log-probabilities: a server or a file."""

    @property
    def top_k(self) -> int:
        """Likeliest tokens that it gives where the settings do not say how many."""
        ...

    def score(self, rollouts: Sequence[Rollout], *, top: int) -> list[Scored]:
        """Scores of each token after the prompt, and of the ``top`` likeliest tokens in its place (0: none)."""
        ...


@dataclass(eq=False)
class Resident:
    """A teacher in this process. It gives hidden states; the loss computes its logits from them.

    The parameters of a moving average of the student are replaced at each step.
    """

    session: Session
    params: Params
    system: str = ""  # a system text that the student does not see

    @property
    def hidden(self) -> StoredFunction:
        """``(params, rows [R, T]) → [R, T, D]``."""
        model = self.session.model

        def run(params: Params, rows: PackedRows) -> jax.Array:
            return bind(model, params).forward(rows.ids, packed_chunk(rows)).hidden_BTD

        return self.session.stored("hidden states", run)

    def top(self, rows: PackedRows, *, k: int, num_tokens: int) -> TopScores:
        """The ``k`` likeliest tokens in place of each token, and then the token itself: numpy [R, T, k + 1].

        Args:
          rows: numpy [R, T].
        """
        hidden = self.hidden(self.params, rows)
        scores = self._top(k, num_tokens)(self.params, hidden, np.roll(rows.ids, -1, axis=1))
        return TopScores(*(np.roll(np.asarray(x), 1, axis=1) for x in scores))

    def _top(self, k: int, num_tokens: int) -> StoredFunction:
        """``(params, hidden states [R, T, D], labels [R, T]) → ids and log-probabilities [R, T, k + 1]``."""
        model = self.session.model

        def run(params: Params, hidden: jax.Array, label: jax.Array) -> Any:
            bound = bind(model, params)

            def row(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                hidden, label = inputs
                logprobs = jax.nn.log_softmax(mask_padding(bound.logits(hidden[None])[0], num_tokens))
                top, ids = jax.lax.top_k(logprobs, k)
                label_logprob = jnp.take_along_axis(logprobs, label[:, None], axis=-1)
                return jnp.concatenate([ids, label[:, None]], axis=-1), jnp.concatenate([top, label_logprob], axis=-1)

            return jax.lax.map(row, (hidden, label))

        return self.session.stored(f"{k} likeliest of {num_tokens} tokens", run)

    def score(self, rollouts: Sequence[Rollout], *, top: int, rows: int, length: int, num_tokens: int) -> list[Scored]:
        """As `Scorer.score`, for rollouts that `stepjax.train.teachers.scoring.cut_to_rows` returned.

        Args:
          rows: of a micro-batch.
          length: tokens of a row.
          num_tokens: entries of the tokenizer.
        """
        prompts = [self.prompt_ids(rollout.prompt) for rollout in rollouts]
        packed = pack_sequences(prompts, [rollout.ids for rollout in rollouts], rows=rows, length=length)
        micros = [jax.tree.map(lambda x, i=index: x[i], packed.rows) for index in range(len(packed.rows.ids))]
        scores = [self.top(micro, k=top, num_tokens=num_tokens) for micro in micros]
        ids, values = (np.concatenate(parts) for parts in zip(*scores, strict=True))
        scored = []
        for (row, first), prompt, rollout in zip(packed.places, prompts, rollouts, strict=True):
            start = first + len(prompt)
            answer = slice(start, start + len(rollout.ids))
            scored.append(Scored(values[row, answer, top], ids[row, answer, :top], values[row, answer, :top]))
        return scored

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt as this teacher sees it."""
        return prompt_with(self.session, prompt, self.system)


Teacher = Resident | Scorer


def prompt_with(session: Session, prompt: Prompt, system: str) -> tuple[int, ...]:
    """The ids of the prompt with a system text before its own."""
    if not system:
        return prompt.ids
    if not prompt.messages:
        raise ConfigError(
            f"teachers: system needs chats, but row {prompt.index} of data.{prompt.source} is raw text; omit system"
        )
    messages = [dict(message) for message in prompt.messages]
    if messages[0]["role"] == "system":
        messages[0]["content"] = f"{system}\n\n{messages[0]['content']}"
    else:
        messages.insert(0, {"role": "system", "content": system})
    return tuple(session.encode_chat(messages, tools=prompt.tools))


def resident(
    settings: TeacherSettings,
    student: Session,
    *,
    load: Callable[[str], Session],
    adapted: Callable[[Session, str], Params],
    name: str,
) -> Resident:
    """A teacher in this process, with the student's base or a checkpoint of its own.

    Args:
      load: opens a checkpoint with the settings of the student's.
      adapted: returns a session's parameters with the adapter at a path.

    Raises:
      TokenizerError: its tokenizer is not the student's.
    """
    session = student if settings.kind == "base" else load(settings.path)
    if session is not student:
        if student.tokenizer is None or session.tokenizer is None:
            raise ConfigError(f"teachers.{name}: student and teacher both need a tokenizer.json for comparison")
        check_same_ids(student.tokenizer, session.tokenizer, who=f"teachers.{name} ({settings.path})")
    params = adapted(session, settings.adapter) if settings.adapter else session.params
    return Resident(session, params, settings.system)


def head_of(model: Step3p5, params: Params) -> Callable[[jax.Array], jax.Array]:
    """The function from hidden states to logits."""
    return bind(model, params).logits
