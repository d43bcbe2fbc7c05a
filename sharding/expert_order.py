"""How evenly routing loads the ranks of an expert group, and an order of the experts that evens it out.

Shapes are static and every device waits for the fullest one, so a step takes as long as its busiest rank. Which experts
are busy is a property of the model and its prompts. Measured once (`stepjax.ops.experts.expert_load`), it gives an
order in which ranks that hold consecutive experts are loaded alike. Relabelling costs nothing at run time.
"""

from __future__ import annotations

import numpy as np

from stepjax.errors import MeshError


def rank_load(load_E: np.ndarray, num_ranks: int) -> np.ndarray:
    """Assignments of each rank, [..., E] → [..., num_ranks]; rank r holds the r-th of equal runs of experts.

    Raises:
      MeshError: the experts do not divide.
    """
    *lead, num_experts = load_E.shape
    if num_experts % num_ranks:
        raise MeshError(f"{num_experts} experts cannot be held by {num_ranks} ranks, expected a divisor")
    return load_E.reshape(*lead, num_ranks, num_experts // num_ranks).sum(axis=-1)


def imbalance(load: np.ndarray) -> np.ndarray:
    """Largest over mean of the last axis: how many times longer than an even split its fullest entry takes.

    Where there is no load it is 1.
    """
    mean = load.mean(axis=-1)
    return np.where(mean > 0, load.max(axis=-1) / np.where(mean > 0, mean, 1), 1.0)


def balanced_order(load_E: np.ndarray, num_ranks: int) -> np.ndarray:
    """An order of the experts under which the ranks are loaded as evenly as a greedy choice makes them.

    Row j of the weights that are held is row ``order[j]`` of those that are stored, in ``experts.gate``, ``.up`` and
    ``.down`` and in ``router.weight`` and ``.bias`` alike; expert id j of the reordered model is ``order[j]``.

    Args:
      load_E: assignments of each expert, [E], or [L, E] for an order per layer.

    Returns:
      A permutation of the same shape, int64. It is never worse than the stored order, which it is if no gain is found.
    """
    if load_E.ndim > 1:
        return np.stack([balanced_order(layer_E, num_ranks) for layer_E in load_E])
    stored = np.arange(load_E.size)
    greedy = _greedy(load_E, num_ranks)
    before, after = (rank_load(load_E[order], num_ranks).max() for order in (stored, greedy))
    return greedy if after < before else stored


def replicated_order(load_E: np.ndarray, num_ranks: int, slots: int) -> np.ndarray:
    """Which expert each of ``slots`` slots holds, [E] → [S] or [L, E] → [L, S]: the busiest experts more than once.

    As DeepSeek's EPLB does without groups: again and again one more copy of the expert with the largest load a copy,
    then the copies to ranks, heaviest first, each to the lightest rank with room, and of those to one without the
    expert. A router that still numbers experts finds their slots in `copy_table`.

    Raises:
      MeshError: there are fewer slots than experts, or the ranks do not divide them.
    """
    if load_E.ndim > 1:
        return np.stack([replicated_order(layer_E, num_ranks, slots) for layer_E in load_E])
    num_experts = load_E.size
    if slots < num_experts or slots % num_ranks:
        least = num_ranks * -(-num_experts // num_ranks)
        raise MeshError(
            f"expert slots: {slots} for {num_experts} experts on {num_ranks} ranks, expected a multiple of {num_ranks} "
            f"from {least} on"
        )
    copies = np.ones(num_experts, np.int64)
    for _ in range(slots - num_experts):
        copies[np.argmax(load_E / copies)] += 1
    share, room = load_E / copies, slots // num_ranks
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    total = np.zeros(num_ranks)
    for expert in np.argsort(-share, kind="stable"):
        for _ in range(copies[expert]):
            open_ranks = [rank for rank in range(num_ranks) if len(held[rank]) < room]
            rank = min(open_ranks, key=lambda rank: (expert in held[rank], total[rank]))
            held[rank].append(int(expert))
            total[rank] += share[expert]
    return np.array([expert for experts in held for expert in sorted(experts)])


def slot_load(load_E: np.ndarray, order_S: np.ndarray) -> np.ndarray:
    """Assignments of each slot, float64 [S], if slot s holds expert ``order[s]`` and copies share what they get."""
    return (load_E / np.bincount(order_S, minlength=load_E.size))[order_S]


def copy_table(order_S: np.ndarray, num_experts: int) -> np.ndarray:
    """The number of copies of each expert and then their slots, int32 [E, 2 + S − E]; places without a copy are 0."""
    table = np.zeros((num_experts, 2 + order_S.size - num_experts), np.int32)
    for slot, expert in enumerate(order_S):
        table[expert, 0] += 1
        table[expert, table[expert, 0]] = slot
    return table


def slot_experts(table: np.ndarray, slots: int) -> np.ndarray:
    """The expert in each slot, int64 [S]: the order that `copy_table` was made of."""
    order = np.zeros(slots, np.int64)
    for expert, (count, *places) in enumerate(table):
        order[places[:count]] = expert
    return order


def _greedy(load_E: np.ndarray, num_ranks: int) -> np.ndarray:
    """Heaviest expert first, each to the lightest rank with room; among equals the lowest expert and rank."""
    room = load_E.size // num_ranks
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    total = rank_load(np.zeros_like(load_E), num_ranks)
    for expert in np.argsort(-load_E, kind="stable"):
        rank = min((r for r in range(num_ranks) if len(held[r]) < room), key=lambda r: total[r])
        held[rank].append(int(expert))
        total[rank] += load_E[expert]
    return np.array([expert for experts in held for expert in sorted(experts)])
