"""Sampling: the processed distribution against a slow twin, and noise that depends on seed and position only."""

import functools
import re
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow_sampler import DRAWN, OPTIONS, token, weights

from stepjax.errors import RequestError
from stepjax.infer.sampling import sampler, state
from stepjax.infer.sampling.params import MAX_BIASES, SamplingParams
from stepjax.infer.sampling.sampler import _listed_or_searched, likeliest, logprobs, process, record, sample, searched
from stepjax.infer.sampling.state import Sampling, SlotSampling, assign, num_words, packed, unpacked

V, TOKENS = 14, 12  # the output matrix has two padding rows
EOS = (10,)
several = jax.jit(assign)
drawn = jax.jit(functools.partial(sample, num_tokens=TOKENS))


def row(params: SamplingParams, prompt: Sequence[int], output: Sequence[int] = ()) -> SlotSampling:
    """Of an answer with few different tokens."""
    (only,) = SlotSampling.rows(params, prompt, output, eos_ids=EOS, vocab=V)
    return only


def assigned(sampling: Sampling, slot: int, taken: SlotSampling) -> Sampling:
    return several(sampling, jnp.asarray([slot], jnp.int32), SlotSampling.stack([taken], count=1))


def slots(rows: Sequence[SlotSampling]) -> Sampling:
    """A batch in which every slot was taken."""
    sampling = jax.tree.map(jnp.asarray, Sampling.empty(len(rows), V))
    for slot, each in enumerate(rows):
        sampling = assigned(sampling, slot, each)
    return sampling


def counts(sampling: Sampling) -> np.ndarray:
    assert sampling.rules is not None
    return np.asarray(sampling.rules.count_BV)


def first_rows(sampling: Sampling, count: int, *, start: int = 0) -> Sampling:
    return jax.tree.map(lambda x: x[start : start + count], sampling)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(("top_p", "top_k", "min_p"), [(1, 0, 0), (0.6, 0, 0), (1, 3, 0), (1, 0, 0.2), (0.8, 5, 0.1)])
def test_the_processed_distribution_equals_the_slow_one(temperature, top_p, top_k, min_p):
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=0)
    logits = np.random.default_rng(7).normal(0, 2, (3, 2, V)).astype(np.float32)
    found = jax.nn.softmax(process(jnp.asarray(logits), Sampling.of([params] * 3)), axis=-1)
    for b, t in np.ndindex(3, 2):
        np.testing.assert_allclose(found[b, t], weights(logits[b, t], params), atol=1e-6)


def test_drawn_tokens_follow_the_distribution():
    """Chi-square of 4,000 draws with a fixed seed against the slow twin; 34.5 is the 0.1 % point for 13 degrees."""
    params = SamplingParams(temperature=1.5, top_p=1.0, top_k=0, seed=3)
    logits = np.random.default_rng(1).normal(0, 1, V).astype(np.float32)
    count = 4000
    tiled = jnp.broadcast_to(jnp.asarray(logits), (1, count, V))
    found = sample(tiled, jnp.arange(count, dtype=jnp.int32)[None], Sampling.of([params]), num_tokens=V)
    expected = count * weights(logits, params)
    observed = np.bincount(np.asarray(found)[0], minlength=V)
    assert np.sum((observed - expected) ** 2 / expected) < 34.5


def test_a_token_depends_on_its_seed_and_position_alone():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(3, 4, V)).astype(np.float32)
    position = np.array([[5, 6, 7, 8], [1, 2, 3, 4], [7, 8, 9, 10]], np.int32)
    sampling = Sampling.of([SamplingParams(seed=s, top_k=0, top_p=1.0) for s in (11, 12, 13)])
    together = drawn(logits, position, sampling)
    for b, t in np.ndindex(3, 4):
        rows, step = slice(b, b + 1), slice(t, t + 1)
        one = drawn(logits[rows, step], position[rows, step], first_rows(sampling, 1, start=b))
        assert int(one[0, 0]) == int(together[b, t])


def test_greedy_rows_and_drawn_rows_share_a_batch():
    logits = np.random.default_rng(4).normal(size=(2, 1, V)).astype(np.float32)
    params = [SamplingParams(temperature=0.0, seed=1), SamplingParams(temperature=5.0, top_k=0, top_p=1.0, seed=1)]
    found = np.asarray([drawn(logits, np.full((2, 1), p, np.int32), Sampling.of(params))[:, 0] for p in range(20)])
    assert set(found[:, 0]) == {logits[0, 0, :TOKENS].argmax()}
    assert len(set(found[:, 1])) > 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_rows_of_the_output_matrix_are_never_sampled(temperature):
    logits = jnp.zeros((1, 50, V)).at[..., V - 2 :].set(100.0)
    params = SamplingParams(temperature=temperature, seed=0)
    position = jnp.arange(50, dtype=jnp.int32)[None]
    assert int(sample(logits, position, Sampling.of([params]), num_tokens=V - 2).max()) < V - 2


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_gives_the_slow_twins_tokens(name, greedy):
    """Row t of a verify step has seen t drafts, the same token thrice among them."""
    rng, batch, width = np.random.default_rng(11), 12, 4
    params = [OPTIONS[name].replace(seed=at, **({"temperature": 0.0} if greedy else {})) for at in range(batch)]
    prompts = [rng.integers(0, TOKENS, 5).tolist() for _ in range(batch)]
    outputs = [rng.integers(0, TOKENS, at % 6).tolist() for at in range(batch)]
    drafts = rng.integers(0, TOKENS, (batch, width - 1)).astype(np.int32)
    drafts[0] = 3
    logits = rng.normal(0, 2, (batch, width, V)).astype(np.float32)
    position = np.asarray([[5 + len(each) + t for t in range(width)] for each in outputs], np.int32)
    sampling = slots([row(*each) for each in zip(params, prompts, outputs, strict=True)])
    found = np.asarray(drawn(logits, position, sampling, draft_BK=drafts))
    for b, t in np.ndindex(batch, width):
        known = {"prompt": prompts[b], "output": [*outputs[b], *drafts[b, :t].tolist()]}
        expected = token(logits[b, t], params[b], position=int(position[b, t]), eos_ids=EOS, num_tokens=TOKENS, **known)
        assert found[b, t] == expected, (b, t)


@pytest.mark.slow
def test_no_option_of_a_neighbour_changes_a_token():
    """Every option alone, among all others, and beside slots that nobody took."""
    rng, names = np.random.default_rng(12), list(OPTIONS)
    logits = rng.normal(0, 2, (len(names), 4, V)).astype(np.float32)
    drafts = rng.integers(0, TOKENS, (len(names), 3)).astype(np.int32)
    position = np.tile(np.arange(3, 7, dtype=np.int32), (len(names), 1))
    sampling = slots([row(OPTIONS[name], [1, 4, 4], []) for name in names])
    together = np.asarray(drawn(logits, position, sampling, draft_BK=drafts))
    idle = jax.tree.map(jnp.asarray, Sampling.empty(len(names), V))
    for at, name in enumerate(names):
        one = slice(at, at + 1)
        mine = first_rows(sampling, 1, start=at)
        alone = drawn(logits[one], position[one], mine, draft_BK=drafts[one])
        beside = jax.tree.map(lambda x, y, at=at: x.at[at].set(y[0]), idle, mine)
        among_idle = drawn(logits, position, beside, draft_BK=drafts)
        assert together[at].tolist() == alone[0].tolist() == among_idle[at].tolist(), name


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_a_row_without_filters_keeps_all_of_its_logits_beside_one_with(temperature):
    """A running sum over 4,096 float32 probabilities reaches 1 before its end; that must cut nothing off."""
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, (2, 1, 4096)), jnp.float32)
    plain = DRAWN.replace(temperature=temperature)
    alone = process(logits[:1], Sampling.of([plain]))
    both = process(logits, Sampling.of([plain, plain.replace(top_p=0.5)]))
    np.testing.assert_array_equal(alone, both[:1])


def test_a_large_top_k_keeps_as_many_where_top_p_is_off():
    """By the same running sum."""
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, (1, 1, 4096)), jnp.float32)
    assert int(jnp.sum(process(logits, Sampling.of([DRAWN.replace(temperature=1.0, top_k=4090)])) > -1e29)) == 4090


@pytest.mark.parametrize(("min_p", "kept"), [(0.0, 8), (0.1, 4), (1.0, 2)])
def test_min_p_keeps_what_equals_it_and_everything_at_0(min_p, kept):
    """At 0 even what is too unlikely for float32; at 1 the likeliest, both of them."""
    logits = jnp.asarray([[[2.0, 2.0, 1.0, 0.0, -1.0, -3.0, -50.0, -200.0]]])
    beside = [DRAWN.replace(temperature=1.0, min_p=each) for each in (min_p, 0.5)]
    found = process(jnp.concatenate([logits, logits]), Sampling.of(beside))
    assert int(jnp.sum(found[0] > -1e29)) == kept


def test_the_short_list_and_the_search_give_the_same_tokens(monkeypatch):
    logits = jnp.asarray(np.random.default_rng(13).normal(0, 2, (4, 50, 500)), jnp.float32)
    position = jnp.tile(jnp.arange(50, dtype=jnp.int32)[None], (4, 1))
    params = [
        DRAWN.replace(top_k=k, top_p=0.9, min_p=m, seed=k) for k, m in ((2, 0.0), (5, 0.1), (40, 0.0), (64, 0.02))
    ]
    short = sample(logits, position, Sampling.of(params), num_tokens=490)
    monkeypatch.setattr(sampler, "FEW", 1)
    np.testing.assert_array_equal(short, sample(logits, position, Sampling.of(params), num_tokens=490))


@pytest.mark.slow
def test_the_search_of_gpus_finds_the_thresholds_of_cpus():
    """Every row of its own kind; a threshold is one of the logits, whatever else was added up on the way."""
    rng, size = np.random.default_rng(14), 700
    kinds = [
        (0, 1.0),
        (1, 1.0),
        (3, 1.0),
        (64, 0.9),
        (65, 0.9),
        (300, 1.0),
        (1000, 0.5),
        (0, 0.01),
        (0, 0.5),
        (0, 0.999),
    ]
    scales = (1e-3, 1.0, 30.0)
    params = [DRAWN.replace(top_k=k, top_p=p, seed=k) for k, p in kinds for _ in scales]
    logits = rng.normal(0, 1, (len(params), 2, size)) * np.tile(scales, len(kinds))[:, None, None]
    logits[:, 1] = np.round(logits[:, 1])  # many ties
    logits[:, 1, ::7] = state.REMOVED
    sampling = Sampling.of(params)
    ways = _listed_or_searched, searched, functools.partial(searched, interpret=True)
    found = [np.asarray(find(jnp.asarray(logits, jnp.float32), sampling)) for find in ways]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])  # by kernels
    assert np.isneginf(found[0][:3]).all()
    assert np.isin(found[0][3:], logits.astype(np.float32)).all()


@pytest.mark.parametrize("count", [1, 5])
def test_the_likeliest_without_a_sort(count):
    scores = np.random.default_rng(15).integers(0, 6, (3, 2, 40)).astype(np.float32)  # ties: the first comes first
    values, ids = jax.lax.top_k(scores, count)
    found = likeliest(jnp.asarray(scores), count=count)
    np.testing.assert_array_equal(found[0], ids)
    np.testing.assert_array_equal(found[1], values)


def test_sampling_for_a_gpu_has_no_loop_and_no_sort():
    """XLA would run both outside of CUDA graphs, and the host would wait for the conditionals around them."""

    def run(logits: jax.Array, position: jax.Array, sampling: Sampling, draft: jax.Array) -> Any:
        token = sample(logits, position, sampling, num_tokens=TOKENS, draft_BK=draft)
        return token, logprobs(logits, token, top=5)

    arguments = jnp.zeros((3, 2, V)), jnp.zeros((3, 2), jnp.int32), Sampling.empty(3, V), jnp.zeros((3, 1), jnp.int32)
    text = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.case" in text  # what nobody asks for is not computed
    assert not re.search(r"stablehlo\.while|stablehlo\.sort|top_k", text)


@pytest.mark.parametrize("few", [1, 64])
@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"), [(2, 1.0, 4), (1, 1.0, 1), (0, 0.3, 4), (9, 0.1, 1), (6, 1.0, 150)]
)
def test_ties_with_the_last_token_kept_are_kept(monkeypatch, few, top_k, top_p, kept):
    """One at 3, three at 2.5, 146 at −1: more than the short list is long."""
    monkeypatch.setattr(sampler, "FEW", few)
    logits = jnp.full((1, 1, 150), -1.0).at[0, 0, 77].set(3.0).at[0, 0, jnp.asarray([3, 80, 149])].set(2.5)
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, seed=0)
    assert int(jnp.sum(process(logits, Sampling.of([params])) > -1e29)) == kept


@pytest.mark.parametrize("temperature", [1e-4, 1e-6, 1e-20, 1e-39, 1e-45])
def test_the_coldest_temperatures_are_greedy(temperature):
    """Dividing by them would leave float32."""
    logits = np.random.default_rng(14).normal(0, 3, (1, 30, V)).astype(np.float32)
    position = np.arange(30, dtype=np.int32)[None]
    cold = DRAWN.replace(temperature=temperature, top_k=5)
    assert (Sampling.of([cold]).temperature_B[0] > 0) == (temperature > 1e-5)  # devices differ in numbers below 1e-38
    for sampling in (Sampling.of([cold]), slots([row(cold, [])])):
        np.testing.assert_array_equal(drawn(logits, position, sampling), logits[..., :TOKENS].argmax(-1))


def test_a_plain_greedy_step_writes_nothing_over_the_vocabulary():
    """All arrays of that size are inside of branches that it does not take."""
    sampling = jax.tree.map(jnp.asarray, Sampling.empty(3, V))
    traced = jax.make_jaxpr(functools.partial(sample, num_tokens=TOKENS))(
        jnp.zeros((3, 1, V)), jnp.zeros((3, 1), jnp.int32), sampling
    )
    assert max(cast(Any, out.aval).size for eqn in traced.eqns for out in eqn.outvars) < V


def test_assigning_a_slot_leaves_nothing_of_what_it_had():
    """Each option after each other one, and no other slot is touched."""
    rows = {name: row(params, [1, 2, 2], [5, 5, 6]) for name, params in OPTIONS.items()}
    neighbour = rows["all"]
    for before in ("all", "min_tokens", "plain"):
        for after in rows.values():
            found = assigned(slots([neighbour, rows[before], neighbour]), 1, after)
            jax.tree.map(np.testing.assert_array_equal, found, slots([neighbour, after, neighbour]))


def test_a_slot_past_the_last_is_not_assigned():
    sampling = slots([row(OPTIONS["all"], [1], [2])] * 2)
    jax.tree.map(np.testing.assert_array_equal, assigned(sampling, 2, row(DRAWN, [3])), sampling)


def test_several_slots_are_assigned_as_one_after_the_other():
    """Whatever the lengths of their lists, and with rows to spare."""
    rows = [row(each, [1, 2] * at, [5] * (9 * at)) for at, each in enumerate(OPTIONS.values())]
    past = len(rows)
    sampling = jax.tree.map(jnp.asarray, Sampling.empty(past, V))
    slot = jnp.asarray([*reversed(range(past)), past, past], jnp.int32)
    found = several(sampling, slot, SlotSampling.stack(rows[::-1], count=past + 2))
    jax.tree.map(np.testing.assert_array_equal, found, slots(rows))


def test_recording_counts_each_answered_token():
    sampling = slots([row(OPTIONS["frequency"], [1], [2])] * 3)
    tokens = jnp.asarray([[4, 4, 9, 1], [2, 2, 2, 2], [7, 8, 9, 0]], jnp.int32)
    after = record(sampling, tokens, jnp.asarray([3, 0, 4], jnp.int32))
    expected = np.zeros((3, V), int)
    expected[:, 2] = 1
    expected[0, [4, 9]] += [2, 1]
    expected[2, [7, 8, 9, 0]] += 1
    np.testing.assert_array_equal(counts(after), expected)
    elsewhere = record(sampling, tokens[:2], jnp.asarray([1, 2]), slot_B=jnp.asarray([2, 3]))
    expected = np.zeros((3, V), int)
    expected[:, 2] = 1
    expected[2, 4] += 1  # the fourth slot is not there
    np.testing.assert_array_equal(counts(elsewhere), expected)
    plain = Sampling.of([DRAWN])
    assert record(plain, tokens[:1], jnp.asarray([1])) is plain


def test_an_answer_that_was_preempted_goes_on_with_its_counts():
    tokens = jnp.asarray([[4, 4, 9]], jnp.int32)
    whole = record(slots([row(OPTIONS["all"], [1, 2], [])]), tokens, jnp.asarray([3]))
    jax.tree.map(np.testing.assert_array_equal, slots([row(OPTIONS["all"], [1, 2], [4, 4, 9])]), whole)


def test_rows_of_a_slot_have_one_shape_whatever_is_asked_for():
    """Else a request would wait for a compiler."""
    rng, vocab = np.random.default_rng(3), 5000
    most = DRAWN.replace(
        repetition_penalty=1.3,
        allowed_ids=tuple(rng.permutation(vocab)[:3000].tolist()),
        logit_bias=dict.fromkeys(range(MAX_BIASES), 1.0),
        stop_ids=tuple(range(16)),
    )
    prompt, output = rng.integers(0, vocab, (2, 20_000)).tolist()
    rows = [
        row
        for params in (*OPTIONS.values(), most)
        for length in (0, 1, 9, 20_000)
        for row in SlotSampling.rows(params, prompt[:length], output[:length], eos_ids=EOS, vocab=vocab)
    ]
    shapes = {tuple((field.shape, field.dtype) for field in row) for row in rows}
    assert len(shapes) == 1
    assert sum(field.nbytes for field in rows[0]) < 20_000


def test_more_counts_than_a_row_carries_are_added_by_the_rows_behind_it(monkeypatch):
    monkeypatch.setattr(state, "MAX_COUNTS", 3)
    output = [1, 5, 5, 9, 2, 0, 7, 7, 7, 11, 2]  # seven different tokens
    rows = SlotSampling.rows(OPTIONS["all"], [1, 2], output, eos_ids=EOS, vocab=V)
    assert [bool(each.continues) for each in rows] == [False, True, True]
    sampling = slots([row(OPTIONS["all"], [4], [3, 3])] * 2)  # the slot had another answer before
    for each in rows:
        sampling = assigned(sampling, 1, each)
    np.testing.assert_array_equal(counts(sampling)[1], np.bincount(output, minlength=V))
    np.testing.assert_array_equal(counts(sampling)[0], np.bincount([3, 3], minlength=V))


def test_assigning_copies_no_table_of_the_vocabulary():
    """The tables of 64 slots are 74 MB; four of their rows are written in place."""
    sampling = jax.tree.map(jnp.asarray, Sampling.empty(7, 300))
    (new,) = SlotSampling.rows(OPTIONS["all"], [1], eos_ids=EOS, vocab=300)
    arguments = (sampling, jnp.zeros((4,), jnp.int32), SlotSampling.stack([new], count=4))
    text = jax.jit(assign, donate_argnums=0).lower(*arguments).compile().as_text() or ""
    assert "[7,300]" in text
    assert not re.search(r"= \w+\[7,300\]\S* copy\(", text)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 300])
def test_sets_of_tokens_as_bits(size):
    ids = np.flatnonzero(np.random.default_rng(size).random(size) < 0.5).tolist()
    bits = np.asarray(unpacked(jnp.asarray(packed(ids, size)), size))
    assert np.flatnonzero(bits).tolist() == ids
    assert packed(ids, size).shape == (num_words(size),)


def test_log_probabilities_are_those_of_the_raw_logits():
    logits = np.random.default_rng(15).normal(0, 3, (2, 3, V)).astype(np.float32)
    tokens = np.asarray([[0, 5, 13], [7, 7, 2]], np.int32)
    found = logprobs(jnp.asarray(logits), jnp.asarray(tokens), top=4)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    np.testing.assert_allclose(found.token_BT, np.take_along_axis(exact, tokens[..., None], -1)[..., 0], atol=1e-5)
    np.testing.assert_array_equal(found.top_id_BTN, np.argsort(-exact, axis=-1)[..., :4])
    np.testing.assert_allclose(found.top_BTN, -np.sort(-exact, axis=-1)[..., :4], atol=1e-5)


def test_a_batch_without_slots_refuses_what_it_would_not_apply():
    for name in ("repetition", "presence", "frequency", "bias", "allowed", "min_tokens"):
        with pytest.raises(RequestError, match="only the engine"):
            Sampling.of([DRAWN, OPTIONS[name]])


def test_parameters_are_hashable_and_equal_however_they_were_written():
    lists: dict[str, Any] = {"allowed_ids": [2, 5], "stop": ["a"], "stop_ids": [7]}
    one = SamplingParams(seed=0, logit_bias={5: 1, 2: -3.0}, **lists)
    other = SamplingParams(seed=0, logit_bias=((2, -3.0), (5, 1.0)), allowed_ids=(2, 5), stop=("a",), stop_ids=(7,))
    assert (one, hash(one)) == (other, hash(other))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stop_ids": (12,)}, "^stop_ids: token 12: is 12"),
        ({"allowed_ids": (3, 99)}, "^allowed_ids: token 99"),
        ({"logit_bias": {12: 1.0}}, "^logit_bias: token 12"),
        ({"allowed_ids": (10,), "min_tokens": 1}, "^allowed_ids: all of"),
        ({"allowed_ids": (4, 10), "stop_ids": (4,), "min_tokens": 1}, "^allowed_ids: all of"),
    ],
)
def test_requests_that_do_not_fit_the_model_are_refused(given, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(**given).check(TOKENS, eos_ids=EOS)


def test_what_fits_the_model_passes():
    SamplingParams(allowed_ids=(10,), min_tokens=1, ignore_eos=True).check(TOKENS, eos_ids=EOS)
    SamplingParams(allowed_ids=(10,)).check(TOKENS, eos_ids=EOS)
    for params in OPTIONS.values():
        params.check(TOKENS, eos_ids=EOS)
    with pytest.raises(RequestError, match="has 25 entries, expected at most 24"):
        SamplingParams(stop_ids=tuple(range(16))).check(100, eos_ids=range(15, 25))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "1"),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("min_p", 2),
        ("seed", -1),
        ("seed", 2**32),
        ("stop", ("",)),
        ("stop", "word"),
        ("stop", 5),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("min_tokens", -1),
        ("min_tokens", 1025),
        ("logprobs", 21),
        ("prompt_logprobs", True),
        ("n", 0),
        ("n", 9),
        ("logit_bias", 5),
        ("logit_bias", [1, 2]),
        ("logit_bias", ((3, 1.0), (3, 2.0))),
        ("allowed_ids", 5),
        ("stop_ids", "ab"),
    ],
)
def test_bad_parameters_are_refused_by_name(name, value):
    with pytest.raises(RequestError, match=f"^{name}: is "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"logit_bias": {"7": 1.0}}, "^logit_bias: token '7'"),
        ({"logit_bias": {7: 101}}, r"^logit_bias\[7\]: is 101"),
        ({"logit_bias": {7: float("nan")}}, r"^logit_bias\[7\]: is nan"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "^logit_bias: has 1025 entries"),
        ({"allowed_ids": (1, -1)}, "^allowed_ids: token -1"),
        ({"stop_ids": (True,)}, "^stop_ids: token True"),
        ({"stop_ids": tuple(range(17))}, "^stop_ids: has 17 entries"),
    ],
)
def test_bad_entries_are_refused_by_name(given, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(**given)


def test_defaults_come_from_the_checkpoint_then_the_model_card():
    assert SamplingParams.from_defaults({}).top_k == 40
    found = SamplingParams.from_defaults({"temperature": 0.6, "top_k": 7, "eos_token_id": [1]}, top_k=3, top_p=None)
    assert (found.temperature, found.top_k, found.top_p) == (0.6, 3, 0.95)
    assert SamplingParams.from_defaults({"do_sample": False, "temperature": 0.6}).temperature == 0
