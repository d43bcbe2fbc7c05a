"""Who scores the student's tokens: models of this process, a server, or a file. One protocol, three ways to know."""

from __future__ import annotations

import functools
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
from stepjax.train.config.tune import TeacherSettings
from stepjax.train.data.sources import Prompt
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
    """A teacher that gives log-probabilities, wherever it runs."""

    def score(self, rollouts: Sequence[Rollout], *, top: int) -> list[Scored]:
        """Of every token behind the prompt, with the ``top`` likeliest at each place if any are asked for."""
        ...


@dataclass(frozen=True)
class Resident:
    """A teacher of this process. It gives hidden states; its logits are made where they are used."""

    session: Session
    params: Params
    system: str = ""  # what it sees and the student does not

    @functools.cached_property
    def hidden(self) -> Callable[[Params, PackedRows], jax.Array]:
        """``(params, rows [M, R, T]) → [M, R, T, D]``, a micro-batch after the other."""
        model = self.session.model

        def run(params: Params, rows: PackedRows) -> jax.Array:
            bound = bind(model, params)
            return jax.lax.map(lambda each: bound.forward(each.ids, packed_chunk(each)).hidden_BTD, rows)

        return jax.jit(run)

    def top(self, rows: PackedRows, *, k: int, num_tokens: int) -> TopScores:
        """The ``k`` likeliest tokens at each token's place, and the token itself last: numpy [M, R, T, k + 1]."""
        hidden = self.hidden(self.params, rows)
        ids = jnp.roll(jnp.asarray(rows.ids), -1, axis=2)
        found = self._top(self.params, hidden, ids, k, num_tokens)
        return TopScores(*(np.roll(np.asarray(x), 1, axis=2) for x in found))

    @functools.cached_property
    def _top(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        model = self.session.model

        def run(params: Params, hidden: jax.Array, label: jax.Array, k: int, num_tokens: int) -> Any:
            bound = bind(model, params)

            def row(each: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                state, label = each
                logs = jax.nn.log_softmax(mask_padding(bound.logits(state[None])[0], num_tokens))
                top, ids = jax.lax.top_k(logs, k)
                own = jnp.take_along_axis(logs, label[:, None], axis=-1)
                return jnp.concatenate([ids, label[:, None]], axis=-1), jnp.concatenate([top, own], axis=-1)

            flat = jax.lax.map(row, (hidden.reshape(-1, *hidden.shape[2:]), label.reshape(-1, label.shape[2])))
            return jax.tree.map(lambda x: x.reshape(*label.shape, k + 1), flat)

        return jax.jit(run, static_argnums=(3, 4))

    def score(self, rollouts: Sequence[Rollout], *, top: int, rows: int, length: int, num_tokens: int) -> list[Scored]:
        """As `Scorer.score`, in numpy, in batches of rows; `stepjax.train.teachers.scoring.cut_to_rows` comes first."""
        prompts = [self.prompt_ids(each.prompt) for each in rollouts]
        packed = pack_sequences(prompts, [each.ids for each in rollouts], rows=rows, length=length)
        found = self.top(packed.rows, k=top, num_tokens=num_tokens)
        ids, values = (x.reshape(-1, length, top + 1) for x in found)
        scored = []
        for (row, first), prompt, each in zip(packed.places, prompts, rollouts, strict=True):
            at = slice(first + len(prompt), first + len(prompt) + len(each.ids))
            scored.append(Scored(values[row, at, top], ids[row, at, :top], values[row, at, :top]))
        return scored

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt as this teacher sees it."""
        return prompt_with(self.session, prompt, self.system)


Teacher = Resident | Scorer


def prompt_with(session: Session, prompt: Prompt, system: str) -> tuple[int, ...]:
    """The prompt's ids with a system text in front of what it says already."""
    if not system:
        return prompt.ids
    if not prompt.messages:
        raise ConfigError(
            f"teachers: system needs chats, but row {prompt.index} of data.{prompt.source} is raw text; leave it out"
        )
    messages = [dict(each) for each in prompt.messages]
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
    """A teacher that shares the student's base, or a checkpoint of its own.

    Args:
      load: opens a checkpoint as the student's was opened.
      adapted: a session's parameters with the adapter of that name.

    Raises:
      TokenizerError: its tokenizer is not the student's.
    """
    session = student if settings.kind == "base" else load(settings.path)
    if session is not student:
        if student.tokenizer is None or session.tokenizer is None:
            raise ConfigError(f"teachers.{name}: student and teacher both need a tokenizer.json, to be compared")
        check_same_ids(student.tokenizer, session.tokenizer, who=f"teachers.{name} ({settings.path})")
    params = adapted(session, settings.adapter) if settings.adapter else session.params
    return Resident(session, params, settings.system)


def head_of(model: Step3p5, params: Params) -> Callable[[jax.Array], jax.Array]:
    """Hidden states → logits."""
    return bind(model, params).logits
