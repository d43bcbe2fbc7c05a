"""How far two checkpoints of one model are from each other, on given tokens: the certificate of a quantised one.

KL is that of the other's next-token distribution to ours, in nats, at every position. Router agreement is the share of
the experts that the other's router chose which ours chose too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepjax.errors import RequestError
from stepjax.weights.finite import not_finite
from stepjax.whole_file import writing

_ROWS = 256  # of logits that are compared at a time


@dataclass(frozen=True)
class SequenceScores:
    """What a model makes of one sequence of T tokens."""

    ids: np.ndarray  # int32 [T]
    logits: np.ndarray  # float32 [T, V]
    experts: np.ndarray  # int32 [T, L, A]: choices of each MoE layer's router


def certificate(
    ours: Sequence[SequenceScores], other: Sequence[SequenceScores], *, layers: Sequence[int]
) -> dict[str, Any]:
    """The distance of ours to the other, over all sequences, in JSON's terms.

    Args:
      layers: index of each MoE layer.

    Raises:
      RequestError: logits are not finite, or the sequences hold no position.
    """
    kl, same_top, losses, agreement = [], [], [], []
    for mine, theirs in zip(ours, other, strict=True):
        if name := not_finite({"ours": mine.logits, "the other's": theirs.logits}):
            raise RequestError(f"--against: {name} logits are not finite, so that no distance is defined")
        for start in range(0, len(mine.ids), _ROWS):
            rows = slice(start, start + _ROWS)
            p, q = (log_softmax(scores.logits[rows]) for scores in (theirs, mine))
            kl.append((np.exp(p) * (p - q)).sum(axis=-1))
            same_top.append(p.argmax(axis=-1) == q.argmax(axis=-1))
            following = mine.ids[start + 1 : start + 1 + _ROWS]
            index = np.arange(len(following)), following
            losses.append(np.stack([-q[index], -p[index]], axis=-1))
        agreement.append(overlap(mine.experts, theirs.experts))
    distances = np.concatenate(kl) if kl else np.zeros(0)
    if not len(distances):
        raise RequestError("--against: the sequences hold no token to compare")
    loss = np.concatenate(losses)
    gain = loss[:, 0] - loss[:, 1]
    by_layer = np.concatenate(agreement).mean(axis=0)
    return {
        "tokens": len(distances),
        "kl": {
            "mean": float(distances.mean()),
            "p99": float(np.quantile(distances, 0.99)),
            "max": float(distances.max()),
        },
        "same_top": float(np.concatenate(same_top).mean()),
        "perplexity": {"ours": _perplexity(loss[:, 0]), "other": _perplexity(loss[:, 1])},
        "loss_difference": {
            "mean": float(gain.mean()) if len(gain) else None,
            "standard_error": float(gain.std(ddof=1) / math.sqrt(len(gain))) if len(gain) > 1 else None,
        },
        "router_agreement": {
            "mean": float(by_layer.mean()) if len(by_layer) else None,
            "layers": {str(layer): float(share) for layer, share in zip(layers, by_layer, strict=True)},
        },
    }


def write_certificate(path: Path, found: Mapping[str, Any]) -> None:
    """One JSON file.

    Raises:
      RequestError: it cannot be written.
    """
    with writing(path):
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def overlap(ours: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Share of the other's choices [T, L, A] that are among ours: float64 [T, L]."""
    return (other[..., :, None] == ours[..., None, :]).any(axis=-1).mean(axis=-1)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of float32 [T, V], in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _perplexity(losses: np.ndarray) -> float | None:
    return float(np.exp(losses.mean())) if len(losses) else None
