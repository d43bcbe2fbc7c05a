"""Makes batches of rollouts for the update: advantages, scores of a teacher, packed rows on the devices."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.infer.session import Session
from stepjax.infer.steps.state import NO_EXPERT
from stepjax.model.step3p5 import Params
from stepjax.train.config.tune import TuneConfig
from stepjax.train.losses.logprobs import TopScores
from stepjax.train.objectives.objective import Batch, Objective
from stepjax.train.packing.rows import PackedRows, PackedSequences, pack_sequences
from stepjax.train.rollouts.sampler import Rollout
from stepjax.train.teachers.resident import Resident, Scored, Teacher
from stepjax.train.teachers.stored import Stored

REMOTE_TOP_K = 20  # likeliest tokens that a server is asked for
LENGTH_STEP = 64  # tokens; longer rows of a teacher are a multiple of it, for few compiled programs


@dataclass
class Prepared:
    """Batches by teacher ("" for none), and their cost."""

    batches: dict[str, Batch]
    num_left_out: int = 0  # answers that have no room in a row
    scored_tokens: int = 0  # tokens that teachers scored
    score_s: float = 0.0
    rollouts: list[Rollout] = field(default_factory=list)  # those in the batches


class Scoring:
    """Makes the batches of one run."""

    def __init__(self, config: TuneConfig, session: Session, teachers: Mapping[str, Teacher]):
        self._config, self._session, self.teachers = config, session, teachers

    @property
    def residents(self) -> dict[str, Params]:
        """Parameters of the teachers in this process."""
        return {name: teacher.params for name, teacher in self.teachers.items() if isinstance(teacher, Resident)}

    def teacher_of(self, rollout: Rollout) -> str:
        """The name of a rollout's teacher; "" if the run has none."""
        if not self.teachers:
            return ""
        source = self._config.data.get(rollout.prompt.source)
        return (source.teacher if source else "") or next(iter(self.teachers))

    def prepare(self, rollouts: Sequence[Rollout], *, objective: Objective) -> Prepared:
        """The batches of these rollouts for an objective. If it uses rewards, answers without one are left out."""
        optim, loss = self._config.optim, self._config.loss
        graded = [rollout for rollout in rollouts if not (objective.uses_rewards and rollout.failure)]
        kept, lost = cut_to_rows(graded, optim.length)
        prepared = Prepared({}, lost, rollouts=kept)
        rewards, groups = (np.asarray([getattr(rollout, name) for rollout in kept]) for name in ("reward", "group"))
        advantages = objective.advantages(rewards, groups, loss)
        scored = objective.scored(loss)
        names = [self.teacher_of(rollout) if scored else "" for rollout in kept]
        for name in sorted(set(names)) or [""]:
            indices = [index for index, teacher in enumerate(names) if teacher == name]
            chosen = [kept[index] for index in indices]
            began = time.perf_counter()
            batch = self._batch(chosen, advantages[indices], name, objective)
            if name:
                prepared.scored_tokens += sum(len(rollout.ids) for rollout in chosen)
                prepared.score_s += time.perf_counter() - began
            prepared.batches[name] = batch
        return prepared

    def _batch(self, rollouts: list[Rollout], advantages: np.ndarray, name: str, objective: Objective) -> Batch:
        optim = self._config.optim
        teacher = self.teachers[name] if name else None
        make = functools.partial(make_batch, rollouts, advantages, rows=optim.rows, length=optim.length)
        if teacher is None or isinstance(teacher, Resident):
            batch, packed = make()
            placed = self.place(batch)
            return (
                placed if teacher is None else placed._replace(hidden=self._hidden(teacher, rollouts, placed, packed))
            )
        top = self._config.teachers[name].top_k or (teacher.top_k if isinstance(teacher, Stored) else REMOTE_TOP_K)
        top = top if objective.reads_top_k else 0
        return self.place(make(scored=teacher.score(rollouts, top=top))[0])

    def _hidden(self, teacher: Resident, rollouts: list[Rollout], batch: Batch, packed: PackedSequences) -> jax.Array:
        """The teacher's hidden states where the student predicts: [M, R, T, D]."""
        if not teacher.system:
            return teacher.hidden(teacher.params, batch.rows)
        optim = self._config.optim
        prompts = [teacher.prompt_ids(rollout.prompt) for rollout in rollouts]
        longest = max(len(ids) + len(rollout.ids) for ids, rollout in zip(prompts, rollouts, strict=True))
        length = max(optim.length, -(-longest // LENGTH_STEP) * LENGTH_STEP)
        teacher_packed = pack_sequences(prompts, [r.ids for r in rollouts], rows=optim.rows, length=length)
        positions = teacher_positions(packed, teacher_packed, rollouts, [len(ids) for ids in prompts])
        hidden = teacher.hidden(teacher.params, self._place_rows(teacher_packed.rows))
        return _take(hidden, self._place_array(positions))

    def place(self, batch: Batch) -> Batch:
        """A batch of numpy arrays on the devices."""
        return jax.tree.map(self._place_array, batch)

    def _place_rows(self, rows: PackedRows) -> PackedRows:
        return jax.tree.map(self._place_array, rows)

    def _place_array(self, x: np.ndarray) -> jax.Array:
        """An array [M, R, T, …] on the devices, sharded by rows and tokens."""
        sharding = self._session.model.layout.sharding(x.shape, None, "batch", "length", *(None,) * (x.ndim - 3))
        if sharding is None:
            return jnp.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


@jax.jit
def _take(hidden: jax.Array, positions: jax.Array) -> jax.Array:
    return jnp.take(hidden.reshape(-1, hidden.shape[-1]), positions, axis=0)


def cut_to_rows(rollouts: Sequence[Rollout], length: int) -> tuple[list[Rollout], int]:
    """The rollouts cut to ``length`` tokens, and how many were left out because no token of an answer had room."""
    kept = []
    for rollout in rollouts:
        room = length - len(rollout.prompt.ids)
        if room < 1 or not any(rollout.answer_mask[:room]):
            continue
        if room < len(rollout.ids):
            rollout.ids, rollout.logprobs = rollout.ids[:room], rollout.logprobs[:room]
            rollout.answer_mask, rollout.truncated = rollout.answer_mask[:room], True
        kept.append(rollout)
    return kept, len(rollouts) - len(kept)


def make_batch(
    rollouts: Sequence[Rollout],
    advantages: np.ndarray,
    *,
    rows: int,
    length: int,
    scored: Sequence[Scored] | None = None,
) -> tuple[Batch, PackedSequences]:
    """The batch of rollouts that `cut_to_rows` returned.

    Args:
      advantages: of each rollout, float32 [N].
      scored: a teacher's scores of each rollout.
    """
    prompts, answers = [rollout.prompt.ids for rollout in rollouts], [rollout.ids for rollout in rollouts]
    packed = pack_sequences(prompts, answers, rows=rows, length=length)
    starts = [len(ids) for ids in prompts]

    def column(values: Sequence[Any], dtype: Any) -> np.ndarray:
        return packed.column([np.asarray(value, dtype) for value in values], starts, dtype)

    mask = column([rollout.answer_mask for rollout in rollouts], np.int32)
    batch = Batch(
        packed.rows._replace(loss_mask=mask),
        column([rollout.logprobs for rollout in rollouts], np.float32),
        column([np.full(len(ids), advantage) for ids, advantage in zip(answers, advantages, strict=True)], np.float32),
    )
    experts = [
        rollout.experts[: len(rollout.prompt.ids) + len(rollout.ids)]
        for rollout in rollouts
        if rollout.experts is not None
    ]
    if experts:
        assert len(experts) == len(rollouts), "the rollouts of a batch have one writer"
        batch = batch._replace(experts=packed.column(experts, [0] * len(experts), np.uint16, fill=NO_EXPERT))
    if scored:
        batch = batch._replace(teacher_logprob=column([scores.logprobs for scores in scored], np.float32))
    if scored and scored[0].top_ids is not None:
        top = TopScores(
            column([scores.top_ids for scores in scored], np.int32),
            column([scores.top_logprobs for scores in scored], np.float32),
        )
        batch = batch._replace(top=top)
    return batch, packed


def teacher_positions(
    student: PackedSequences, teacher: PackedSequences, rollouts: Sequence[Rollout], starts: Sequence[int]
) -> np.ndarray:
    """Indices into a teacher's rows, laid end to end, for each position of the student's rows.

    For a teacher whose prompts differ from the student's. Int32 [M, R, T]: set at the position before each token of an
    answer, 0 elsewhere.

    Args:
      starts: lengths of the teacher's prompts.
    """
    length = teacher.rows.ids.shape[2]
    values = []
    for (row, first), rollout, start in zip(teacher.places, rollouts, starts, strict=True):
        begin = row * length + first + start - 1
        values.append(np.arange(begin, begin + len(rollout.ids), dtype=np.int32))
    return student.column(values, [len(rollout.prompt.ids) - 1 for rollout in rollouts], np.int32)
