"""Makes batches of rollouts for the update: advantages, scores of a teacher, packed rows on the devices."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.infer.session import Session, num_tokens_of
from stepjax.infer.steps.state import NO_EXPERT
from stepjax.model.step3p5 import Params, bind
from stepjax.stored_function import StoredFunction
from stepjax.train.config.tune import TuneConfig
from stepjax.train.data.prompts import Prompt
from stepjax.train.losses.logprobs import TopScores, token_scores
from stepjax.train.objectives.objective import Averaging, Batch, Objective
from stepjax.train.packing.rows import PackedRows, PackedSequences, pack_sequences, packed_chunk
from stepjax.train.rollouts.sampler import Rollout
from stepjax.train.teachers.resident import Resident, Scored, Teacher

LENGTH_STEP = 64  # tokens; longer rows of a teacher are a multiple of it, for few compiled programs
CHAT_TOKENS = 16  # that a template may put around a system text

T = TypeVar("T")


@dataclass
class Prepared:
    """Micro-batches by teacher ("" for none), and their cost."""

    batches: dict[str, list[Batch]]
    left_out: list[Rollout] = field(default_factory=list)  # answers that have no room in a row
    num_masked: int = 0  # answers that were cut off and are in no batch (loss.mask_truncated)
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
        """The batches of one update with these rollouts. If it uses rewards, answers without one are left out."""
        return self.prepare_parts(rollouts, objective=objective, parts=1, seed=())[0]

    def prepare_parts(
        self, rollouts: Sequence[Rollout], *, objective: Objective, parts: int, seed: Sequence[int]
    ) -> list[Prepared]:
        """The batches of several updates, each with a part of the answers. Advantages are those of whole groups.

        The first names the answers that have no room, and counts those that are masked.

        Args:
          parts: their number. With fewer answers there are fewer.
          seed: of the division into parts of almost equal size.
        """
        optim, loss = self._config.optim, self._config.loss
        graded = [rollout for rollout in rollouts if not (objective.uses_rewards and rollout.failure)]
        kept, _ = cut_to_rows(graded, optim.length)
        rewards, groups = (np.asarray([getattr(rollout, name) for rollout in kept]) for name in ("reward", "group"))
        advantages = objective.advantages(rewards, groups, loss)
        trained = np.isfinite(advantages)
        masked = trained & np.asarray([loss.mask_truncated and rollout.truncated for rollout in kept], bool)
        chosen = np.flatnonzero(trained & ~masked)
        if parts > 1:
            chosen = np.random.default_rng(list(seed)).permutation(chosen)
        prepared = [
            self._prepare([kept[i] for i in part], advantages[part], objective)
            for part in map(np.sort, np.array_split(chosen, max(1, min(parts, len(chosen)))))
        ]
        with_room = set(map(id, kept))
        prepared[0].left_out = [rollout for rollout in graded if id(rollout) not in with_room]
        prepared[0].num_masked = int(masked.sum())
        return prepared

    def _prepare(self, rollouts: list[Rollout], advantages: np.ndarray, objective: Objective) -> Prepared:
        """The batches of these rollouts."""
        prepared = Prepared({}, rollouts=rollouts)
        scored = objective.scored(self._config.loss)
        names = [self.teacher_of(rollout) if scored else "" for rollout in rollouts]
        weights = self._weights(rollouts, objective)
        for name in sorted(set(names)):
            indices = [index for index, teacher in enumerate(names) if teacher == name]
            chosen = [rollouts[index] for index in indices]
            began = time.perf_counter()
            given = None if weights is None else weights[indices]
            batches = self._batches(chosen, advantages[indices], given, name, objective)
            if name:
                prepared.scored_tokens += sum(len(rollout.ids) for rollout in chosen)
                prepared.score_s += time.perf_counter() - began
            prepared.batches[name] = batches
        return prepared

    def _weights(self, rollouts: Sequence[Rollout], objective: Objective) -> np.ndarray | None:
        """Factors of the answers' losses, as `answer_weights`."""
        averaging, longest = objective.averaging(self._config.loss), self._config.rollout.max_tokens
        return answer_weights([rollout.num_answer_tokens for rollout in rollouts], averaging, longest=longest)

    def _batches(
        self,
        rollouts: list[Rollout],
        advantages: np.ndarray,
        weights: np.ndarray | None,
        name: str,
        objective: Objective,
    ) -> list[Batch]:
        teacher, scored = self.teachers[name] if name else None, None
        if teacher is not None and not isinstance(teacher, Resident):
            scored = teacher.score(rollouts, top=self._top(name, objective))
        batch, packed = self._made(rollouts, advantages, weights, scored)
        placed = self.place(batch)
        if objective.uses_reference(self._config.loss):
            base = self._session.params
            placed = [micro._replace(reference_logprob=self._reference(base, micro.rows)) for micro in placed]
        if not isinstance(teacher, Resident):
            return placed
        hidden = self._hidden(teacher, rollouts, placed, packed)
        return [micro._replace(hidden=states) for micro, states in zip(placed, hidden, strict=True)]

    def _made(
        self,
        rollouts: Sequence[Rollout],
        advantages: np.ndarray,
        weights: np.ndarray | None,
        scored: Sequence[Scored] | None = None,
    ) -> tuple[Batch, PackedSequences]:
        optim, model = self._config.optim, self._session.config
        choices = (len(model.moe_layers), model.top_k) if self._config.rollout.replay else None
        return make_batch(
            rollouts,
            advantages,
            rows=optim.rows,
            length=optim.length,
            scored=scored,
            weights=weights,
            num_choices=choices,
        )

    @property
    def _reference(self) -> StoredFunction:
        """``(parameters of the base, rows [R, T]) → log-probability of each token [R, T]``, 0 of first tokens."""
        model, chunk, num_tokens = self._session.model, self._config.loss.chunk, num_tokens_of(self._session)

        def run(params: Params, rows: PackedRows) -> jax.Array:
            bound = bind(model, params)
            hidden = bound.forward(rows.ids, packed_chunk(rows)).hidden_BTD
            label = jnp.roll(rows.ids, -1, axis=1)
            scores = token_scores(hidden, label, bound.logits, num_tokens=num_tokens, chunk=chunk)
            logprobs = jnp.roll(scores.logprob, 1, axis=1).at[:, 0].set(0.0)
            return model.layout.constrain(logprobs, "batch", "length")

        return self._session.stored(f"log-probabilities of {num_tokens} tokens by {chunk}", run)

    def _top(self, name: str, objective: Objective) -> int:
        """Likeliest tokens that a server or a file is asked for."""
        if not objective.reads_top_k:
            return 0
        teacher = self.teachers[name]
        assert not isinstance(teacher, Resident)
        return self._config.teachers[name].top_k or teacher.top_k

    def shapes(self, prompt: Prompt, *, objective: Objective) -> dict[str, Batch]:
        """Shapes of a micro-batch of each teacher that may score answers, as `prepare` makes them.

        A teacher in this process that is on a mesh compiles its program here, which decides where its states lie.

        Args:
          prompt: any.
        """
        optim = self._config.optim
        rollout = Rollout(dataclasses.replace(prompt, ids=prompt.ids[:1]), 0, -1, [0], [True], [0.0])
        shapes = {}
        for name in self.teachers if objective.scored(self._config.loss) else ("",):
            teacher, scored = self.teachers.get(name), None
            if teacher is not None and not isinstance(teacher, Resident):
                top = self._top(name, objective)
                likeliest = (np.zeros((1, top), np.int32), np.zeros((1, top), np.float32)) if top else ()
                scored = [Scored(np.zeros((1,), np.float32), *likeliest)]
            batch, _ = self._made([rollout], np.zeros((1,), np.float32), self._weights([rollout], objective), scored)
            micro = jax.tree.map(lambda x: self._shape(x.shape[1:], x.dtype), batch)
            if objective.uses_reference(self._config.loss):
                micro = micro._replace(reference_logprob=micro.sampler)
            if isinstance(teacher, Resident):
                shape = (optim.rows, optim.length, teacher.session.config.hidden_size)
                states = self._shape(shape, teacher.session.dtype)
                if states.sharding is not None and not teacher.system:
                    states = _placed(states, teacher.hidden.compiled(teacher.params, micro.rows).output_shardings)
                micro = micro._replace(hidden=states)
            shapes[name] = micro
        return shapes

    def calls(self, shapes: Mapping[str, Batch]) -> list[tuple[StoredFunction, tuple[Any, ...]]]:
        """The programs of the teachers in this process with their arguments, so that they can be compiled ahead."""
        calls: list[tuple[StoredFunction, tuple[Any, ...]]] = []
        for name, micro in shapes.items():
            if micro.reference_logprob is not None:
                calls.append((self._reference, (self._session.params, micro.rows)))
            teacher = self.teachers.get(name)
            if isinstance(teacher, Resident):
                length = self._teacher_length(teacher) if teacher.system else self._config.optim.length
                rows = [self._shape((self._config.optim.rows, length), x.dtype) for x in micro.rows]
                calls.append((teacher.hidden, (teacher.params, PackedRows(*rows))))
        return calls

    def _shape(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding(shape))

    def _hidden(
        self, teacher: Resident, rollouts: list[Rollout], batches: list[Batch], packed: PackedSequences
    ) -> list[jax.Array]:
        """The teacher's hidden states where the student predicts, [R, T, D] for each micro-batch."""
        if not teacher.system:
            return [teacher.hidden(teacher.params, micro.rows) for micro in batches]
        prompts = [teacher.prompt_ids(rollout.prompt) for rollout in rollouts]
        answers = [rollout.ids for rollout in rollouts]
        longest = max(len(ids) + len(answer) for ids, answer in zip(prompts, answers, strict=True))
        length = max(self._teacher_length(teacher), -(-longest // LENGTH_STEP) * LENGTH_STEP)
        teacher_packed = pack_sequences(prompts, answers, rows=self._config.optim.rows, length=length)
        positions = teacher_positions(packed, teacher_packed, rollouts, [len(ids) for ids in prompts])
        rows = [jax.tree.map(self._place_array, rows) for rows in _split(teacher_packed.rows)]
        return self._moved([teacher.hidden(teacher.params, micro) for micro in rows], positions)

    def _teacher_length(self, teacher: Resident) -> int:
        """Tokens of a row of a teacher with a system text: enough for the longest row of the student."""
        assert self._session.tokenizer is not None
        text = len(self._session.tokenizer.encode(teacher.system)) + CHAT_TOKENS
        return -(-(self._config.optim.length + text) // LENGTH_STEP) * LENGTH_STEP

    def _moved(self, hidden: list[jax.Array], positions: np.ndarray) -> list[jax.Array]:
        """Hidden states from the places of the teacher's rows to those of the student's.

        Both are packed in the same order, so that a micro-batch of the student meets few of the teacher.

        Args:
          hidden: of each micro-batch of the teacher.
          positions: as `teacher_positions` gives them.
        """
        size = int(np.prod(hidden[0].shape[:2]))
        moved = []
        for micro in positions:
            shape = (*micro.shape, hidden[0].shape[2])
            states = jnp.zeros(shape, hidden[0].dtype, device=self.sharding(shape))
            for number in np.unique(micro[micro >= 0] // size):
                inside = np.where(micro // size == number, micro - number * size, -1).astype(np.int32)
                states = self._move(states, hidden[number], self._place_array(inside))
            moved.append(states)
        return moved

    @functools.cached_property
    def _move(self) -> StoredFunction:
        """``(states [R, T, D], a teacher's [R, T', D], positions [R, T]) → states``; position −1 leaves a state."""

        def move(states: jax.Array, hidden: jax.Array, positions: jax.Array) -> jax.Array:
            taken = jnp.take(hidden.reshape(-1, hidden.shape[-1]), jnp.maximum(positions, 0), axis=0)
            moved = jnp.where(positions[..., None] >= 0, taken, states)
            return self._session.model.layout.constrain(moved, "batch", "length", None)

        return self._session.stored("move", move, donate_argnums=(0,))

    def place(self, batch: Batch) -> list[Batch]:
        """The micro-batches of a batch of numpy arrays, on the devices."""
        return [jax.tree.map(self._place_array, micro) for micro in _split(batch)]

    def _place_array(self, x: np.ndarray) -> jax.Array:
        """An array [R, T, …] on the devices, sharded by rows and tokens."""
        sharding = self.sharding(x.shape)
        if sharding is None:
            return jnp.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    def sharding(self, shape: tuple[int, ...]) -> Any:
        """Where an array [R, T, …] lies; None on one device."""
        return self._session.model.layout.sharding(shape, "batch", "length", *(None,) * (len(shape) - 2))


def answer_weights(counts: Sequence[int], averaging: Averaging, *, longest: int) -> np.ndarray | None:
    """Factors of the losses of N answers, float32 [N]. The update divides by T, the number of tokens of all answers.

    "tokens", the mean over all tokens: 1 (returned as None). "answers", the mean over answers of their means over n
    tokens: T / (N·n). "constant", the mean over answers of their sums divided by ``longest``: T / (N·longest).
    """
    if averaging == "tokens" or not counts:
        return None
    lengths = np.asarray(counts, np.float64) if averaging == "answers" else np.full(len(counts), longest)
    return (sum(counts) / (len(counts) * lengths)).astype(np.float32)


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
    weights: np.ndarray | None = None,
    num_choices: tuple[int, int] | None = None,
) -> tuple[Batch, PackedSequences]:
    """The batch of rollouts that `cut_to_rows` returned.

    Args:
      advantages: of each rollout, float32 [N].
      scored: a teacher's scores of each rollout.
      weights: factors of the rollouts' losses, float32 [N]; None: 1.
      num_choices: MoE layers and experts of a token, for a batch that has experts even if nobody recorded them.
    """
    prompts, answers = [rollout.prompt.ids for rollout in rollouts], [rollout.ids for rollout in rollouts]
    packed = pack_sequences(prompts, answers, rows=rows, length=length)
    starts = [len(ids) for ids in prompts]

    def column(values: Sequence[Any], dtype: Any) -> np.ndarray:
        return packed.column([np.asarray(value, dtype) for value in values], starts, dtype)

    def spread(values: np.ndarray) -> np.ndarray:
        """A column with one value for all tokens of a rollout."""
        return column([np.full(len(ids), value) for ids, value in zip(answers, values, strict=True)], np.float32)

    mask = column([rollout.answer_mask for rollout in rollouts], np.int32)
    batch = Batch(
        packed.rows._replace(loss_mask=mask),
        column([rollout.logprobs for rollout in rollouts], np.float32),
        spread(advantages),
    )
    if weights is not None:
        batch = batch._replace(weight=spread(weights))
    experts = [
        rollout.experts[: len(rollout.prompt.ids) + len(rollout.ids)]
        for rollout in rollouts
        if rollout.experts is not None
    ]
    if experts:
        assert len(experts) == len(rollouts), "the rollouts of a batch have one writer"
        batch = batch._replace(experts=packed.column(experts, [0] * len(experts), np.uint16, fill=NO_EXPERT))
    elif num_choices:
        batch = batch._replace(experts=np.full((*mask.shape, *num_choices), NO_EXPERT, np.uint16))
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
    answer, −1 elsewhere.

    Args:
      starts: lengths of the teacher's prompts.
    """
    length = teacher.rows.ids.shape[2]
    values = []
    for (row, first), rollout, start in zip(teacher.places, rollouts, starts, strict=True):
        begin = row * length + first + start - 1
        values.append(np.arange(begin, begin + len(rollout.ids), dtype=np.int32))
    return student.column(values, [len(rollout.prompt.ids) - 1 for rollout in rollouts], np.int32, fill=-1)


def _placed(shape: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _split(batch: T) -> list[T]:
    """The micro-batches of arrays [M, …]."""
    return [jax.tree.map(lambda x, i=index: x[i], batch) for index in range(len(jax.tree.leaves(batch)[0]))]
