"""Objectives: closed gradients against automatic ones, blocks against the whole, estimators against expectations."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from stepjax.train.losses.divergence import Kind, teacher_tail, top_divergence, with_tail
from stepjax.train.losses.logprobs import HiddenScores, TopScores, token_scores
from stepjax.train.losses.policy_gradient import (
    clipped_surrogate,
    group_advantages,
    importance,
    mean_over,
    policy_gradient,
    teacher_advantage,
)

KINDS = [("reverse", 0.5), ("forward", 0.5), ("jsd", 0.5), ("jsd", 0.1)]
B, T, D, V, REAL = 3, 13, 8, 40, 37


@functools.partial(jax.jit, static_argnums=(2, 3))
def slow(student: jax.Array, teacher: jax.Array, kind: str, beta: float) -> jax.Array:
    """From probabilities, as the definitions read."""
    p, q = jax.nn.softmax(student), jax.nn.softmax(teacher)

    def kl(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(a > 0, a * jnp.log(jnp.where(a > 0, a, 1) / jnp.where(b > 0, b, 1)), 0), axis=-1)

    if kind == "jsd":
        m = beta * q + (1 - beta) * p
        return beta * kl(q, m) + (1 - beta) * kl(p, m)
    return kl(p, q) if kind == "reverse" else kl(q, p)


@pytest.fixture(scope="module")
def case():
    keys = iter(jax.random.split(jax.random.key(0), 8))
    hidden, other = jax.random.normal(next(keys), (B, T, D)), jax.random.normal(next(keys), (B, T, D))
    heads = tuple(jax.random.normal(next(keys), (V, D)) for _ in range(2))
    label = jax.random.randint(next(keys), (B, T), 0, REAL)
    weight = jax.random.uniform(next(keys), (B, T))
    return hidden, other, heads, label, weight


@functools.partial(jax.jit, static_argnums=(4, 5))
def unchunked(hidden, other, heads, label, kind, beta):
    """All logits at once, without the padding rows of the matrix."""
    mine, theirs = (jnp.einsum("btd,vd->btv", x, w)[..., :REAL] for x, w in zip((hidden, other), heads, strict=True))
    logs = jax.nn.log_softmax(mine)
    picked = jnp.take_along_axis(logs, label[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(logs) * logs, axis=-1)
    return picked, entropy, slow(mine, theirs, kind, beta)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def chunked(hidden, other, heads, label, kind, beta, chunk):
    mine, theirs = (lambda x, w=w: jnp.einsum("btd,vd->btv", x, w) for w in heads)
    teacher = HiddenScores(other, theirs)
    return token_scores(hidden, label, mine, num_tokens=REAL, teacher=teacher, kind=kind, beta=beta, chunk=chunk)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_blocks_equal_the_whole_in_value_and_gradient(case, kind, beta):
    """1e-6: float32 sums of 37 terms of size 1 in another order."""
    hidden, other, heads, label, weight = case

    def loss(found):
        return jnp.sum(weight * (found[0] + 2 * found[2])) / weight.size

    def both(scores):
        def run(h, w):
            found = scores(h, w)
            return loss(found), found

        return jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))

    (_, expected), wanted = both(lambda h, w: unchunked(h, other, (w, heads[1]), label, kind, beta))(hidden, heads[0])
    for chunk in (1, 12, 1000):  # a block a position, blocks with a ragged last one, one block
        run = both(lambda h, w, c=chunk: chunked(h, other, (w, heads[1]), label, kind, beta, c))
        (_, found), gradient = run(hidden, heads[0])
        for a, b in zip((found.logprob, found.entropy, found.divergence), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)
        for a, b in zip(gradient, wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_teacher_that_is_the_student_is_no_distance_away(case):
    hidden, _, heads, label, _ = case
    for kind, beta in KINDS:
        found = chunked(hidden, hidden, (heads[0], heads[0]), label, kind, beta, 12)
        assert float(jnp.max(jnp.abs(found.divergence))) < 1e-6
        np.testing.assert_array_equal(found.logprob, found.teacher_logprob)


def test_no_array_holds_all_logits(case):
    """Walks the whole program of value and gradient, blocks included."""
    hidden, other, heads, label, _ = case

    def loss(h):
        return jnp.sum(chunked(h, other, heads, label, "reverse", 0.5, 3 * B).divergence)

    sizes = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            sizes.extend(v.aval.size for v in equation.outvars)
            for each in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                inner = getattr(each, "jaxpr", each)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(jax.grad(loss))(hidden).jaxpr)
    assert 3 * B * V in sizes  # the walk does reach the blocks
    assert max(sizes) < B * T * V


def test_a_split_vocabulary_changes_nothing(case):
    hidden, other, heads, label, weight = case
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    split = NamedSharding(mesh, PartitionSpec("tensor", None))

    @jax.jit
    def both(h, w, u):
        def loss(h, w):
            found = chunked(h, other, (w, u), label, "reverse", 0.5, 12)
            return jnp.sum(weight * (found.divergence + found.logprob))

        return jax.value_and_grad(loss, (0, 1))(h, w)

    whole = both(hidden, *heads)
    found = both(hidden, *(jax.device_put(w, split) for w in heads))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["reverse", "forward", "jsd"])
def test_top_k_with_its_tail(case, kind):
    """Never more than the divergence itself, equal to it where the tail is one token, and its gradient is automatic."""
    keys = jax.random.split(jax.random.key(3), 2)
    student, teacher = (jax.random.normal(key, (50, 9)) for key in keys)
    whole = slow(student, teacher, kind, 0.3)
    logs = jax.nn.log_softmax(teacher)
    for k in (1, 3, 8):
        top, ids = jax.lax.top_k(logs, k)

        @jax.jit
        def ours(z, ids=ids, top=top):
            return top_divergence(z, ids, top, kind=kind, beta=0.3)

        found = ours(student)
        assert bool(jnp.all(found >= -1e-6))
        assert bool(jnp.all(found <= whole + 1e-5))
        if k == 8:
            np.testing.assert_allclose(found, whole, atol=1e-5)

        def plain(z, ids=ids, top=top):
            p = jnp.take_along_axis(jax.nn.softmax(z), ids, axis=-1)
            p = jnp.concatenate([p, 1 - p.sum(-1, keepdims=True)], axis=-1)
            return slow(jnp.log(p), teacher_tail(top), kind, 0.3)

        wanted, slope = jax.jit(jax.value_and_grad(lambda z, p=plain: jnp.sum(p(z))))(student)
        np.testing.assert_allclose(jnp.sum(found), wanted, rtol=1e-5)
        np.testing.assert_allclose(jax.jit(jax.grad(lambda z, o=ours: jnp.sum(o(z))))(student), slope, atol=2e-5)


def test_top_k_without_a_tail_to_speak_of_has_finite_gradients():
    sharp = jnp.where(jnp.arange(9)[None, :] == 2, 200.0, 0.0)
    top = jnp.log(jnp.asarray([[1.0]]))
    kinds: tuple[Kind, ...] = ("reverse", "forward", "jsd")
    for kind in kinds:
        loss = functools.partial(top_divergence, ids=jnp.asarray([[2]]), teacher_top=top, kind=kind)
        gradient = jax.grad(lambda z, f=loss: jnp.sum(f(z)))(sharp)
        assert bool(jnp.all(jnp.isfinite(gradient)))
    assert float(jnp.sum(jnp.exp(with_tail(jnp.zeros((1, 9)), jnp.asarray([[1, 4]]))))) == pytest.approx(1)


def test_top_k_scores_go_through_blocks(case):
    hidden, other, heads, label, _ = case
    logs = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", other, heads[1])[..., :REAL])
    top, ids = jax.lax.top_k(logs, REAL - 1)  # the tail is one token: the divergence itself
    mine = lambda x: jnp.einsum("btd,vd->btv", x, heads[0])  # noqa: E731
    found = token_scores(hidden, label, mine, num_tokens=REAL, teacher=TopScores(ids, top), kind="forward", chunk=9)
    np.testing.assert_allclose(found.divergence, unchunked(*case[:4], "forward", 0.5)[2], atol=2e-5)


# --- estimators on one categorical, against sums over all of its tokens


@pytest.fixture(scope="module")
def toy():
    z, q = (jax.random.normal(key, (6,)) for key in jax.random.split(jax.random.key(7), 2))
    return z, jax.nn.log_softmax(q)


@functools.partial(jax.jit, static_argnums=1)
def expected_gradient(z, loss_of_token):
    """Σ_y π(y) · ∇ loss(y): what many samples' gradients average to."""
    gradients = jax.vmap(lambda y: jax.grad(lambda z: loss_of_token(z, y))(z))(jnp.arange(z.size))
    return jax.nn.softmax(z) @ gradients


def test_expected_gradients_of_the_estimators(toy):
    """Sampled-token reverse KL as an advantage gives the exact gradient; k1 loses the teacher, k3 turns KL around."""
    z, q = toy
    exact = jax.grad(lambda z: slow(z, q, "reverse", 0.5))(z)
    forward = jax.grad(lambda z: slow(z, q, "forward", 0.5))(z)

    def ours(z, y):
        logprob = jax.nn.log_softmax(z)[y][None, None]
        mask = jnp.ones((1, 1), bool)
        sampler = jax.lax.stop_gradient(logprob)
        advantage = teacher_advantage(sampler, q[y][None, None], mask)
        weight = importance(logprob, sampler, mask, filter="none").weight
        return mean_over(policy_gradient(logprob, advantage, weight), mask, jnp.asarray(1))

    def k1(z, y):
        return jax.nn.log_softmax(z)[y] - q[y]

    def k2(z, y):
        return 0.5 * k1(z, y) ** 2

    def k3(z, y):
        return jnp.exp(-k1(z, y)) - 1 + k1(z, y)

    np.testing.assert_allclose(expected_gradient(z, ours), exact, atol=1e-6)
    np.testing.assert_allclose(expected_gradient(z, k2), exact, atol=1e-6)
    np.testing.assert_allclose(expected_gradient(z, k3), forward, atol=1e-6)
    np.testing.assert_allclose(expected_gradient(z, k1), jnp.zeros(6), atol=1e-6)  # no teacher in it at all
    assert float(jnp.max(jnp.abs(exact))) > 0.05
    assert float(jnp.max(jnp.abs(exact - forward))) > 0.05


def test_importance_weights_make_another_samplers_gradient_right(toy):
    """Samples of μ weighted by π/μ: the gradient of the expected reward under π."""
    z, q = toy
    mu = jax.nn.log_softmax(q * 0.5)
    reward = jnp.arange(6.0)
    wanted = jax.grad(lambda z: -jnp.sum(jax.nn.softmax(z) * reward))(z)
    mask = jnp.ones((1, 1), bool)

    def loss(z, y):
        logprob = jax.nn.log_softmax(z)[y][None, None]
        weight = importance(logprob, mu[y][None, None], mask, filter="none").weight
        return policy_gradient(logprob, reward[y][None, None], weight)[0, 0]

    gradients = jax.vmap(lambda y: jax.grad(lambda z: loss(z, y))(z))(jnp.arange(6))
    np.testing.assert_allclose(jnp.exp(mu) @ gradients, wanted, atol=1e-6)


def test_filters():
    ratio = jnp.asarray([[0.4, 1.0, 3.0, 1.5], [1.0, 1.0005, 1.0, 9.0]])
    mask = jnp.asarray([[1, 1, 1, 1], [1, 1, 1, 0]], bool)
    sampler = jnp.full((2, 4), -1.0)
    logprob = sampler + jnp.log(ratio)

    def of(filter, **more):
        return importance(logprob, sampler, mask, filter=filter, **more)

    np.testing.assert_allclose(of("none").weight[mask], ratio[mask], rtol=1e-5)
    np.testing.assert_allclose(of("tis").weight[0], [0.4, 1.0, 2.0, 1.5], rtol=1e-5)
    np.testing.assert_allclose(of("icepop").weight[0], [0.0, 1.0, 0.0, 1.5], rtol=1e-5)
    np.testing.assert_array_equal(of("icepop").kept_tokens[0], [False, True, False, True])
    # Row 0's geometric mean is 1.158, row 1's 1.00017: the whole of row 0 goes.
    np.testing.assert_array_equal(of("mispo").weight[0], [0, 0, 0, 0])
    np.testing.assert_array_equal(of("mispo").weight[1][:3], [1, 1, 1])
    # Packed: two trajectories in a row, judged apart. That of the first two tokens has mean 0.632, the other 2.12.
    packed = of("mispo", sequence=jnp.asarray([[1, 1, 2, 2], [1, 1, 1, 1]]), sequence_bounds=(0.6, 1.1))
    np.testing.assert_array_equal(packed.weight[0], [0, 1, 0, 0])
    np.testing.assert_array_equal(packed.kept_sequences[0], [True, True, False, False])


def test_clipping_drops_what_would_move_on_outwards():
    weight, advantage = jnp.asarray([1.5, 1.5, 0.5, 0.5]), jnp.asarray([1.0, -1.0, 1.0, -1.0])
    slope = jax.grad(lambda x: jnp.sum(clipped_surrogate(x, advantage, weight, clip=(0.8, 1.2)).loss))(jnp.zeros(4))
    np.testing.assert_allclose(slope, [0.0, 1.5, -0.5, 0.0])


def test_discounted_advantages():
    mask = jnp.asarray([[0, 1, 1, 1]], bool)
    sampler, teacher = jnp.asarray([[5.0, -1, -1, -1]]), jnp.asarray([[0.0, -2, -1, -4]])
    np.testing.assert_allclose(teacher_advantage(sampler, teacher, mask), [[0, -1, 0, -3]])
    np.testing.assert_allclose(teacher_advantage(sampler, teacher, mask, discount=1.0), [[0, -4, -3, -3]])
    np.testing.assert_allclose(teacher_advantage(sampler, teacher, mask, discount=0.5), [[0, -1.75, -1.5, -3]])


def test_discounts_end_with_a_trajectory():
    mask, sampler = jnp.ones((1, 4), bool), jnp.zeros((1, 4))
    teacher = jnp.asarray([[-1.0, -2, -3, -4]])
    found = teacher_advantage(sampler, teacher, mask, discount=1.0, sequence=jnp.asarray([[1, 1, 2, 2]]))
    np.testing.assert_allclose(found, [[-3, -2, -7, -4]])


def test_group_advantages():
    rewards, groups = np.asarray([1.0, 0, 0, 0, 1, 1]), np.asarray([0, 0, 0, 0, 1, 1])
    plain = group_advantages(rewards, groups, scaled=False)
    np.testing.assert_allclose(plain, [0.75, -0.25, -0.25, -0.25, 0, 0])
    np.testing.assert_allclose(group_advantages(rewards, groups)[:4], plain[:4] / 0.4330127, rtol=1e-4)


def test_the_split_into_micro_batches_changes_nothing(case):
    _, _, _, _, value = case
    mask = jnp.arange(T)[None, :] < jnp.asarray([2, 13, 7])[:, None]
    total = jnp.sum(mask)
    parts = sum(mean_over(value[i : i + 1], mask[i : i + 1], total) for i in range(B))
    np.testing.assert_allclose(parts, mean_over(value, mask, total), rtol=1e-6)
    assert float(mean_over(value, jnp.zeros_like(mask), jnp.asarray(0))) == 0
