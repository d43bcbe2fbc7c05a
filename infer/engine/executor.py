"""The device's side of the engine: carries out orders of plain integers on the arrays of the device.

On several hosts every process has an executor and receives the same orders, so that all launch the same programs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np

from stepjax.adapters.lora import LoraConfig
from stepjax.infer.engine.adapters import NONE, AdapterStack
from stepjax.infer.engine.host_copies import HostCopies
from stepjax.infer.engine.host_memory import trim_heap, uncommit_zeros
from stepjax.infer.engine.pages import TRASH_PAGE
from stepjax.infer.engine.ready_programs import ProgramShape
from stepjax.infer.engine.sequence import HostMove, RingCopy, StepPlan
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.sampling.state import Sampling, SlotSampling
from stepjax.infer.steps.program import Program
from stepjax.infer.steps.runner import Runner
from stepjax.infer.steps.state import Emitted, Pieces, State, slot_parts, with_slot_parts
from stepjax.model.cache import Ring
from stepjax.model.step3p5 import Params
from stepjax.program_cache import compile_program
from stepjax.stored_function import StoredFunction, compile_together

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # called with numbers done and in all

ASSIGNED = 4  # slots that one launch gives their sampling


@dataclass(frozen=True)
class CacheSize:
    """What an executor keeps on the device."""

    num_slots: int
    num_pages: int  # the trash page included
    page_size: int  # tokens
    context: int  # tokens of the longest sequence
    num_snapshots: int
    host_bytes: int = 0  # of pages and snapshots in the host memory of each process

    @property
    def pages_per_sequence(self) -> int:
        return -(-self.context // self.page_size)


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
    num_slots: int = 0  # a decode step runs the first ``num_slots`` slots
    num_rows: int = 0  # that a prefill step runs; 0: as few as there is a program for
    scores: bool = False  # log-probabilities of the new tokens are read
    drafts: bool = False  # the next drafts are read
    prompt_scores: bool = False
    masks: tuple[Mask, ...] = ()  # applied before the step


class Executor:
    """Holds the device's state, and runs orders on it as they arrive."""

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
        self._adapter = np.full((size.num_slots,), NONE, np.int32)  # by slot
        self._eos_ids = tuple(eos_ids)
        self.row_buckets = sorted({*(each for each in row_buckets if each < size.num_slots), size.num_slots})
        vocab = runner.model.config.vocab_size
        pages = (size.num_pages, size.page_size)
        self.state: State = runner.start_paged(size.num_slots, pages, dtype, Sampling.empty(size.num_slots, vocab))
        uncommit_zeros(self.state.cache)
        self._state_shapes = _shapes_of(self.state)
        self.waited_s = 0.0  # for programs that orders needed and that were not there
        self._table = np.full((size.num_slots, size.pages_per_sequence), TRASH_PAGE, np.int32)
        self._far = jax.default_backend() != "cpu"  # whether results must be copied to the host
        self._launchers: dict[Any, Callable[..., Any]] = {}
        self._snapshots = self._no_snapshots() if size.num_snapshots else None
        identity = repr(runner.model.layout)
        self.host = HostCopies(runner.cache, identity, self._page_arrays(), jax.tree.leaves(self._snapshots))

    def run(self, order: Order) -> Emitted:
        """Launch an order. Returns at once, before the result is ready."""
        plan = order.plan
        if plan.moves:
            self._move(plan.moves)
        self._update_table(plan)
        for copy in plan.restores:
            self._restore(copy)
        for first in range(0, len(order.assignments), ASSIGNED):
            self._assign(order.assignments[first : first + ASSIGNED])
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
        if self.size.num_snapshots:
            self._save(RingCopy(0, 0))
            self._restore(RingCopy(0, 0))
        if self.size.host_bytes:
            self.host.warm()
            _ = self._host_restorer
        jax.block_until_ready(self.state)

    def _idle_call(self, shape: ProgramShape) -> tuple[Program, tuple[Any, ...]]:
        """A program and arguments of its shapes, none of whose slots or rows is in use."""
        if shape.kind == "prefill":
            return self.runner.prefill(), (self._no_pieces(shape.count, shape.width),)
        active, pages = np.zeros((shape.count,), bool), np.zeros((shape.count, self.size.pages_per_sequence), np.int32)
        return self.runner.step(shape.width), (active, pages, self._adapters_of(active))

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
        active = np.zeros((order.num_slots,), bool)
        active[[row.slot for row in order.plan.rows]] = True
        # As numpy arrays: sending them first, and keeping what has not changed, costs more than it saves.
        rest = (active, self._table[: order.num_slots].copy(), self._adapters_of(active))
        return self.runner.step(order.plan.drafts), rest

    def _adapters_of(self, active: np.ndarray) -> np.ndarray | None:
        """The adapters of the first slots; those that are not active have none."""
        return None if self.adapters is None else np.where(active, self._adapter[: len(active)], np.int32(NONE))

    def _prefill(self, order: Order) -> tuple[Program, tuple[Any, ...]]:
        plan = order.plan
        rows = order.num_rows or next(each for each in self.row_buckets if each >= len(plan.rows))
        pieces = self._no_pieces(rows, plan.width)
        for at, row in enumerate(plan.rows):
            pieces.id_RT[at, : row.count] = row.ids
            pieces.count_R[at], pieces.next_R[at] = row.count, row.next_id
            pieces.start_R[at], pieces.slot_R[at] = row.start, row.slot
            pieces.page_RN[at] = self._table[row.slot]
            if pieces.adapter_R is not None:
                pieces.adapter_R[at] = self._adapter[row.slot]
        assert pieces.scored_R is not None
        pieces.scored_R[: len(plan.rows)] = order.prompt_scores
        return self.runner.prefill(), (pieces,)

    def _no_pieces(self, rows: int, width: int) -> Pieces:
        """Rows that do nothing: their slot is past the last."""
        zero = np.zeros((rows,), np.int32)
        slot = np.full((rows,), self.size.num_slots, np.int32)
        pages = np.full((rows, self.size.pages_per_sequence), TRASH_PAGE, np.int32)
        adapter = None if self.adapters is None else np.full((rows,), NONE, np.int32)
        ids, scored = np.zeros((rows, width), np.int32), np.zeros((rows,), bool)
        return Pieces(ids, zero.copy(), zero - 1, zero.copy(), slot, pages, adapter, scored)

    def _assign(self, assignments: Sequence[Assignment]) -> None:
        """One launch, and more only where an answer with penalties was preempted late: see `SlotSampling.rows`."""
        vocab = self.runner.model.config.vocab_size
        waiting: list[tuple[int, list[SlotSampling]]] = []
        for each in assignments:
            self._adapter[each.slot] = each.adapter
            rows = SlotSampling.rows(each.params, each.prompt, each.output, eos_ids=self._eos_ids, vocab=vocab)
            waiting.append((each.slot, rows))
        while waiting:
            slot = np.full((ASSIGNED,), self.size.num_slots, np.int32)
            slot[: len(waiting)] = [at for at, _ in waiting]
            stacked = SlotSampling.stack([rows[0] for _, rows in waiting], count=ASSIGNED)
            arguments = ({}, self.state, slot, stacked)
            self.state, _ = self.runner.assign().compiled(*arguments)(*arguments)
            waiting = [(at, rows[1:]) for at, rows in waiting if rows[1:]]

    def _guide(self, masks: Sequence[Mask]) -> None:
        rules = self.state.sampling.rules
        assert rules is not None, "an engine's slots have rules"
        shape = rules.mask_BTW.shape[1:]
        rows = next(each for each in self.row_buckets if each >= len(masks))
        slot, on = np.full((rows,), self.size.num_slots, np.int32), np.zeros((rows,), bool)
        words = np.zeros((rows, *shape), np.uint32)
        for at, mask in enumerate(masks):
            given = np.frombuffer(mask.words, np.uint32).reshape(-1, shape[1])
            slot[at], on[at], words[at, : len(given)] = mask.slot, len(given) > 0, given
        arguments = ({}, self.state, slot, on, words)
        self.state, _ = self.runner.guide().compiled(*arguments)(*arguments)

    def _no_snapshots(self) -> Any:
        def create() -> Any:
            return slot_parts(self.state).snapshots(self.size.num_snapshots)

        where = jax.tree.map(lambda x: x.sharding, slot_parts(self.state))
        snapshots = jax.jit(create, out_shardings=where)()
        uncommit_zeros(snapshots)
        return snapshots

    def _save(self, copy: RingCopy) -> None:
        self._snapshots = self._saver(self._snapshots, self.state, np.int32(copy.slot), np.int32(copy.snapshot))

    @cached_property
    def _saver(self) -> Callable[..., Any]:
        def save(snapshots: Any, state: State, slot: jax.Array, snapshot: jax.Array) -> Any:
            return snapshots.copied(snapshot, slot_parts(state), slot)

        return self._copier(save, self._snapshots, self.state)

    def _restore(self, copy: RingCopy) -> None:
        self.state = self._restorer(self.state, self._snapshots, np.int32(copy.slot), np.int32(copy.snapshot))

    @cached_property
    def _restorer(self) -> Callable[..., Any]:
        return self._copier(self._restored, self.state, self._snapshots)

    @cached_property
    def _host_restorer(self) -> Callable[..., Any]:
        """As `_restorer`, from a copy in host memory."""
        return self._copier(self._restored, self.state, self._snapshot_tree(self.host.snapshot_shapes))

    def _restored(self, state: State, snapshots: Any, slot: jax.Array, snapshot: jax.Array) -> State:
        state = with_slot_parts(state, slot_parts(state).copied(slot, snapshots, snapshot))
        first = state.progress.first_SK.at[slot].set(0)
        return state._replace(progress=state.progress._replace(first_SK=first))

    def _move(self, moves: Sequence[HostMove]) -> None:
        """Copies between the device and host memory, before anything of the step overwrites what they read."""
        pages, rings = self.host.run(moves, self._page_arrays(), jax.tree.leaves(self._snapshots))
        self._set_pages(pages)
        for slot, values in rings.items():
            values = self._snapshot_tree(values)
            self.state = self._host_restorer(self.state, values, np.int32(slot), np.int32(0))

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
        """``function(into, source, slot, snapshot)``, compiled once for all; its result replaces ``into``."""
        began, index = time.perf_counter(), np.int32(0)
        where = jax.tree.map(lambda x: x.sharding, into)
        compiled = compile_program(
            self.runner.cache,
            function,
            (into, source, index, index),
            identity=f"{function.__name__.strip('_')} {self.runner.model.layout!r}",
            donate_argnums=(0,),
            out_shardings=where,
        )
        log.info("prepared %s in %.1f s", function.__name__, time.perf_counter() - began)
        return compiled


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
