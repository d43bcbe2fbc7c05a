"""The compiled update of fine-tuning: gradients of the trained leaves over all micro-batches, then a step of AdamW.

The host launches one program for each micro-batch, so that no program depends on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stepjax.model.step3p5 import Params
from stepjax.program_cache import ProgramCache
from stepjax.stored_function import StoredFunction
from stepjax.train.objectives.objective import Agreement, Batch, LossFunction, Sums
from stepjax.train.runs.optimizer import apply, update_count

# Each layer's loop over blocks of queries starts from zeros. With this pass, XLA's GPU compiler makes the zeros of all
# layers in one kernel before the first layer and keeps them: 11 GiB for four rows of 1,024 tokens on eight GPUs. The
# CPU compiler has no such pass.
COMPILER_OPTIONS = {"xla_disable_hlo_passes": "copy_fusion"}

Leaves = dict[str, jax.Array]  # trained, float32 by path
Assemble = Callable[[Params, Leaves], Params]  # base and trained leaves → the model's parameters
Batches = Mapping[str, Sequence[Batch]]  # micro-batches by teacher, "" for none


class TuneState(NamedTuple):
    """What a run carries from step to step. Prompts and random keys depend on its seed and ``step`` only."""

    leaves: Leaves
    optimizer: optax.OptState
    step: jax.Array  # int32: number of updates, skipped ones included
    skipped: jax.Array  # int32 [2]: batches without a finite gradient or a token: of the run, and the latest in a row
    previous: Leaves  # before the last update, with rollout.ahead; else empty
    averages: dict[str, Leaves]  # moving averages of the leaves, by the name of the teacher of kind "average"


@dataclass(frozen=True)
class Dropout:
    """Dropout of an adapter's inputs: columns of A are 0 with probability ``rate``, the others divided by 1 − rate.

    One feature of the input is multiplied with one column of A, so this is dropout of the input, as in PEFT, with one
    mask for all tokens of a micro-batch and another for each weight (the mask of A in LoRA Dropout, arXiv 2404.09610).
    The masks follow from the seed, the step and the micro-batch, on any mesh.
    """

    rate: float
    seed: int

    def masked(self, leaves: Leaves, key: Any) -> Leaves:
        """The leaves with masks of a key of `key_of`. Those that are no A are as they were."""
        dropped, key = dict(leaves), jax.random.wrap_key_data(key)
        for number, name in enumerate(sorted(leaves)):
            if name.endswith(".a"):
                shape = (*leaves[name].shape[:-2], 1, leaves[name].shape[-1])
                kept = jax.random.bernoulli(jax.random.fold_in(key, number), 1 - self.rate, shape)
                dropped[name] = jnp.where(kept, leaves[name] / (1 - self.rate), 0.0)
        return dropped

    def key_of(self, state: TuneState, micro: int) -> np.ndarray:
        """The key of a micro-batch of the next update, uint32 [2]. The updates of one step have other keys too."""
        key = jax.random.key(self.seed)
        for number in (int(state.step), int(update_count(state.optimizer)), micro):
            key = jax.random.fold_in(key, number)
        return np.asarray(jax.random.key_data(key))


class Applied(NamedTuple):
    """What the last program of an update measured."""

    gradient_norm: jax.Array
    skipped: jax.Array  # bool
    num_skipped: jax.Array  # int32 [2], as `TuneState.skipped`


class UpdateReport(NamedTuple):
    """What one step measured, with the parameters before its update. All numpy."""

    sums: Sums
    gradient_norm: np.ndarray
    skipped: np.ndarray  # bool
    num_skipped: np.ndarray  # int32 [2], as `TuneState.skipped`


class LossProgram(NamedTuple):
    """A loss, and what its programs are called in the cache."""

    function: LossFunction
    identity: str  # of objective, settings and student: all that the function closes over
    teachers: Mapping[str, str]  # identity of each teacher in this process; equal ones share a program
    cache: ProgramCache | None = None  # executables of earlier runs
    shardings: tuple[Any, Any] | None = None  # of the state, and of what every device has; None on one device

    def by_teacher(self, name: str, make: Callable[[str], Callable[..., Any]], **options: Any) -> dict[str, Any]:
        """A program for each teacher in this process, and one ("") for batches without.

        Args:
          name: of the programs.
          make: returns the function for the teacher of a name.
        """

        def stored(teacher: str) -> StoredFunction:
            identity = f"{self.identity}\0{self.teachers.get(teacher, 'no teacher')}"
            return StoredFunction(
                name, make(teacher), identity=identity, cache=self.cache, types=(Sums, Agreement), **options
            )

        shared = {identity: stored(teacher) for teacher, identity in self.teachers.items()}
        return {"": stored(""), **{teacher: shared[identity] for teacher, identity in self.teachers.items()}}


class TuneUpdate:
    """``(state, base, teachers, batches) → (state, report)``, compiled once however many micro-batches there are."""

    def __init__(
        self,
        loss: LossProgram,
        optimizer: optax.GradientTransformation,
        assemble: Assemble,
        *,
        identity: str,
        keep_previous: bool,
        decays: Mapping[str, float] | None = None,
        dropout: Dropout | None = None,
    ):
        """
        Args:
          identity: of the optimiser's settings and of ``decays``.
          keep_previous: keep the leaves before the update in the state too.
          decays: of the moving averages in the state, by name.
          dropout: of an adapter; None: none.
        """
        self.loss = loss
        self._dropout = dropout
        state, replicated = loss.shardings or (None, None)
        leaves = None if state is None else state.leaves

        def stored(name: str, function: Callable[..., Any], out: Any, **options: Any) -> StoredFunction:
            options["out_shardings"] = None if loss.shardings is None else out
            return StoredFunction(name, function, identity=identity, cache=loss.cache, types=(Applied,), **options)

        self._zeros = stored("zeros", _zeros, leaves)
        self._count = stored("count", _count, replicated)
        self.gradients = loss.by_teacher(
            "gradients",
            lambda teacher: accumulation(loss.function, assemble, teacher, dropout=dropout),
            donate_argnums=(0,),
            compiler_options=COMPILER_OPTIONS,
            out_shardings=None if loss.shardings is None else (leaves, replicated),
        )
        self._apply = stored(
            "apply",
            application(optimizer, keep_previous=keep_previous, decays=decays or {}),
            (state, replicated),
            donate_argnums=(1,),
        )

    def __call__(
        self, state: TuneState, base: Params, teachers: Mapping[str, Params], batches: Batches
    ) -> tuple[TuneState, UpdateReport]:
        """Only teachers in this process have parameters in ``teachers``. Without a token the update is skipped."""
        micros = list(_micro_batches(batches))
        total = np.float32(max(1.0, sum(float(self._count(micro.rows.loss_mask)) for _, micro in micros)))
        gradients, parts = self._zeros(state.leaves), []
        for number, (name, micro) in enumerate(micros):
            run = self.gradients.get(name, self.gradients[""])
            key = self._dropout.key_of(state, number) if self._dropout else None
            gradients, sums = run(gradients, state.leaves, base, micro, total, teachers.get(name), key)
            parts.append(sums)
        sums = added_up(parts)
        usable = np.isfinite(sums.loss) & (sums.tokens > 0)
        state, applied = self._apply(state, gradients, np.asarray(usable))
        return state, UpdateReport(sums, *(np.asarray(value) for value in applied))

    def calls(
        self, state: TuneState, base: Params, teachers: Mapping[str, Params], micros: Mapping[str, Batch]
    ) -> list[tuple[StoredFunction, tuple[Any, ...]]]:
        """The programs of an update with their arguments, the largest first, so that they can be compiled ahead.

        Args:
          micros: shapes of a micro-batch, by teacher.
        """
        leaves, total = state.leaves, np.float32(1)
        key = self._dropout.key_of(state, 0) if self._dropout else None
        masks = {micro.rows.loss_mask.shape: micro.rows.loss_mask for micro in micros.values()}
        return [
            *(
                (
                    self.gradients.get(name, self.gradients[""]),
                    (leaves, leaves, base, micro, total, teachers.get(name), key),
                )
                for name, micro in micros.items()
            ),
            (self._apply, (state, leaves, np.asarray(True))),
            (self._zeros, (leaves,)),
            *((self._count, (mask,)) for mask in masks.values()),
        ]


class Measure:
    """``(params, batches, teachers) → Sums`` without an update."""

    def __init__(self, loss: LossProgram):
        def make(teacher: str) -> Callable[..., Sums]:
            def measure(params: Params, micro: Batch, teacher_params: Params | None) -> Sums:
                return loss.function(params, micro, jnp.ones(()), _teacher(teacher, teacher_params))[1]

            return measure

        out = None if loss.shardings is None else loss.shardings[1]
        self._programs = loss.by_teacher("measure", make, out_shardings=out)

    def __call__(self, params: Params, batches: Batches, teachers: Mapping[str, Params]) -> Sums:
        """The sums as numpy, all 0 without a batch."""
        return added_up(
            [
                self._programs.get(name, self._programs[""])(params, micro, teachers.get(name))
                for name, micro in _micro_batches(batches)
            ]
        )


def accumulation(
    loss_function: LossFunction, assemble: Assemble, teacher: str, *, dropout: Dropout | None = None
) -> Callable[..., tuple[Leaves, Sums]]:
    """``(gradients, leaves, base, micro-batch, total, teacher's parameters, key) → (gradients, sums)``: adds those of
    the micro-batch.

    Args:
      teacher: name of the teacher in this process whose parameters are given; "" for none.
      dropout: whose key is given; None: the key is None.
    """

    def accumulate(
        gradients: Leaves,
        leaves: Leaves,
        base: Params,
        micro: Batch,
        total: jax.Array,
        teacher_params: Params | None,
        key: Any,
    ) -> tuple[Leaves, Sums]:
        def loss(leaves: Leaves) -> Any:
            leaves = dropout.masked(leaves, key) if dropout else leaves
            return loss_function(assemble(base, leaves), micro, total, _teacher(teacher, teacher_params))

        gradient, sums = jax.grad(loss, has_aux=True)(leaves)
        return jax.tree.map(jnp.add, gradients, gradient), sums

    return accumulate


def application(
    optimizer: optax.GradientTransformation, *, keep_previous: bool, decays: Mapping[str, float]
) -> Callable[..., tuple[TuneState, Applied]]:
    """``(state, gradients, usable) → (state, applied)``: a step of the optimiser, skipped unless all is finite.

    Args:
      decays: of the moving averages, average ← decay·average + (1 − decay)·leaves (mean teacher, arXiv 1703.01780).
    """

    def finish(state: TuneState, gradients: Leaves, usable: jax.Array) -> tuple[TuneState, Applied]:
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(norm) & usable
        leaves, inner = apply(optimizer, gradients, state.optimizer, state.leaves)
        finite &= jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(leaves)]))
        leaves, inner = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (leaves, inner), (state.leaves, state.optimizer)
        )
        skip = (~finite).astype(jnp.int32)
        skipped = jnp.stack([state.skipped[0] + skip, (state.skipped[1] + 1) * skip])
        previous = state.leaves if keep_previous else {}
        averages = {
            name: jax.tree.map(
                lambda mean, leaf, decay=decay: jnp.where(finite, decay * mean + (1 - decay) * leaf, mean),
                state.averages[name],
                leaves,
            )
            for name, decay in decays.items()
        }
        new = TuneState(leaves, inner, state.step + 1, skipped, previous, averages)
        return new, Applied(norm, ~finite, skipped)

    return finish


def added_up(parts: Sequence[Sums]) -> Sums:
    """The sums of several micro-batches as numpy; all 0 if there are none."""
    if not parts:
        fields: dict[str, Any] = dict.fromkeys(Sums._fields, np.zeros((), np.float32))
        fields.update(dict.fromkeys(("depth_loss", "depth_tokens"), np.zeros((0,), np.float32)))
        fields.update(Sums._field_defaults)
        return Sums(**fields)
    return Sums.over(jax.tree.map(lambda *values: np.stack([np.asarray(value) for value in values]), *parts))


def _micro_batches(batches: Batches) -> Iterator[tuple[str, Batch]]:
    for name, micros in sorted(batches.items()):
        for micro in micros:
            yield name, micro


def _teacher(name: str, params: Params | None) -> tuple[str, Params] | None:
    return None if params is None else (name, params)


def _zeros(leaves: Leaves) -> Leaves:
    return jax.tree.map(jnp.zeros_like, leaves)


def _count(mask: jax.Array) -> jax.Array:
    """The tokens that count in a micro-batch."""
    return jnp.sum((mask > 0).astype(jnp.float32))
