"""From rollouts to what the update takes: advantages, a teacher's scores, rows on the devices."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.infer.session import Session
from stepjax.model.step3p5 import Params
from stepjax.train.config.tune import TuneConfig
from stepjax.train.objectives.batch import Batch
from stepjax.train.objectives.objective import Objective
from stepjax.train.packing.rows import PackedRows
from stepjax.train.packing.sequences import PackedSequences, pack_sequences
from stepjax.train.rollouts.batch import cut_to_rows, make_batch, teacher_positions
from stepjax.train.rollouts.sampler import Rollout
from stepjax.train.teachers.resident import Resident, Teacher
from stepjax.train.teachers.stored import Stored

REMOTE_TOP = 20  # likeliest tokens to ask a server for
SPARE = 64  # tokens by which a teacher's rows grow where its prompts are longer


@dataclass
class Prepared:
    """Batches by teacher ("" where none is needed), and what they cost."""

    batches: dict[str, Batch]
    num_left_out: int = 0  # answers without room in a row
    scored_tokens: int = 0  # by teachers
    score_s: float = 0.0
    rollouts: list[Rollout] = field(default_factory=list)  # that are in the batches


class Scoring:
    """Prepares batches for one run."""

    def __init__(self, config: TuneConfig, session: Session, teachers: Mapping[str, Teacher]):
        self._config, self._session, self.teachers = config, session, teachers

    @property
    def residents(self) -> dict[str, Params]:
        """Parameters of the teachers in this process."""
        return {name: each.params for name, each in self.teachers.items() if isinstance(each, Resident)}

    def teacher_of(self, rollout: Rollout) -> str:
        """The name of a rollout's teacher; "" if the run has none."""
        if not self.teachers:
            return ""
        source = self._config.data.get(rollout.prompt.source)
        return (source.teacher if source else "") or next(iter(self.teachers))

    def prepare(self, rollouts: Sequence[Rollout], *, objective: Objective) -> Prepared:
        """Batches for an objective."""
        optim, loss = self._config.optim, self._config.loss
        kept, lost = cut_to_rows(rollouts, optim.length)
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
                prepared.scored_tokens += sum(len(each.ids) for each in chosen)
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
        top = self._config.teachers[name].top_k or (teacher.top_k if isinstance(teacher, Stored) else REMOTE_TOP)
        top = top if objective.reads_top_k else 0
        return self.place(make(scored=teacher.score(rollouts, top=top))[0])

    def _hidden(self, teacher: Resident, rollouts: list[Rollout], batch: Batch, packed: PackedSequences) -> jax.Array:
        """The teacher's hidden states where the student predicts: [M, R, T, D]."""
        if not teacher.system:
            return teacher.hidden(teacher.params, batch.rows)
        optim = self._config.optim
        prompts = [teacher.prompt_ids(each.prompt) for each in rollouts]
        longest = max(len(ids) + len(each.ids) for ids, each in zip(prompts, rollouts, strict=True))
        length = max(optim.length, -(-longest // SPARE) * SPARE)
        theirs = pack_sequences(prompts, [each.ids for each in rollouts], rows=optim.rows, length=length)
        places = teacher_positions(packed, theirs, rollouts, [len(ids) for ids in prompts])
        hidden = teacher.hidden(teacher.params, self._place_rows(theirs.rows))
        return _taken(hidden, self._placed(places))

    def place(self, batch: Batch) -> Batch:
        """A batch of numpy arrays on the devices."""
        return jax.tree.map(self._placed, batch)

    def _place_rows(self, rows: PackedRows) -> PackedRows:
        return jax.tree.map(self._placed, rows)

    def _placed(self, x: np.ndarray) -> jax.Array:
        """[M, R, T, …] by rows and tokens."""
        where = self._session.model.layout.sharding(x.shape, None, "batch", "length", *(None,) * (x.ndim - 3))
        if where is None:
            return jnp.asarray(x)
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])


@jax.jit
def _taken(hidden: jax.Array, places: jax.Array) -> jax.Array:
    return jnp.take(hidden.reshape(-1, hidden.shape[-1]), places, axis=0)
