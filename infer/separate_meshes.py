"""Prefill and decode on meshes of their own, in one process: prompts stop no answer.

Each mesh holds the weights. One scheduler plans for both: a step that prefills runs on one mesh, a step that decodes on
the other, and up to two steps of each are in flight. Slots and pages have the same numbers on both. What a piece of a
prompt fills is copied once, while the next piece runs; at the prompt's end the rings, the MTP tails and the sampling
state of its slot follow. Snapshots of the prefix cache stay where prompts are computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from stepjax.adapters.lora import LoraConfig
from stepjax.errors import ConfigError
from stepjax.infer.engine.adapters import AdapterStack
from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine, Update
from stepjax.infer.engine.executor import Executor, Order, Progress
from stepjax.infer.engine.ready_programs import ProgramShape
from stepjax.infer.engine.sequence import HostMove, StepPlan
from stepjax.infer.steps.state import Emitted, State, slot_parts, with_slot_parts
from stepjax.program_cache import compile_program

if TYPE_CHECKING:
    from stepjax.infer.session import Session
    from stepjax.stored_function import StoredFunction


class PairedExecutor(Executor):
    """The executor of the mesh that decodes, and with it that of the mesh that prefills."""

    separate = True

    def __init__(self, prefiller: Executor, *arguments: Any, **options: Any):
        """The arguments after ``prefiller`` are those of an `Executor`; snapshots are the prefiller's."""
        super().__init__(*arguments, **options)
        self.prefiller = prefiller
        self.size = prefiller.size

    def run(self, order: Order) -> Emitted:
        plan = order.plan
        if plan.kind == "decode":
            self.prefiller._update_table(plan)
            for copy in plan.restores:
                self.prefiller._restore(copy)
            return super().run(order._replace(plan=dataclasses.replace(plan, restores=())))
        waited_s = self.prefiller.waited_s
        emitted = self.prefiller.run(order)
        self.waited_s += self.prefiller.waited_s - waited_s
        self._update_table(plan)
        for assignment in order.assignments:
            self._adapter[assignment.slot] = assignment.adapter
        self._hand_over(plan)
        return emitted

    def _hand_over(self, plan: StepPlan) -> None:
        """Copy what a prefill step fills."""
        size, source = self.size, self.prefiller
        moves = [
            HostMove("load", "page", 0, int(self._table[row.slot, place]), size.shard(row.slot))
            for row in plan.rows
            for place in row.filled_pages(size.page_size)
        ]
        if moves:
            self._set_pages(self.host.copy(moves, self._page_arrays(), source.host, source._page_arrays()))
        for row in plan.rows:
            if row.next_id < 0:
                self._hand_over_slot(row.slot)

    def _hand_over_slot(self, slot: int) -> None:
        taken = self._taker(self.prefiller.state, self.prefiller._on_shard(slot, 0)[0])
        there = [x.sharding for x in jax.tree.leaves(_entries(self.state))]
        self.state = self._putter(self.state, jax.device_put(taken, there), self._on_shard(slot, 0)[0])

    @cached_property
    def _taker(self) -> Callable[..., Any]:
        source = self.prefiller
        layout = source.runner.model.layout

        def take(state: State, slot_N: jax.Array) -> list[jax.Array]:
            def one(leaves: list[jax.Array], slot_N: jax.Array) -> list[jax.Array]:
                return [jax.lax.dynamic_index_in_dim(x, jnp.maximum(slot_N[0], 0), 0) for x in leaves]

            return layout.by_shard(one, jax.tree.leaves(_entries(state)), slot_N)

        return compile_program(
            source.runner.cache,
            take,
            (source.state, source._on_shard(0, 0)[0]),
            identity=f"take slots {layout!r}",
            out_shardings=[x.sharding for x in jax.tree.leaves(_entries(source.state))],
        )

    @cached_property
    def _putter(self) -> Callable[..., Any]:
        layout = self.runner.model.layout

        def put(state: State, values: list[jax.Array], slot_N: jax.Array) -> State:
            def one(leaves: list[jax.Array], values: list[jax.Array], slot_N: jax.Array) -> list[jax.Array]:
                slot = jnp.maximum(slot_N[0], 0)

                def into(x: jax.Array, value: jax.Array) -> jax.Array:
                    kept = jax.lax.dynamic_index_in_dim(x, slot, 0)
                    return jax.lax.dynamic_update_slice_in_dim(x, jnp.where(slot_N[0] >= 0, value, kept), slot, 0)

                return list(map(into, leaves, values))

            leaves, structure = jax.tree.flatten(_entries(state))
            parts, progress, sampling = jax.tree.unflatten(structure, layout.by_shard(one, leaves, values, slot_N))
            state = with_slot_parts(state, parts._replace(tails=progress.tails))
            return state._replace(progress=progress, sampling=sampling)

        values = [
            jax.ShapeDtypeStruct((self.size.num_shards, *x.shape[1:]), x.dtype, sharding=x.sharding)
            for x in jax.tree.leaves(_entries(self.state))
        ]
        return compile_program(
            self.runner.cache,
            put,
            (self.state, values, self._on_shard(0, 0)[0]),
            identity=f"put slots {layout!r}",
            donate_argnums=(0,),
            out_shardings=jax.tree.map(lambda x: x.sharding, self.state),
        )

    def load_adapter(self, slot: int, adapter: Mapping[str, Any], lora: LoraConfig) -> None:
        self.prefiller.load_adapter(slot, adapter, lora)
        super().load_adapter(slot, adapter, lora)

    def forget(self) -> None:
        self.prefiller.forget()
        super().forget()

    def close(self) -> None:
        self.prefiller.close()
        super().close()

    def prepared(self, order: Order) -> bool:
        return self.prefiller.prepared(order) if order.plan.kind == "prefill" else super().prepared(order)

    def prepare(self, order: Order) -> None:
        if order.plan.kind == "prefill":
            self.prefiller.prepare(order)
        else:
            super().prepare(order)

    def prepare_shape(self, shape: ProgramShape) -> None:
        if shape.kind == "prefill":
            self.prefiller.prepare_shape(shape)
        else:
            super().prepare_shape(shape)

    def calls(self, shapes: Sequence[ProgramShape]) -> list[tuple[StoredFunction, tuple[Any, ...]]]:
        return [*super().calls(_of_kind(shapes, "decode")), *self.prefiller.calls(_of_kind(shapes, "prefill"))]

    def compile_together(self, shapes: Sequence[ProgramShape], *, progress: Progress | None = None) -> None:
        super().compile_together(_of_kind(shapes, "decode"), progress=progress)
        self.prefiller.compile_together(_of_kind(shapes, "prefill"), progress=progress)

    def missing(self, shapes: Sequence[ProgramShape]) -> list[ProgramShape]:
        return [*super().missing(_of_kind(shapes, "decode")), *self.prefiller.missing(_of_kind(shapes, "prefill"))]

    def _warm_small(self) -> None:
        super()._warm_small()
        self.prefiller._warm_small()
        self.host.warm()
        self.prefiller.host.warm()
        self._hand_over_slot(0)


@dataclass(frozen=True)
class SeparateConfig(EngineConfig):
    """Settings of a `SeparateEngine`.

    Raises:
      ConfigError: prompts would be kept in host memory too.
    """

    prefill: Session | None = field(default=None, compare=False, repr=False)  # the model on the mesh that prefills

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.host_cache_bytes:
            raise ConfigError(
                f"host_cache_bytes: is {self.host_cache_bytes}, expected 0 with a mesh for prefill, whose pages are "
                "copied to the mesh that decodes"
            )

    def executor(self, session: Session) -> PairedExecutor:
        """The executors of both meshes.

        Raises:
          ConfigError: the meshes keep their pages in different ways, or the model's layers run in a loop.
          MeshError: a mesh is of several processes.
        """
        assert self.prefill is not None, "the model on the mesh that prefills is given"
        _check_meshes(self.prefill, session)
        sessions, stack_size = (self.prefill, session), self.stack_size(session)
        stacks = [AdapterStack(each, stack_size) if stack_size else None for each in sessions]
        sizes = [self.sizes(each) for each in sessions]
        size = dataclasses.replace(min(sizes, key=lambda size: size.num_pages), context=min(s.context for s in sizes))
        options = {"dtype": session.dtype, "eos_ids": session.config.eos_ids}
        parts = [
            (each.runner(self.speculate, routing=self.routing), stack.params if stack else each.table, stack)
            for each, stack in zip(sessions, stacks, strict=True)
        ]
        (runner, params, stack), decode = parts
        prefiller = Executor(runner, params, size, adapters=stack, **options)
        size = dataclasses.replace(size, num_snapshots=0)
        return PairedExecutor(prefiller, *decode[:2], size, adapters=decode[2], **options)


class SeparateEngine(Engine):
    """An `Engine` whose prompts are computed on another mesh than its answers.

    Example:
      >>> import stepjax
      >>> from stepjax.infer.separate_meshes import SeparateConfig, SeparateEngine
      >>> model = stepjax.load("step-tiny", mesh="tensor=1")
      >>> SeparateConfig(num_slots=2, prefill=model).num_slots
      2
    """

    def step(self) -> list[Update]:
        """Launch a step, if a mesh has room for one; read one that is done, or that nothing else can be launched
        before.
        """
        with self._timer.host():
            plan = self._plan()
            if plan is not None:
                self._launch(plan)
        place = self._next_read(wait=plan is None)
        if place is None:
            return self._take_failed()
        launched = self._in_flight[place]
        del self._in_flight[place]
        emitted = self._read(launched)
        with self._timer.host():
            return [*self._commit(launched.order, emitted, launched.answers), *self._take_failed()]

    def _next_read(self, *, wait: bool) -> int | None:
        """The place of the step to read: one that is done and the first of its kind, or the first that decodes."""
        kinds = [launched.order.plan.kind for launched in self._in_flight]
        first = [kinds.index(kind) for kind in ("decode", "prefill") if kind in kinds]
        # The stub of jax.Array does not list the method.
        done = [p for p in first if self._in_flight[p].emitted.token_BT.is_ready()]  # pyright: ignore[reportAttributeAccessIssue]
        return done[0] if done else first[0] if first and wait else None


def _entries(state: State) -> tuple[Any, Any, Any]:
    """All that a state keeps of a slot beside its pages, the slots along the first axis."""
    return slot_parts(state)._replace(tails=()), state.progress, state.sampling


def _of_kind(shapes: Iterable[ProgramShape], kind: str) -> list[ProgramShape]:
    return [shape for shape in shapes if shape.kind == kind]


def _check_meshes(prefill: Session, decode: Session) -> None:
    if prefill.model.period or decode.model.period:
        raise ConfigError("prefill mesh: the layers run in a loop, whose caches are stacks; load them unrolled")
    layouts = [session.model.layout.together() for session in (prefill, decode)]
    if layouts[0].num_shards != layouts[1].num_shards:
        raise ConfigError(
            f"prefill mesh: keeps sequences in {layouts[0].num_shards} shards and the decode mesh in "
            f"{layouts[1].num_shards}, but both number their pages alike; give both as many (along data and expert "
            "with strategy wide, 1 with others)"
        )
