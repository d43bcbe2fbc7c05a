"""The slow twin of sampling: one token of one request, in numpy, one option after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax
import numpy as np

from stepjax.infer.sampling.params import SamplingParams

DRAWN = SamplingParams(temperature=1.3, top_k=0, top_p=1.0, seed=5)
OPTIONS = {
    "plain": DRAWN,
    "cold": DRAWN.replace(temperature=0.4),
    "top_k": DRAWN.replace(top_k=4),
    "top_p": DRAWN.replace(top_p=0.7),
    "min_p": DRAWN.replace(min_p=0.2),
    "filters": DRAWN.replace(top_k=7, top_p=0.9, min_p=0.05),
    "repetition": DRAWN.replace(repetition_penalty=2.5),
    "repetition_below_1": DRAWN.replace(repetition_penalty=0.5),
    "presence": DRAWN.replace(presence_penalty=1.7),
    "frequency": DRAWN.replace(frequency_penalty=0.9),
    "rewards": DRAWN.replace(presence_penalty=-0.7, frequency_penalty=-0.4),
    "bias": DRAWN.replace(logit_bias={3: 2.5, 0: -100.0, 9: 1.0}),
    "allowed": DRAWN.replace(allowed_ids=(1, 2, 5, 8, 11)),
    "allowed_bias": DRAWN.replace(allowed_ids=(2, 5, 8), logit_bias={2: -1.0, 3: 100.0}),
    "min_tokens": DRAWN.replace(min_tokens=7, stop_ids=(4, 6)),
    "ignore_eos": DRAWN.replace(min_tokens=7, stop_ids=(4,), ignore_eos=True),
    "all": DRAWN.replace(
        temperature=1.8,
        top_k=6,
        top_p=0.95,
        min_p=0.02,
        repetition_penalty=1.4,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        logit_bias={3: 1.5, 7: -2.0},
        allowed_ids=(0, 1, 2, 3, 4, 5, 7, 8, 10),
        min_tokens=6,
        stop_ids=(4,),
    ),
}


def weights(
    logits: np.ndarray,
    params: SamplingParams,
    *,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    eos_ids: Iterable[int] = (),
    num_tokens: int | None = None,
) -> np.ndarray:
    """Probabilities of the next token: float64 [V]."""
    size = len(logits)
    scores = logits.astype(np.float64)
    removed = set(range(num_tokens or size, size))
    for token, bias in dict(params.logit_bias).items():
        scores[token] += bias
    if params.allowed_ids:
        removed |= set(range(size)) - set(params.allowed_ids)
    if len(output) < params.min_tokens:
        removed |= {*params.stop_ids, *(() if params.ignore_eos else eos_ids)}
    for token in {*prompt, *output}:
        factor = params.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token in set(output):
        scores[token] -= params.presence_penalty + params.frequency_penalty * list(output).count(token)
    scores[list(removed)] = -np.inf
    if params.temperature == 0:
        return np.eye(size)[scores.argmax()]
    scores /= params.temperature
    probs = np.exp(scores - scores.max())
    if params.top_k:
        probs[probs < np.sort(probs)[::-1][min(params.top_k, size) - 1]] = 0
    probs /= probs.sum()
    mass, kept = 0.0, []
    for token in np.argsort(-probs, kind="stable"):
        if mass >= params.top_p and kept:
            break
        kept.append(token)
        mass += probs[token]
    kept = [token for token in kept if probs[token] >= params.min_p * probs.max()]
    chosen = np.zeros(size)
    chosen[kept] = probs[kept]
    return chosen / chosen.sum()


def token(logits: np.ndarray, params: SamplingParams, *, position: int, **known) -> int:
    """The token itself: the noise of its seed and position on the logarithms of `weights`."""
    key = jax.random.fold_in(jax.random.key(params.seed), position)
    noise = np.asarray(jax.random.gumbel(key, logits.shape, np.float32))
    with np.errstate(divide="ignore"):
        scores = np.log(weights(logits, params, **known))
    return int(np.argmax(scores + noise))
