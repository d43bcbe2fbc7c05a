"""The experts that the tokens of a sequence went through, gathered from the steps that ran them."""

from __future__ import annotations

import numpy as np

NO_EXPERT = 0xFFFF  # of a token that was not run; no router has so many experts


class Routing:
    """One sequence's. A token that is run again, after a preemption or in a later turn, keeps its first experts: the
    token behind it was sampled with those.
    """

    def __init__(self) -> None:
        self._ids: np.ndarray | None = None  # uint16 [room, L, A]

    def take(self, start: int, ids_TLA: np.ndarray) -> None:
        """Experts of the tokens from ``start`` on; `NO_EXPERT` says nothing."""
        end = start + len(ids_TLA)
        room = np.empty((0, *ids_TLA.shape[1:]), np.uint16) if self._ids is None else self._ids
        if end > len(room):
            more = np.full((2 * end - len(room), *ids_TLA.shape[1:]), NO_EXPERT, np.uint16)
            room = self._ids = np.concatenate([room, more])
        held = room[start:end]
        np.copyto(held, ids_TLA, where=held == NO_EXPERT)

    def first(self, num_tokens: int) -> np.ndarray | None:
        """Of the first so many tokens, uint16 [tokens, MoE layers, A]; None if none was run."""
        return None if self._ids is None else self._ids[:num_tokens].copy()
