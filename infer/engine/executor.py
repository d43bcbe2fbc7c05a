"""The device's side of the engine: carries out orders of plain integers on the arrays of the device.

On several hosts every process has an executor and receives the same orders, so that all launch the same programs.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.adapters.lora import LoraConfig
from stepjax.infer.engine.adapters import NONE, AdapterStack
from stepjax.infer.engine.host_copies import HostCopies
from stepjax.infer.engine.host_memory import trim_heap, uncommit_zeros
from stepjax.infer.engine.pages import TRASH_PAGE
from stepjax.infer.engine.ready_programs import ProgramShape
from stepjax.infer.engine.sequence import HostMove, RingCopy, StepPlan
from stepjax.infer.engine.shard import CacheSize
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.sampling.state import Sampling, SlotSampling
from stepjax.infer.steps.program import Program
from stepjax.infer.steps.runner import Runner
from stepjax.infer.steps.state import Emitted, Pieces, State, placed_rows, slot_parts, with_slot_parts
from stepjax.model.cache import Ring
from stepjax.model.step3p5 import Params
from stepjax.program_cache import compile_program
from stepjax.stored_function import StoredFunction, compile_together

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # called with numbers done and in all

ASSIGNED = 4  # slots that one launch gives their sampling


class Assignment(NamedTuple):
    """A sequence that a slot receives, with what sampling needs of it."""

    slot: int
    params: SamplingParams
    prompt: tuple[int, ...]
    output: tuple[int, ...] = ()  # the answer so far, after a preemption
    adapter: int = NONE  # slot of its adapter


class Mask(NamedTuple):
    """The tokens that a slot may sample at its next step."""

    slot: int
    words: bytes  # uint32 by position; empty: any token


class Order(NamedTuple):
    """One step of the device: the plan, and the changes of sampling that it needs."""

    plan: StepPlan
    assignments: tuple[Assignment, ...] = ()
    num_slots: int = 0  # a decode step runs the first ``num_slots`` slots of each shard
    num_rows: int = 0  # that a prefill step runs on each shard
    scores: bool = False  # log-probabilities of the new tokens are read
    drafts: bool = False  # the next drafts are read
    prompt_scores: bool = False
    masks: tuple[Mask, ...] = ()  # applied before the step


class Executor:
    """Holds the device's state, and runs orders on it as they arrive."""

    separate = False  # whether prefill and decode run on devices of their own

    def __init__(
        self,
        runner: Runner,
        params: Params,
        size: CacheSize,
        *,
        dtype: Any,
        eos_ids: Sequence[int],
        row_buckets: Sequence[int] = (1, 4, 16, 64),
        adapters: AdapterStack | None = None,
    ):
        """
        Args:
          row_buckets: numbers of prompt pieces that a prefill program is compiled for.
          adapters: the adapters of the engine; ``params`` are the stack's parameters, which include their factors.
        """
        self.runner, self.params, self.size = runner, params, size
        self.adapters = adapters
        self._adapter = np.full((size.all_slots,), NONE, np.int32)  # by slot
        self._eos_ids = tuple(eos_ids)
        self.row_buckets = sorted({*(each for each in row_buckets if each < size.num_slots), size.num_slots})
        vocab = runner.model.config.vocab_size
        assert size.num_shards == runner.model.layout.num_shards
        pages = (size.num_pages * size.num_shards, size.page_size)
        self.state: State = runner.start_paged(size.all_slots, pages, dtype, Sampling.empty(size.all_slots, vocab))
        uncommit_zeros(self.state.cache)
        self._state_shapes = _shapes_of(self.state)
        self.waited_s = 0.0  # for programs that orders needed and that were not there
        self._table = np.full((size.all_slots, size.pages_per_sequence), TRASH_PAGE, np.int32)  # pages of its shard
        self._assigned = max(1, ASSIGNED // size.num_shards)  # slots of a shard that one launch gives their sampling
        self._far = jax.default_backend() != "cpu"  # whether results must be copied to the host
        self._launchers: dict[Any, Callable[..., Any]] = {}
        self.handlers: dict[str, Callable[[Any], bool]] = {}  # of orders of a kind that only some engines have
        self._snapshots = self._no_snapshots() if size.num_snapshots else None
        layout = runner.model.layout
        self.host = HostCopies(runner.cache, layout, self._page_arrays(), jax.tree.leaves(self._snapshots))

    def run(self, order: Order) -> Emitted:
        """Launch an order. Returns at once, before the result is ready."""
        plan = order.plan
        if plan.moves:
            self._move(plan.moves)
        self._update_table(plan)
        for copy in plan.restores:
            self._restore(copy)
        self._assign(order.assignments)
        if order.masks:
            self._guide(order.masks)
        program, rest = self._call(order)
        key = (program.name, jax.tree.leaves(rest)[0].shape)  # the rest of the shapes is the executor's own
        run = self._launchers.get(key)
        if run is None:
            began = time.perf_counter()
            run = self._launchers[key] = program.compiled(self.params, self.state, *rest)
            self.waited_s += time.perf_counter() - began
        self.state, emitted = run(self.params, self.state, *rest)
        if not order.scores:
            emitted = emitted._replace(scores=None)
        if not order.prompt_scores:
            emitted = emitted._replace(prompt=None)
        if not order.drafts:
            emitted = emitted._replace(draft_BK=None)
        if self._far:
            for leaf in jax.tree.leaves(emitted):
                leaf.copy_to_host_async()
        for copy in plan.saves:
            self._save(copy)
        return emitted

    def load_adapter(self, slot: int, adapter: Mapping[str, Any], lora: LoraConfig) -> None:
        """Put an adapter into a slot of the stack, for the orders that follow."""
        assert self.adapters is not None
        self.adapters.write(slot, adapter, lora)
        self.params = self.adapters.params

    def change(self, params: Mapping[str, Any]) -> None:
        """Go on with other arrays of the same shapes and places; those of experts may have other experts in a slot."""
        if self.adapters is None:
            self.params = {**self.params, **params}
            return
        self.adapters.change(params)
        self.params = self.adapters.params

    def forget(self) -> None:
        """Remove the pages of all slots and the copies in host memory, for a new scheduler."""
        self._table[:] = TRASH_PAGE
        self.host.forget()

    def close(self) -> None:
        """End the threads."""
        self.host.close()

    def prepared(self, order: Order) -> bool:
        """Whether the program of an order is compiled."""
        program, rest = self._call(order)
        return program.has(self.state, *rest)

    def prepare(self, order: Order) -> None:
        """Compile the program of an order, without launching it."""
        began = time.perf_counter()
        program, rest = self._call(order)
        program.compiled(self.params, self.state, *rest)
        self.waited_s += time.perf_counter() - began

    def prepare_shape(self, shape: ProgramShape) -> None:
        """Compile a program while orders run, whose arrays are therefore not touched. Any thread may ask."""
        program, rest = self._idle_call(shape)
        params = {name: _shapes_of(value) for name, value in self.params.items()}  # in their order, which counts
        program.compiled(params, self._state_shapes, *rest)
        trim_heap()

    def warm(
        self,
        decode: Iterable[tuple[int, int]],
        prefill: Iterable[tuple[int, int]],
        *,
        progress: Progress | None = None,
    ) -> None:
        """Compile ahead of time, several programs at once, while no slot is in use.

        Args:
          decode: slots and drafts of each decode step.
          prefill: rows and width of each prefill step.
          progress: called with the numbers of programs done and in all; the small ones count as one.
        """
        shapes = [ProgramShape("decode", *shape) for shape in decode]
        shapes += [ProgramShape("prefill", *shape) for shape in prefill]
        report = progress or _no_report
        self.compile_together(shapes, progress=lambda done, total: report(done, total + 1))
        self._warm_small()
        report(len(shapes) + 1, len(shapes) + 1)

    def compile_together(self, shapes: Sequence[ProgramShape], *, progress: Progress | None = None) -> None:
        """Compile programs, several at once."""
        compile_together(self.calls(shapes), progress=progress)
        for shape in shapes:
            program, rest = self._idle_call(shape)
            program.compiled(self.params, self.state, *rest)
        trim_heap()

    def calls(self, shapes: Sequence[ProgramShape]) -> list[tuple[StoredFunction, tuple[Any, ...]]]:
        """The functions of programs and their arguments, for `stepjax.stored_function.compile_together`."""
        calls = [self._idle_call(shape) for shape in shapes]
        return [program.stored(self.params, self.state, *rest) for program, rest in calls]

    def missing(self, shapes: Sequence[ProgramShape]) -> list[ProgramShape]:
        """Those of the programs that are not compiled."""
        calls = [(shape, self._idle_call(shape)) for shape in shapes]
        return [shape for shape, (program, rest) in calls if not program.has(self.state, *rest)]

    def _warm_small(self) -> None:
        """Compile what assigns slots, masks tokens, and copies adapters and snapshots, by running it once."""
        self._assign([Assignment(0, SamplingParams(seed=0), (0,))])
        for rows in self.row_buckets:
            self._guide([Mask(0, b"")] * rows)
        if self.adapters is not None:
            self.adapters.warm()
        if self._snapshots is not None:
            self._save(RingCopy(0, 0))
            self._restore(RingCopy(0, 0))
        if self.size.host_bytes:
            self.host.warm()
            _ = self._host_restorer
        jax.block_until_ready(self.state)

    def _idle_call(self, shape: ProgramShape) -> tuple[Program, tuple[Any, ...]]:
        """A program and arguments of its shapes, none of whose slots or rows is in use."""
        if shape.kind == "prefill":
            return self.runner.prefill(), (self._placed(self._no_pieces(shape.count, shape.width)),)
        return self.runner.step(shape.width), self._slot_arguments((), shape.count)

    def row_buckets_for(self, most: int) -> list[int]:
        """The buckets that up to ``most`` pieces are padded to."""
        return [rows for rows, less in zip(self.row_buckets, [0, *self.row_buckets], strict=False) if less < most]

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values on one device."""
        return sum(leaf.nbytes // _ways(leaf) for leaf in jax.tree.leaves(self.state.cache))

    def _update_table(self, plan: StepPlan) -> None:
        for slot in plan.resets:
            self._table[slot] = TRASH_PAGE
        for slot, first, pages in plan.page_updates:
            self._table[slot, first : first + len(pages)] = pages

    def _call(self, order: Order) -> tuple[Program, tuple[Any, ...]]:
        """The program of an order, and its arguments after parameters and state."""
        return self._prefill(order) if order.plan.kind == "prefill" else self._decode(order)

    def _decode(self, order: Order) -> tuple[Program, tuple[Any, ...]]:
        rest = self._slot_arguments([row.slot for row in order.plan.rows], order.num_slots)
        return self.runner.step(order.plan.drafts), rest

    def _slot_arguments(self, slots: Sequence[int], count: int) -> tuple[Any, ...]:
        """Which of the first ``count`` slots of each shard are active, their pages and adapters; those that are not
        active have no adapter.
        """
        active = np.zeros((self.size.all_slots,), bool)
        active[[*slots]] = True
        adapter = None if self.adapters is None else self._first(np.where(active, self._adapter, np.int32(NONE)), count)
        return self._placed((self._first(active, count), self._first(self._table, count), adapter))

    def _first(self, by_slot: np.ndarray, count: int) -> np.ndarray:
        """Of an array by slot, a copy of the first slots of each shard."""
        shards = by_slot.reshape(self.size.num_shards, self.size.num_slots, *by_slot.shape[1:])
        return shards[:, :count].reshape(-1, *by_slot.shape[1:]).copy()

    def _placed(self, tree: Any) -> Any:
        return placed_rows(tree, self.runner.model.layout)

    def _prefill(self, order: Order) -> tuple[Program, tuple[Any, ...]]:
        plan = order.plan
        if not order.num_rows:
            least = self.size.fullest(row.slot for row in plan.rows)
            order = order._replace(num_rows=next(each for each in self.row_buckets if each >= least))
        pieces, places = self._no_pieces(order.num_rows, plan.width), self.size.places(plan, order.num_rows)
        assert pieces.scored_R is not None
        pieces.scored_R[places] = order.prompt_scores
        for at, row in zip(places, plan.rows, strict=True):
            pieces.id_RT[at, : row.count] = row.ids
            pieces.count_R[at], pieces.next_R[at] = row.count, row.next_id
            pieces.start_R[at], pieces.slot_R[at] = row.start, row.slot % self.size.num_slots
            pieces.page_RN[at] = self._table[row.slot]
            if pieces.adapter_R is not None:
                pieces.adapter_R[at] = self._adapter[row.slot]
        return self.runner.prefill(), (self._placed(pieces),)

    def _no_pieces(self, rows: int, width: int) -> Pieces:
        """Rows of each shard that do nothing: their slot is past its last."""
        rows *= self.size.num_shards
        zero = np.zeros((rows,), np.int32)
        slot = np.full((rows,), self.size.num_slots, np.int32)
        pages = np.full((rows, self.size.pages_per_sequence), TRASH_PAGE, np.int32)
        adapter = None if self.adapters is None else np.full((rows,), NONE, np.int32)
        ids, scored = np.zeros((rows, width), np.int32), np.zeros((rows,), bool)
        return Pieces(ids, zero.copy(), zero - 1, zero.copy(), slot, pages, adapter, scored)

    def _assign(self, assignments: Sequence[Assignment]) -> None:
        """A launch for a few slots of each shard, and more where an answer with penalties was preempted late: see
        `SlotSampling.rows`.
        """
        vocab, size = self.runner.model.config.vocab_size, self.size
        unused: list[SlotSampling] = []  # for shards that have none
        waiting: list[deque[tuple[int, SlotSampling]]] = [deque() for _ in range(size.num_shards)]
        for each in assignments:
            self._adapter[each.slot] = each.adapter
            rows = SlotSampling.rows(each.params, each.prompt, each.output, eos_ids=self._eos_ids, vocab=vocab)
            waiting[size.shard(each.slot)] += ((each.slot % size.num_slots, row) for row in rows)
            unused = rows[:1]
        while any(waiting):
            slot = np.full((size.num_shards, self._assigned), size.num_slots, np.int32)
            rows = []
            for shard, queue in enumerate(waiting):
                taken = _of_different_slots(queue, self._assigned)
                slot[shard, : len(taken)] = [at for at, _ in taken]
                rows.append(SlotSampling.stack([row for _, row in taken] or unused, count=self._assigned))
            stacked = jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
            arguments = ({}, self.state, *self._placed((slot.reshape(-1), stacked)))
            self.state, _ = self.runner.assign().compiled(*arguments)(*arguments)

    def _guide(self, masks: Sequence[Mask]) -> None:
        rules, size = self.state.sampling.rules, self.size
        assert rules is not None, "an engine's slots have rules"
        least, shape = size.fullest(mask.slot for mask in masks), rules.mask_BTW.shape[1:]
        count = next(each for each in self.row_buckets if each >= least)
        rows = count * size.num_shards
        slot, on = np.full((rows,), size.num_slots, np.int32), np.zeros((rows,), bool)
        words = np.zeros((rows, *shape), np.uint32)
        for at, mask in zip(size.packed((mask.slot for mask in masks), count), masks, strict=True):
            given = np.frombuffer(mask.words, np.uint32).reshape(-1, shape[1])
            slot[at], on[at], words[at, : len(given)] = mask.slot % size.num_slots, len(given) > 0, given
        arguments = ({}, self.state, *self._placed((slot, on, words)))
        self.state, _ = self.runner.guide().compiled(*arguments)(*arguments)

    def _no_snapshots(self) -> Any:
        def create() -> Any:
            return slot_parts(self.state).snapshots(self.size.num_snapshots * self.size.num_shards)

        where = jax.tree.map(lambda x: x.sharding, slot_parts(self.state))
        snapshots = jax.jit(create, out_shardings=where)()
        uncommit_zeros(snapshots)
        return snapshots

    def _save(self, copy: RingCopy) -> None:
        self._snapshots = self._saver(self._snapshots, self.state, *self._on_shard(copy.slot, copy.snapshot))

    def _on_shard(self, slot: int, snapshot: int) -> tuple[Any, Any]:
        """A slot and a snapshot as arguments of `_copier`'s programs: by shard, −1 for the slots of the others."""
        slots, snapshots = np.full((self.size.num_shards,), -1, np.int32), np.zeros((self.size.num_shards,), np.int32)
        shard = self.size.shard(slot)
        slots[shard], snapshots[shard] = slot % self.size.num_slots, snapshot
        return self._placed((slots, snapshots))

    @cached_property
    def _saver(self) -> Callable[..., Any]:
        layout = self.runner.model.layout

        def save(snapshots: Any, state: State, slot_N: jax.Array, snapshot_N: jax.Array) -> Any:
            into = jnp.where(slot_N >= 0, snapshot_N, -1)
            return snapshots.copied(into, slot_parts(state), jnp.maximum(slot_N, 0), layout)

        return self._copier(save, self._snapshots, self.state)

    def _restore(self, copy: RingCopy) -> None:
        self.state = self._restorer(self.state, self._snapshots, *self._on_shard(copy.slot, copy.snapshot))

    @cached_property
    def _restorer(self) -> Callable[..., Any]:
        return self._copier(self._restored, self.state, self._snapshots)

    @cached_property
    def _host_restorer(self) -> Callable[..., Any]:
        """As `_restorer`, from a copy in host memory."""
        return self._copier(self._restored, self.state, self._snapshot_tree(self.host.snapshot_shapes))

    def _restored(self, state: State, snapshots: Any, slot_N: jax.Array, snapshot_N: jax.Array) -> State:
        layout = self.runner.model.layout
        state = with_slot_parts(state, slot_parts(state).copied(slot_N, snapshots, snapshot_N, layout))

        def without_gap(first_SK: jax.Array, slot_N: jax.Array) -> jax.Array:
            return first_SK.at[jnp.where(slot_N >= 0, slot_N, first_SK.shape[0])].set(0, mode="drop")

        first = layout.by_shard(without_gap, state.progress.first_SK, slot_N)
        return state._replace(progress=state.progress._replace(first_SK=first))

    def _move(self, moves: Sequence[HostMove]) -> None:
        """Copies between the device and host memory, before anything of the step overwrites what they read."""
        pages, rings = self.host.run(moves, self._page_arrays(), jax.tree.leaves(self._snapshots))
        self._set_pages(pages)
        for slot, values in rings.items():
            values = self._snapshot_tree(values)
            self.state = self._host_restorer(self.state, values, *self._on_shard(slot, 0))

    def _snapshot_tree(self, leaves: Sequence[Any]) -> Any:
        return jax.tree.unflatten(jax.tree.structure(slot_parts(self.state)), leaves)

    def _page_arrays(self) -> list[jax.Array]:
        return jax.tree.leaves([view for view in self.state.cache.layers if not isinstance(view, Ring)])

    def _set_pages(self, arrays: Sequence[jax.Array]) -> None:
        rest = iter(arrays)
        layers = tuple(
            view if isinstance(view, Ring) else jax.tree.map(lambda _: next(rest), view)
            for view in self.state.cache.layers
        )
        self.state = self.state._replace(cache=replace(self.state.cache, layers=layers))

    def _copier(self, function: Callable[..., Any], into: Any, source: Any) -> Callable[..., Any]:
        """``function(into, source, slot_N, snapshot_N)``, compiled once for all; its result replaces ``into``."""
        began = time.perf_counter()
        where = jax.tree.map(lambda x: x.sharding, into)
        compiled = compile_program(
            self.runner.cache,
            function,
            (into, source, *self._on_shard(0, 0)),
            identity=f"{function.__name__.strip('_')} {self.runner.model.layout!r}",
            donate_argnums=(0,),
            out_shardings=where,
        )
        log.info("prepared %s in %.1f s", function.__name__, time.perf_counter() - began)
        return compiled


def _of_different_slots(queue: deque[tuple[int, SlotSampling]], most: int) -> list[tuple[int, SlotSampling]]:
    """Take the first rows of a queue that one launch can assign: a slot's second row adds to its first."""
    taken: list[tuple[int, SlotSampling]] = []
    while queue and len(taken) < most and queue[0][0] not in {slot for slot, _ in taken}:
        taken.append(queue.popleft())
    return taken


def _no_report(done: int, total: int) -> None:
    pass


def _shapes_of(tree: Any) -> Any:
    """Arrays as shapes where they lie: a step that runs may take the arrays away."""

    def shape(x: jax.Array) -> jax.ShapeDtypeStruct:
        where = x.sharding if getattr(x, "committed", True) else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where, weak_type=x.weak_type)

    return jax.tree.map(shape, tree)


def _ways(x: jax.Array) -> int:
    """Devices that share an array."""
    return x.nbytes // x.addressable_shards[0].data.nbytes
