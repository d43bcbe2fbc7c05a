"""Objectives of rewards against their papers' formulas in float64, value and gradient, alone and in the real update."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow_policy import Answer, Terms, gradient, loss_of_batch
from tuning import SHORT, answers, changed, update_of

from stepjax.adapters.lora import LoraConfig, attach
from stepjax.errors import ConfigError
from stepjax.model.step3p5 import bind
from stepjax.train.config.tune import TuneConfig
from stepjax.train.losses.logprobs import TokenScores, token_scores
from stepjax.train.losses.policy_gradient import differing, group_advantages
from stepjax.train.objectives.objective import LossSettings, TokenInputs
from stepjax.train.objectives.table import ABSENT, OBJECTIVES
from stepjax.train.packing.rows import pack_sequences, packed_chunk
from stepjax.train.rollouts.sampler import Rollout
from stepjax.train.teachers.scoring import answer_weights
from stepjax.train.tune.setup import Setup, open_run

LONGEST = SHORT.rollout.max_tokens

# Settings → the formula. Each bound is met by some tokens of `packed` and by some answers.
CASES = [
    (LossSettings("grpo"), Terms("ppo")),
    (LossSettings("grpo", clip_low=0.2, clip_high=0.28, average="answers"), Terms("ppo", 0.8, 1.28, "answers")),
    (LossSettings("grpo", clip_low=0.1), Terms("ppo", 0.9)),
    (LossSettings("grpo", filter="tis", cap=1.2, clip_high=0.5), Terms("ppo", high=1.5, cap=1.2)),
    (
        LossSettings("grpo", filter="icepop", token_low=0.8, token_high=1.4, average="constant"),
        Terms("ppo", average="constant", longest=LONGEST, inside=(0.8, 1.4)),
    ),
    (LossSettings("grpo", teacher_weight=0.7), Terms("ppo", teacher_weight=0.7)),
    (LossSettings("grpo", reference_kl=0.3, kl_estimator="k1"), Terms("ppo", beta=0.3, estimator="k1")),
    (LossSettings("grpo", reference_kl=0.3, kl_estimator="k2"), Terms("ppo", beta=0.3, estimator="k2")),
    (
        LossSettings("dr_grpo", reference_kl=0.3, clip_high=0.2),
        Terms("ppo", high=1.2, average="constant", longest=LONGEST, beta=0.3),
    ),
    (LossSettings("gspo", clip_low=0.05, clip_high=0.02), Terms("gspo", 0.95, 1.02, "answers")),
    (LossSettings("gspo"), Terms("gspo", 1 - 3e-4, 1 + 4e-4, "answers")),
    (LossSettings("cispo", clip_high=0.1), Terms("cispo", high=1.1)),
    (LossSettings("cispo", clip_low=0.1, reference_kl=0.1), Terms("cispo", 0.9, 5.0, beta=0.1)),
    (
        LossSettings("mispo", token_low=0.7, token_high=1.5, sequence_low=0.9, sequence_high=1.1, average="answers"),
        Terms("mispo", average="answers", inside=(0.7, 1.5), means=(0.9, 1.1)),
    ),
]
IDS = [f"{at} {settings.objective}" for at, (settings, _) in enumerate(CASES)]


COUNTS = [[3, 5, 2], [7, 1]]  # tokens of the answers, which are packed into two rows of 12


@pytest.mark.parametrize(("settings", "terms"), CASES, ids=IDS)
def test_losses_and_gradients_of_tokens_are_those_of_the_papers(settings, terms):
    """1e-5: float32 against float64, of losses of size 1. Central differences have an error of 1e-9."""
    rng = np.random.default_rng(5)
    flat = [count for row in COUNTS for count in row]
    pi = [-rng.uniform(0.2, 2.0, count) for count in flat]
    examples = [
        Answer(
            values - rng.normal(0, 0.25) + rng.normal(0, 0.15, len(values)),
            values + rng.normal(0, 0.4, len(values)),
            values + rng.normal(0, 0.4, len(values)),
            advantage,
        )
        for values, advantage in zip(pi, (1.0, -0.5, 0.3, -1.2, 0.8), strict=True)
    ]
    objective = OBJECTIVES[settings.objective]
    factors = answer_weights(flat, objective.averaging(settings), longest=LONGEST)
    factors = np.ones(len(flat)) if factors is None else factors

    def row_of(values: list[np.ndarray]) -> jnp.ndarray:
        packed, at = np.zeros((2, 12), np.float32), 0
        for row, counts in enumerate(COUNTS):
            start = 1  # positions of a prompt are not in the mask
            for count in counts:
                packed[row, start : start + count], at, start = values[at], at + 1, start + count
        return jnp.asarray(packed)

    numbers = [np.full(len(values), 1.0 + at % 3) for at, values in enumerate(pi)]
    mask = row_of([np.ones(count) for count in flat]) > 0
    zero = jnp.zeros((2, 12))
    weight = row_of([np.full(count, factor) for count, factor in zip(flat, factors, strict=True)])

    def loss(logprob: jax.Array) -> jax.Array:
        tokens = objective.token_loss(
            TokenInputs(
                TokenScores(logprob, zero, zero, zero),
                row_of([each.mu for each in examples]),
                row_of([np.full(len(each.mu), each.advantage) for each in examples]),
                row_of([each.teacher for each in examples]),
                mask,
                row_of(numbers).astype(jnp.int32),
                row_of([each.reference for each in examples]),
            ),
            settings,
        )
        return jnp.sum(jnp.where(mask, tokens.loss * weight, 0.0)) / sum(flat)

    value, slope = jax.value_and_grad(loss)(row_of(pi))
    np.testing.assert_allclose(value, loss_of_batch(examples, pi, pi, terms), atol=1e-5)
    np.testing.assert_allclose(slope, row_of(gradient(examples, pi, terms)), atol=1e-5)


def test_every_objective_with_rewards_has_a_case():
    """Every objective with rewards has a case."""
    assert {settings.objective for settings, _ in CASES} == {n for n, each in OBJECTIVES.items() if each.rewarded}


def test_entropy_has_the_gradient_that_is_asked_for():
    """d/dz H = −π·(log π + H), in float64; without the flag it is 0."""
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(1, 5, 4)), rng.normal(size=(7, 4))

    def entropy(x: jax.Array, wanted: bool) -> jax.Array:
        label = jnp.zeros((1, 5), jnp.int32)
        scores = token_scores(
            x, label, lambda h: h @ jnp.asarray(head.T, jnp.float32), num_tokens=6, entropy_gradient=wanted, chunk=2
        )
        return jnp.sum(scores.entropy)

    logits = (hidden @ head.T)[..., :6]
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    pi = np.exp(logs)
    total = -(pi * logs).sum(-1, keepdims=True)
    for wanted, expected in ((True, -(pi * (logs + total)) @ head[:6]), (False, np.zeros_like(hidden))):
        value, slope = jax.value_and_grad(entropy)(jnp.asarray(hidden, jnp.float32), wanted)
        np.testing.assert_allclose(value, total.sum(), rtol=1e-5)
        np.testing.assert_allclose(slope, expected, atol=1e-5)


def test_answers_without_a_reward_are_left_out_of_the_baseline():
    rewards, groups = np.asarray([1.0, np.nan, 0.0, np.nan, np.nan, 2.0]), np.asarray([0, 0, 0, 1, 1, 2])
    found = group_advantages(rewards, groups, scaled=False)
    np.testing.assert_array_equal(found, np.asarray([0.5, np.nan, -0.5, np.nan, np.nan, 0.0], np.float32))
    np.testing.assert_array_equal(differing(rewards, groups), [True, True, True, False, False, False])
    tenths = np.asarray([0.1, 0.1, 0.1])  # whose deviation is rounding and not 0
    assert not differing(tenths, np.zeros(3, int)).any()


# --- what is refused


def rewarded(**loss: Any) -> TuneConfig:
    pairs = changed(SHORT, rollout={"samples": 2})
    return dataclasses.replace(pairs, teachers={}, verb="rl", loss=LossSettings(**loss))


@pytest.mark.parametrize("name", ABSENT)
def test_objectives_of_elsewhere_are_refused_with_what_to_use(name):
    with pytest.raises(ConfigError, match=rf"loss\.objective: {name} (learns|trains|is) "):
        rewarded(objective=name)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"objective": "gspo", "average": "tokens", "filter": "tis"}, "filter: is 'tis', but gspo does not use it"),
        ({"objective": "gspo", "teacher_weight": 1.0}, "teacher_weight: is 1.0, but gspo does not use it"),
        ({"objective": "dr_grpo", "scaled": False}, "scaled: is False, but dr_grpo does not use it"),
        ({"objective": "dr_grpo", "average": "answers"}, "average: is 'answers', but dr_grpo does not use it"),
        ({"objective": "mispo", "clip_high": 0.2}, "clip_high: is 0.2, but mispo does not use it"),
        ({"objective": "grpo", "divergence": "jsd"}, "divergence: is 'jsd', but grpo does not use it"),
        ({"objective": "grpo", "cap": 3.0}, "cap: is 3.0, but has an effect only where loss.filter is 'tis'"),
        (
            {"objective": "grpo", "kl_estimator": "k1"},
            "kl_estimator: is 'k1', but has no effect while",
        ),
        ({"objective": "grpo", "discount": 0.5}, "discount: is 0.5, but has no effect while loss.teacher_weight is 0"),
        ({"objective": "grpo", "reference_kl": -1.0}, "loss.reference_kl: is -1.0"),
        ({"objective": "grpo", "clip_low": 1.5}, "loss.clip_low: is 1.5"),
        ({"objective": "grpo", "entropy_bonus": float("nan")}, "loss.entropy_bonus: is nan"),
    ],
)
def test_settings_without_an_effect_are_refused(loss, message):
    with pytest.raises(ConfigError, match=message):
        rewarded(**loss)


# --- the real update


@pytest.fixture(scope="module")
def rated() -> list[Rollout]:
    """Answers of the untrained student in two groups, whose sampler is said to differ from it."""
    rng = np.random.default_rng(3)
    sampled = answers(open_run(SHORT))
    for at, (rollout, reward) in enumerate(zip(sampled, (1.0, 0.0, 0.25, 0.5), strict=True)):
        rollout.reward, rollout.group = reward, at // 2
        rollout.logprobs = [value + rng.normal(0, 0.3) for value in rollout.logprobs]
    return sampled


def leaves_of(setup: Setup) -> dict[str, jax.Array]:
    """Leaves with which the policy is not the base."""
    rng = np.random.default_rng(1)
    return {
        name: leaf + jnp.asarray(rng.normal(0, 0.05 if name.endswith(".b") else 0.0, leaf.shape), jnp.float32)
        for name, leaf in sorted(setup.initial.leaves.items())
    }


def unpacked(setup: Setup, rollouts: list[Rollout]) -> tuple[Any, Any]:
    """Functions of the leaves: log-probabilities of all answers' tokens, each from its own segment, and of the base."""
    lora = LoraConfig(**setup.trained.about["lora"])
    packed = pack_sequences([()] * 4, [(*each.prompt.ids, *each.ids) for each in rollouts], rows=4, length=96)
    rows = jax.tree.map(lambda x: jnp.asarray(x[0]), packed.rows)
    size = len(setup.base.tokenizer or ())

    def logprobs(params: Any) -> list[jax.Array]:
        model = bind(setup.base.model, params)
        logs = jax.nn.log_softmax(model.logits(model.forward(rows.ids, packed_chunk(rows)).hidden_BTD)[..., :size])
        picked = jnp.take_along_axis(logs, jnp.roll(rows.ids, -1, axis=1)[..., None], axis=-1)[..., 0]
        return [
            picked[row, first + len(each.prompt.ids) - 1 : first + len(each.prompt.ids) + len(each.ids) - 1]
            for (row, first), each in zip(packed.places, rollouts, strict=True)
        ]

    return lambda leaves: logprobs(attach(setup.base.params, leaves, lora)), logprobs(setup.base.params)


STEP_CASES = [pytest.param(at, "", id=IDS[at]) for at in (1, 7, 8, 9, 12, 13)] + [
    pytest.param(at, "data=2,expert=2,tensor=2", id=f"{IDS[at]} on a mesh") for at in (7, 9)
]


@pytest.mark.slow  # the losses of tokens, above, are those of every objective
@pytest.mark.parametrize(("at", "mesh"), STEP_CASES)
def test_the_update_has_the_gradient_of_the_formula(rated, at, mesh):
    """The chain rule by hand: the formula's slopes in float64, through a forward pass of its own.

    1e-4 of the gradient's norm: float32 products in another order. The loss and its terms are compared too.
    """
    settings, terms = CASES[at]
    config = rewarded(**dataclasses.asdict(settings))
    setup = open_run(changed(config, model={"mesh": mesh}))
    one = setup if not mesh else open_run(config)
    leaves = leaves_of(one)
    run, base = unpacked(one, rated)
    pi, back = jax.vjp(run, leaves)
    rewards, groups = np.asarray([r.reward for r in rated]), np.asarray([r.group for r in rated])
    scaled = settings.objective != "dr_grpo"
    examples = [
        Answer(np.asarray(rollout.logprobs), np.asarray(reference, np.float64), np.zeros(len(rollout.ids)), advantage)
        for rollout, reference, advantage in zip(
            rated, base, group_advantages(rewards, groups, scaled=scaled), strict=True
        )
    ]
    doubles = [np.asarray(values, np.float64) for values in pi]
    slopes = gradient(examples, doubles, terms)
    (expected,) = back([jnp.asarray(slope, jnp.float32) for slope in slopes])
    norm = float(np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in expected.values())))
    placed = {name: jax.device_put(leaf, setup.trained.shardings[name]) for name, leaf in leaves.items()}
    _, report = update_of(setup, rated, objective=settings.objective, state=setup.initial._replace(leaves=placed))
    np.testing.assert_allclose(report.gradient_norm, norm, rtol=1e-4)
    found = float(report.sums.loss) / float(report.sums.tokens)
    np.testing.assert_allclose(found, loss_of_batch(examples, doubles, doubles, terms), atol=1e-5)
