"""Experts that change their places while an engine runs: a few slots between two steps, and no answer stops.

An engine whose model has more slots than experts (`--expert-slots`) holds the busiest experts more than once. When the
load shifts, other experts should be. Each call of `ExpertMoves.step` writes a few slots of one layer, with their
adapters, and the layer's table of copies. Every expert has a slot after each call, so that the next step is exact.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.errors import RequestError
from stepjax.sharding.expert_group import Group
from stepjax.sharding.expert_order import copy_table, imbalance, rank_load, replicated_order, slot_experts, slot_load
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.rules import Axes, entry_axes

if TYPE_CHECKING:
    from stepjax.infer.engine.executor import Executor
    from stepjax.infer.engine.followers import Leader
    from stepjax.infer.session import Session

ORDER = "experts"  # kind of the orders that move experts on the processes that follow
MOST = 4  # slots that one call writes: each device receives as many experts of a layer


class LayerMove(NamedTuple):
    """Slots of a layer to write at once, each with the slot that holds its expert before."""

    layer: int
    sources: dict[int, int]  # slot → slot
    order_S: np.ndarray  # the expert in each slot afterwards

    def encoded(self) -> list[Any]:
        """As JSON, for the processes that follow."""
        return [self.layer, [*self.sources.items()], self.order_S.tolist()]


class ExpertPlaces:
    """The places of experts on the devices of an engine. Of several processes each has its own."""

    def __init__(self, session: Session, executor: Executor):
        """
        Args:
          executor: of an engine with this model.

        Raises:
          RequestError: the experts have one slot each, or lie in a loop's stacks or on two meshes.
        """
        layout, config = session.model.layout, session.config
        if not config.expert_slots or not isinstance(layout, MeshLayout):
            raise RequestError(
                "expert moves: each expert has one place; load the model with expert_slots (--expert-slots)"
            )
        if session.model.period or executor.separate:
            raise RequestError(
                "expert moves: are for one mesh and layers that are not looped (--layers unrolled); this engine has "
                "others"
            )
        self.config, self.layers = config, [layer.index for layer in config.moe_layers]
        self.num_ranks = Group.of(layout.rules).num_ranks
        self._session, self._executor, self._layout = session, executor, layout

    def order(self, layer: int) -> np.ndarray:
        """The expert in each slot of a layer, int64 [S]."""
        return slot_experts(np.asarray(self._session.table[f"layers.{layer}.moe.copies"]), self.config.expert_slots)

    def write(self, move: LayerMove) -> None:
        """Write slots, between two steps. Steps that are under way still have the old weights."""
        slots = np.full(MOST, self.config.expert_slots, np.int32)  # those beyond the last are written nowhere
        sources = np.zeros(MOST, np.int32)
        slots[: len(move.sources)], sources[: len(move.sources)] = [*move.sources], [*move.sources.values()]
        prefix, params = f"layers.{move.layer}.moe.", self._executor.params
        paths = [path for path in params if path.startswith(f"{prefix}experts.")]
        leaves, structure = jax.tree.flatten([params[path] for path in paths])
        moved = _mover(self._layout, tuple(leaf.sharding.spec for leaf in leaves))(leaves, slots, sources)
        changed = dict(zip(paths, jax.tree.unflatten(structure, moved), strict=True))
        table = copy_table(move.order_S, self.config.num_experts)
        place = self._session.table[f"{prefix}copies"].sharding
        changed[f"{prefix}copies"] = jax.make_array_from_callback(table.shape, place, lambda index: table[index])
        self._executor.change(changed)
        held_by_session = cast(dict[str, Any], self._session.table)  # in place: all who have it lose the old arrays
        held_by_session.update({path: getattr(value, "base", value) for path, value in changed.items()})

    def carry_out(self, content: Any) -> bool:
        """Write what the leader of several processes orders (`LayerMove.encoded`); it does not wait."""
        layer, sources, order = content
        self.write(LayerMove(layer, dict(sources), np.array(order)))
        return False


class ExpertMoves:
    """The way of an engine's experts from where they lie to where loads want them.

    Example:
      >>> import stepjax
      >>> from stepjax.infer.expert_moves import layer_moves
      >>> import numpy as np
      >>> [move.sources for move in layer_moves(0, np.array([0, 1, 1]), np.array([0, 1, 0]))]
      [{2: 0}]
    """

    def __init__(
        self,
        session: Session,
        executor: Executor,
        loads: np.ndarray,
        *,
        leader: Leader | None = None,
        least_gain: float | None = None,
    ):
        """
        Args:
          executor: of an engine with this model.
          loads: how often each expert is chosen, [E] or [L, E] for the L MoE layers (`Session.expert_load`).
          leader: of several processes, which tells the others. They have what carries it out if the engine is a
            `stepjax.infer.balanced_engine.BalancedEngine`.
          least_gain: a layer is left as it is unless the tokens of its fullest rank become fewer by this share.

        Raises:
          RequestError: as of `ExpertPlaces`, or there are several processes without a leader, or the loads are not of
            this model.
        """
        self._places, self._leader, self._least_gain = ExpertPlaces(session, executor), leader, least_gain
        if leader is None and jax.process_count() > 1:
            raise RequestError("expert moves: several processes move experts in a BalancedEngine only")
        layers, wanted = self._places.layers, np.asarray(loads, np.float64)
        shape = len(layers), session.config.num_experts
        if wanted.shape not in (shape, shape[1:]) or not np.isfinite(wanted).all() or (wanted < 0).any():
            raise RequestError(
                f"expert moves: loads of shape {wanted.shape}, expected finite numbers ≥ 0 for {shape[1]} experts, or "
                f"for those of each of {shape[0]} MoE layers"
            )
        self._loads = np.array(np.broadcast_to(wanted, shape))
        self.imbalance: list[tuple[float, float]] = []  # of each layer that is planned: before its moves, and after
        self._moves = self._planned()

    def step(self) -> int:
        """Write the next few slots, between two steps of the engine; returns how many, 0 when all lie as wanted.

        Steps that are under way still have the old weights.
        """
        written: int | None = 0
        while written == 0:
            written = self.advance()
        return written or 0

    def advance(self) -> int | None:
        """As `step`, and 0 too for a layer that has been planned and stays as it is, so that a call is short: of 288
        experts, planning a layer takes milliseconds. None when all lie as wanted.
        """
        if (move := next(self._moves, None)) is None:
            return None
        if move.sources:
            if self._leader:
                self._leader.tell(ORDER, move.encoded())
            self._places.write(move)
        return len(move.sources)

    def _planned(self) -> Iterator[LayerMove]:
        places = self._places
        for layer, load_E in zip(places.layers, self._loads, strict=True):
            held, wanted = places.order(layer), replicated_order(load_E, places.num_ranks, places.config.expert_slots)
            before, after = (
                float(imbalance(rank_load(slot_load(load_E, order), places.num_ranks))) for order in (held, wanted)
            )
            if self._least_gain is not None and after > (1 - self._least_gain) * before:
                wanted, after = held, before
            self.imbalance.append((before, after))
            if (held == wanted).all():
                yield LayerMove(layer, {}, held)
            yield from layer_moves(layer, held, wanted)


def layer_moves(layer: int, held_S: np.ndarray, wanted_S: np.ndarray) -> Iterator[LayerMove]:
    """Writes that bring the experts of a layer from one order to another, at most `MOST` at once.

    An expert with other copies gives its slot up. The only copy of one changes places with the expert of a slot that
    wants it. Either brings a slot to its end and takes none away from it.
    """
    before, now = held_S.copy(), held_S.copy()
    while (wrong := np.flatnonzero(now != wanted_S)).size:
        slot = int(wrong[0])
        if np.count_nonzero(now == now[slot]) > 1:
            after = {slot: wanted_S[slot]}
        else:
            other = int(np.flatnonzero((wanted_S == now[slot]) & (now != wanted_S))[0])
            after = {other: now[slot], slot: now[other]}
        changed = {*np.flatnonzero(now != before).tolist(), *after}
        if len(changed) > MOST:
            yield _move(layer, before, now)
            before = now.copy()
        for place, expert in after.items():
            now[place] = expert
    if (now != before).any():
        yield _move(layer, before, now)


def _move(layer: int, before_S: np.ndarray, after_S: np.ndarray) -> LayerMove:
    slots = np.flatnonzero(before_S != after_S).tolist()
    sources = {slot: int(np.flatnonzero(before_S == after_S[slot])[0]) for slot in slots}
    return LayerMove(layer, sources, after_S.copy())


@functools.lru_cache(maxsize=64)
def _mover(layout: MeshLayout, specs: tuple[Any, ...]) -> Any:
    """Jitted: arrays whose first axis are slots, and where slots come from → the arrays. The old ones are given up."""
    ranks = Group.of(layout.rules).ranks

    def one(x: jax.Array, slots: jax.Array, sources: jax.Array, axes: Axes) -> jax.Array:
        first = jax.lax.axis_index(axes) * len(x) if axes else 0
        mine = (sources >= first) & (sources < first + len(x))
        bits = jax.lax.bitcast_convert_type(x, jnp.uint8) if x.dtype.itemsize == 1 else x  # no sums of 8-bit floats
        rows = jnp.take(bits, jnp.where(mine, sources - first, 0), axis=0)
        rows = jnp.where(mine.reshape(-1, *(1,) * (x.ndim - 1)), rows, jnp.zeros((), bits.dtype))
        rows = jax.lax.psum(rows, axes) if axes else rows  # of one device, and zeros of the others
        local = slots - first
        bits = bits.at[jnp.where((local >= 0) & (local < len(x)), local, len(x))].set(rows, mode="drop")
        return jax.lax.bitcast_convert_type(bits, x.dtype) if x.dtype.itemsize == 1 else bits

    def move(leaves: list[jax.Array], slots: jax.Array, sources: jax.Array) -> list[jax.Array]:
        axes = [entry_axes(spec[0]) if len(spec) else () for spec in specs]
        assert all(split in (ranks, ()) for split in axes), f"{axes}: split over {ranks}"
        return [one(x, slots, sources, split) for x, split in zip(leaves, axes, strict=True)]

    whole = jax.sharding.PartitionSpec()
    moved = jax.shard_map(
        move, mesh=layout.mesh, in_specs=(list(specs), whole, whole), out_specs=list(specs), check_vma=False
    )
    return jax.jit(moved, donate_argnums=(0,))
