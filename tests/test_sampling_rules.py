"""Penalties, bias, allowed ids and least length: against numpy, row by row, and with drafts as without."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_session

from stepjax.errors import RequestError
from stepjax.infer.engine import Engine
from stepjax.infer.engine_config import EngineConfig
from stepjax.infer.sampler import FEW, logprobs, process, record, sample
from stepjax.infer.sampling import REMOVED, Sampling, SamplingParams, SlotSampling, assign
from stepjax.infer.speculative import accepted

V, EOS = 48, (1, 2)
PLAIN = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, max_tokens=64)
OPTIONS = {
    "plain": {},
    "repetition": {"repetition_penalty": 1.7},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -1.2},
    "bias": {"logit_bias": {3: 4.0, 9: -100.0}},
    "allowed": {"allowed_ids": (3, 5, 8, 13, 21, 34)},
    "least length": {"min_tokens": 20, "stop_ids": (7, 11)},
    "all": {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.7,
        "logit_bias": {5: 2.0},
        "allowed_ids": tuple(range(1, 30)),
        "min_tokens": 10,
        "stop_ids": (7,),
    },
}
DRAWN = {"greedy": {}, "sampled": {"temperature": 1.2, "top_p": 0.9, "top_k": 12, "min_p": 0.01, "seed": 7}}
PROMPT, OUTPUT = [4, 4, 9, 15], [3, 3, 20]


def slots(rows: list[tuple[SamplingParams, list[int], list[int]]]) -> Sampling:
    """A `Sampling` with these rows, assigned one by one over what was there before."""
    sampling = jax.tree.map(jnp.asarray, Sampling.empty(len(rows), V))
    dirty = PLAIN.replace(logit_bias={6: 9.0}, repetition_penalty=3.0, min_tokens=5)
    for slot, (params, prompt, output) in enumerate(rows):
        for each in ((dirty, [1, 2, 3], [5]), (params, prompt, output)):
            row = SlotSampling.of(*each, eos_ids=EOS, vocab_size=V)
            sampling = assign(sampling, jnp.asarray(slot), jax.tree.map(jnp.asarray, row))
    return sampling


def drawn_logits(*shape: int) -> jax.Array:
    return jnp.asarray(3 * np.random.default_rng(0).standard_normal((*shape, V)), jnp.float32)


def by_hand(logits: np.ndarray, position: int, params: SamplingParams, prompt: list[int], output: list[int]):
    """The rules on one row of logits, token by token."""
    out = logits.astype(np.float64).copy()
    bias = dict(params.logit_bias)
    for token in range(V):
        out[token] += bias.get(token, 0.0)
        if params.allowed_ids and token not in params.allowed_ids:
            out[token] = -np.inf
        if position < len(prompt) + params.min_tokens and token in (*params.stop_ids, *EOS):
            out[token] = -np.inf
        count = output.count(token)
        if token in prompt or count:
            out[token] = (
                out[token] / params.repetition_penalty if out[token] > 0 else out[token] * params.repetition_penalty
            )
        out[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    return out


@pytest.mark.parametrize("name", OPTIONS)
def test_greedy_tokens_are_the_best_by_hand(name):
    """A verify step of four positions: each has seen the drafts before it."""
    params = PLAIN.replace(**OPTIONS[name])
    logits, drafts = drawn_logits(1, 4), [3, 30, 30]
    start = len(PROMPT) + len(OUTPUT)
    position = jnp.asarray([[start, start + 1, start + 2, start + 3]])
    found = sample(logits, position, slots([(params, PROMPT, OUTPUT)]), num_tokens=V, draft_BK=jnp.asarray([drafts]))
    for t in range(4):
        expected = by_hand(np.asarray(logits[0, t]), start + t, params, PROMPT, [*OUTPUT, *drafts[:t]])
        assert int(found[0, t]) == int(np.argmax(expected)), (name, t)


@pytest.mark.parametrize("draw", DRAWN)
@pytest.mark.parametrize("name", OPTIONS)
def test_no_row_depends_on_its_neighbours(name, draw):
    """Alone, what nobody asks for is left out; in company it is applied to all, and must change nothing."""
    params = PLAIN.replace(**OPTIONS[name], **DRAWN[draw])
    logits, position = drawn_logits(len(OPTIONS) + 1, 2), jnp.full((len(OPTIONS) + 1, 2), 9)
    others = [PLAIN.replace(**each, temperature=0.7, seed=at) for at, each in enumerate(OPTIONS.values())]
    together = slots([(each, PROMPT, OUTPUT) for each in [params, *others]])
    drafts = jnp.asarray(np.random.default_rng(1).integers(0, V, (len(OPTIONS) + 1, 1)))
    company = sample(logits, position, together, num_tokens=V, draft_BK=drafts)
    alone = sample(logits[:1], position[:1], slots([(params, PROMPT, OUTPUT)]), num_tokens=V, draft_BK=drafts[:1])
    np.testing.assert_array_equal(company[0], alone[0])


@pytest.mark.parametrize("draw", DRAWN)
@pytest.mark.parametrize("name", OPTIONS)
def test_verified_tokens_are_those_drawn_one_by_one(name, draw):
    """Drafts that are right, wrong and partly right, from logits that depend on the position only."""
    params = PLAIN.replace(**OPTIONS[name], **DRAWN[draw])
    logits, start = drawn_logits(1, 24), len(PROMPT)
    one, step = slots([(params, PROMPT, [])]), jax.jit(lambda *a: sample(*a, num_tokens=V))
    expected: list[int] = []
    for t in range(24):
        token = step(logits[:, t : t + 1], jnp.asarray([[start + t]]), one)
        one = record(one, token, jnp.asarray([1]))
        expected.append(int(token[0, 0]))
    several, found = slots([(params, PROMPT, [])]), []
    verify = jax.jit(lambda *a: sample(*a[:3], num_tokens=V, draft_BK=a[3]))
    rights = iter([3, 0, 2, 1] * 9)
    while len(found) + 4 <= 24:
        at = len(found)
        drafts = np.asarray([expected[at : at + 3]])
        drafts[0, next(rights) :] += 1
        drafts %= V
        token = verify(logits[:, at : at + 4], start + at + jnp.arange(4)[None, :], several, jnp.asarray(drafts))
        count = 1 + accepted(token, jnp.asarray(drafts))
        several = record(several, token, count)
        found += np.asarray(token)[0, : int(count[0])].tolist()
    assert found == expected[: len(found)]


def test_record_counts_what_was_emitted_in_the_slots_that_are_meant():
    sampling = jax.tree.map(jnp.asarray, Sampling.empty(3, V))
    tokens = jnp.asarray([[5, 5, 6], [7, 8, 9]])
    after = record(sampling, tokens, jnp.asarray([2, 0]), slot_B=jnp.asarray([2, 1]))
    assert after.rules is not None
    assert jnp.argwhere(after.rules.count_BV).tolist() == [[2, 5]]
    assert int(after.rules.count_BV[2, 5]) == 2
    nowhere = record(sampling, tokens, jnp.asarray([3, 3]), slot_B=jnp.asarray([3, 3]))
    assert nowhere.rules is not None
    assert not nowhere.rules.count_BV.any()


def test_a_small_top_k_is_found_as_by_sorting():
    """The likeliest few without a sort, and the whole order: the same tokens are kept."""
    logits = drawn_logits(200, 1).at[:, :, 4].set(2.5).at[:, :, 5].set(2.5)  # ties among them
    wide = jnp.pad(logits, [(0, 0), (0, 0), (0, 100)], constant_values=REMOVED)
    few = Sampling.of([PLAIN.replace(temperature=1.0, top_k=8, top_p=0.8, min_p=0.02)] * 200)
    assert wide.shape[-1] > FEW
    kept = process(wide, few) > REMOVED
    ordered = np.sort(np.asarray(wide), axis=-1)[..., ::-1]
    for row in range(200):
        values = ordered[row, 0, :8].astype(np.float64)
        probs = np.exp(values - values.max()) / np.exp(values - values.max()).sum()
        before = np.cumsum(probs) - probs
        count = int(((before < 0.8) & (probs >= 0.02 * probs[0])).sum())
        lowest = values[count - 1]
        np.testing.assert_array_equal(kept[row, 0], np.asarray(wide[row, 0]) >= lowest)


def test_log_probabilities_are_of_the_model_alone():
    logits = drawn_logits(2, 3)
    token = jnp.asarray([[3, 4, 5], [6, 7, 8]])
    found = logprobs(logits, token, top=4)
    expected = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    np.testing.assert_allclose(
        found.token_BT, np.take_along_axis(expected, np.asarray(token)[..., None], -1)[..., 0], atol=1e-6
    )
    np.testing.assert_allclose(found.top_BTN, np.sort(expected, axis=-1)[..., ::-1][..., :4], atol=1e-6)
    np.testing.assert_array_equal(found.top_id_BTN, np.argsort(-expected, axis=-1, kind="stable")[..., :4])


def test_drawn_tokens_follow_the_processed_distribution_with_and_without_drafts():
    """Chi-square over 6,000 seeds; the second token is drawn after a draft, right or wrong."""
    size, seeds = 10, 6000
    logits = jnp.broadcast_to(drawn_logits(1, 2)[..., :size] / 2, (seeds, 2, size))
    params = PLAIN.replace(temperature=0.9, top_k=7, top_p=0.95)
    sampling = replace(Sampling.of([params] * seeds), seed_B=np.arange(seeds, dtype=np.uint32))
    position = jnp.broadcast_to(jnp.asarray([[5, 6]]), (seeds, 2))
    expected = np.asarray(jax.nn.softmax(process(logits[:1], Sampling.of([params])), axis=-1))[0]
    target = np.asarray(sample(logits, position, sampling, num_tokens=size))
    draft = np.argmax(expected[0])
    passed = target[:, 0] == draft
    assert abs(passed.mean() - expected[0, draft]) < 4 * np.sqrt(0.25 / seeds)  # accepted as often as it is likely
    for column, rows in ((0, slice(None)), (1, passed), (1, ~passed)):
        drawn = target[rows, column]
        counts, wanted = np.bincount(drawn, minlength=size), expected[column] * len(drawn)
        assert not counts[wanted == 0].any()
        live = wanted > 0
        statistic = float(((counts[live] - wanted[live]) ** 2 / wanted[live]).sum())
        degrees = int(live.sum()) - 1
        assert statistic < degrees + 4.5 * np.sqrt(2 * degrees), (column, statistic)  # p about 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"min_tokens": 65}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"n": 9}, "n: is 9"),
        ({"logit_bias": {3: 101}}, "logit_bias"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "at most 1024"),
        ({"stop_ids": tuple(range(17))}, "at most 16"),
    ],
)
def test_values_out_of_range_are_refused(changes, message):
    with pytest.raises(RequestError, match=message):
        PLAIN.replace(**changes)


@pytest.mark.parametrize("changes", [{"stop_ids": (V,)}, {"allowed_ids": (-1,)}, {"logit_bias": {V: 1.0}}])
def test_ids_outside_the_vocabulary_are_refused(changes):
    with pytest.raises(RequestError, match="token"):
        PLAIN.replace(**changes).check(V)


def test_only_an_engine_applies_rules():
    with pytest.raises(RequestError, match="engine"):
        Sampling.of([PLAIN.replace(presence_penalty=1.0)])


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_with_drafts_is_as_without(name):
    """Through the engine, two at a time: greedy and sampled."""
    session = tiny_session()
    prompt = np.random.default_rng(3).integers(8, 128, 12).tolist()
    found = []
    for speculate in (0, 3):
        config = EngineConfig(
            num_slots=2, context=64, page_size=8, widths=(16,), token_budget=32, speculate=speculate, num_snapshots=0
        )
        engine = Engine(session, config)
        tokens: dict[str, list[int]] = {draw: [] for draw in DRAWN}
        for draw, changes in DRAWN.items():
            params = PLAIN.replace(**OPTIONS[name], **changes, max_tokens=30, logprobs=2)
            engine.add(prompt, params, id=draw)
        for update in engine.run():
            tokens[update.id] += update.tokens
            assert len(update.scores) == len(update.tokens)
        found.append(tokens)
    assert found[0] == found[1]
    if OPTIONS[name].get("allowed_ids"):
        assert all(set(each) <= {*OPTIONS[name]["allowed_ids"]} for each in found[0].values())
