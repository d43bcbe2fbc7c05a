"""Drafts and sampling options together: a verify step says what one token at a time would have said."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow_sampler import DRAWN, OPTIONS, token, weights

from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.sampling.sampler import record, sample
from stepjax.infer.sampling.state import Sampling, SlotSampling, assign
from stepjax.infer.steps.speculative import accepted

V, K = 14, 3
TOKENS = 12  # the output matrix has two padding rows
EOS = (10,)
LENGTH = 16
PROMPT = (1, 7, 7, 4)
# A model of its last two tokens: the same ones come again and again, so that penalties matter.
LOGITS = np.random.default_rng(3).normal(0, 1.5, (TOKENS, TOKENS, V)).astype(np.float32)


@functools.cache
def one_at_a_time(name: str, seed: int, temperature: float) -> tuple[int, ...]:
    """The answer by the slow twin."""
    params, output = OPTIONS[name].replace(seed=seed, temperature=temperature), []
    while len(output) < LENGTH + K + 1:
        *_, before, last = [*PROMPT, *output]
        position = len(PROMPT) + len(output)
        known = {"prompt": PROMPT, "output": output, "eos_ids": EOS, "num_tokens": TOKENS}
        output.append(token(LOGITS[before, last], params, position=position, **known))
    return tuple(output)


@jax.jit
def verify(sampling: Sampling, logits_BTV, position_BT, draft_BK):
    """What a decode step does after the model: tokens, how many of them count, and the state after."""
    token_BT = sample(logits_BTV, position_BT, sampling, num_tokens=TOKENS, draft_BK=draft_BK)
    count_B = 1 + accepted(token_BT, draft_BK)
    return token_BT, count_B, record(sampling, token_BT, count_B)


def in_steps(params: list[SamplingParams], answers: list[tuple[int, ...]], *, drafts: int) -> list[list[int]]:
    """All rows decoded together; of their drafts, 0 … all are right, which changes from step to step."""
    sampling = jax.tree.map(jnp.asarray, Sampling.empty(len(params), V))
    rows = [SlotSampling.rows(each, PROMPT, eos_ids=EOS, vocab=V)[0] for each in params]
    sampling = jax.jit(assign)(sampling, jnp.arange(len(rows)), SlotSampling.stack(rows, count=len(rows)))
    outputs: list[list[int]] = [[] for _ in params]
    step = 0
    while min(map(len, outputs)) < LENGTH:
        guesses, logits, position = [], [], []
        for at, output in enumerate(outputs):
            done = min(len(output), LENGTH)  # a row that is done goes on until all are
            guess = list(answers[at][done : done + drafts])
            right = (step + at) % (drafts + 1)
            guess[right:] = [(each + 1) % TOKENS for each in guess[right:]]
            text = [*PROMPT, *output[:done], *guess]
            places = range(len(PROMPT) + done, len(text) + 1)
            guesses.append(guess)
            logits.append([LOGITS[text[place - 2], text[place - 1]] for place in places])
            position.append(list(places))
        draft_BK = np.asarray(guesses, np.int32).reshape(len(params), drafts)
        tokens, counts, after = verify(sampling, np.asarray(logits), np.asarray(position, np.int32), draft_BK)
        live = jnp.asarray([len(output) < LENGTH for output in outputs])
        sampling = jax.tree.map(
            lambda new, old, live=live: jnp.where(live.reshape(-1, *(1,) * (new.ndim - 1)), new, old), after, sampling
        )
        for output, found, count in zip(outputs, np.asarray(tokens), np.asarray(counts), strict=True):
            if len(output) < LENGTH:
                output += found[:count].tolist()
        step += 1
    return [output[:LENGTH] for output in outputs]


@pytest.mark.parametrize("drafts", [0, K])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_with_drafts_gives_the_answer_of_one_token_at_a_time(name, drafts):
    """Six seeds and a greedy row together, each with other drafts right."""
    drawn = OPTIONS[name]
    ways = [*((seed, drawn.temperature) for seed in range(1, 7)), (7, 0.0)]
    answers = [one_at_a_time(name, *way) for way in ways]
    params = [drawn.replace(seed=seed, temperature=temperature) for seed, temperature in ways]
    assert in_steps(params, answers, drafts=drafts) == [list(answer[:LENGTH]) for answer in answers]


def test_the_options_matter_to_these_answers():
    """Else the test above would show nothing."""

    def answers(name: str) -> list[tuple[int, ...]]:
        return [one_at_a_time(name, seed, OPTIONS[name].temperature)[:LENGTH] for seed in range(1, 7)]

    assert [name for name in OPTIONS if answers(name) == answers("plain")] == ["plain"]


def p_value(observed: np.ndarray, expected: np.ndarray) -> float:
    """Of the chi-square test; what cannot come must not have come."""
    possible = expected > 0
    assert not observed[~possible].any()
    statistic = np.sum((observed - expected)[possible] ** 2 / expected[possible])
    return float(jax.scipy.special.gammaincc((possible.sum() - 1) / 2, statistic / 2))


@pytest.mark.parametrize("drafts", [0, K])
@pytest.mark.parametrize("name", ["plain", "filters", "repetition", "frequency", "bias", "min_tokens", "all"])
def test_tokens_of_many_seeds_follow_the_processed_distribution(name, drafts):
    """Of 4,000 seeds, in each row of a verify step. p > 0.001 of fixed seeds: it passes for good or never."""
    count, output = 4000, [3, 3, 8]
    draft = np.asarray([3, 5, 8][:drafts], np.int32)
    (row,) = SlotSampling.rows(OPTIONS[name], PROMPT, output, eos_ids=EOS, vocab=V)
    empty = jax.tree.map(jnp.asarray, Sampling.empty(1, V))
    one = assign(empty, jnp.zeros((1,), jnp.int32), SlotSampling.stack([row], count=1))
    many = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape[1:])), one)
    sampling = Sampling(
        many.temperature_B, many.top_p_B, many.top_k_B, many.min_p_B, jnp.arange(count, dtype=jnp.uint32), many.rules
    )
    logits = LOGITS[0, : 1 + drafts]
    position = len(PROMPT) + len(output) + np.arange(1 + drafts, dtype=np.int32)
    shape = (count, 1 + drafts)
    tokens, _, _ = verify(
        sampling,
        jnp.broadcast_to(logits, (*shape, V)),
        jnp.broadcast_to(position, shape),
        jnp.broadcast_to(draft, (count, drafts)),
    )
    for t in range(1 + drafts):
        known = {"prompt": PROMPT, "output": [*output, *draft[:t].tolist()], "eos_ids": EOS, "num_tokens": TOKENS}
        expected = count * weights(logits[t], OPTIONS[name], **known)
        observed = np.bincount(np.asarray(tokens)[:, t], minlength=V)
        assert p_value(observed, expected) > 1e-3


def test_a_draft_is_accepted_as_often_as_it_is_likely_and_a_miss_is_drawn_from_the_rest():
    """Rejection sampling's law for a proposal that is one token: P(d), and P without d where it was missed."""
    chance = weights(LOGITS[0, 0], DRAWN, num_tokens=TOKENS)
    count, guess = 4000, int(chance.argmax())
    params = [DRAWN.replace(seed=seed) for seed in range(count)]
    tokens, counts, _ = verify(
        Sampling.of(params),
        jnp.broadcast_to(LOGITS[0, :2], (count, 2, V)),
        jnp.broadcast_to(np.asarray([9, 10], np.int32), (count, 2)),
        jnp.full((count, 1), guess, jnp.int32),
    )
    first, took = np.asarray(tokens)[:, 0], np.asarray(counts) == 2
    chance = weights(LOGITS[0, 0], DRAWN, num_tokens=TOKENS)
    assert 100 < took.sum() < 3900
    assert (
        p_value(np.asarray([took.sum(), count - took.sum()]), count * np.asarray([chance[guess], 1 - chance[guess]]))
        > 1e-3
    )
    rest = np.where(np.arange(V) == guess, 0, chance)
    assert p_value(np.bincount(first[~took], minlength=V), (~took).sum() * rest / rest.sum()) > 1e-3
    after = weights(LOGITS[0, 1], DRAWN, num_tokens=TOKENS)
    assert p_value(np.bincount(np.asarray(tokens)[took, 1], minlength=V), took.sum() * after) > 1e-3
