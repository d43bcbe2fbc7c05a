"""Generation end to end on a small random model: against plain argmax over recomputed logits, limits and stops."""

import numpy as np
import pytest
from tiny import tiny_session

from stepjax.errors import RequestError
from stepjax.infer.generate import CHUNK, Generation, generate
from stepjax.infer.sampling.params import SamplingParams

RNG = np.random.default_rng(3)
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, seed=0)


@pytest.mark.parametrize("length", [1, 7, pytest.param(40, marks=pytest.mark.slow)])
def test_greedy_equals_argmax_of_recomputed_logits(length):
    session = tiny_session()
    prompt = RNG.integers(8, 128, length).tolist()
    answer = generate(session, [prompt], GREEDY)[0].ids
    logits = session.logits([*prompt, *answer])
    assert logits[length - 1 : -1].argmax(-1).tolist() == answer


@pytest.mark.slow
def test_a_prompt_longer_than_a_chunk_is_prefilled_in_pieces(monkeypatch):
    session = tiny_session()
    prompt = RNG.integers(8, 128, 75).tolist()
    whole = generate(session, [prompt, prompt[:3]], GREEDY)
    monkeypatch.setattr("stepjax.infer.generate.CHUNK", 16)
    pieces = generate(session, [prompt, prompt[:3]], GREEDY)
    assert [done.ids for done in whole] == [done.ids for done in pieces]
    assert [done.timing.accepted_per_step for done in whole] == [done.timing.accepted_per_step for done in pieces]
    assert CHUNK >= 75


def test_max_tokens_is_exact_with_drafts():
    for count in (1, 2, 3, 5):
        done = generate(tiny_session(), [[9, 10]], GREEDY.replace(max_tokens=count))[0]
        assert (len(done.ids), done.finish_reason) == (count, "length")


def test_a_stop_id_ends_the_answer_and_stays_in_the_ids():
    session = tiny_session()
    answer = generate(session, [[9, 10]], GREEDY)[0].ids
    stop = answer[5]
    done = generate(session, [[9, 10]], GREEDY.replace(stop_ids=(stop,)))[0]
    assert done.ids == answer[: answer.index(stop) + 1]
    assert done.finish_reason == "stop"


def test_the_models_own_end_ids_stop_unless_ignored():
    session = tiny_session()
    for prompt in RNG.integers(8, 128, (40, 2)).tolist():
        ids = generate(session, [prompt], GREEDY.replace(max_tokens=12))[0].ids
        ends = [at for at, token in enumerate(ids) if token in session.config.eos_ids]
        if ends:
            done = generate(session, [prompt], GREEDY.replace(ignore_eos=False))[0]
            assert done.ids == ids[: ends[0] + 1]
            return
    pytest.fail("no prompt of forty led to an end-of-sequence id; choose other prompts")


@pytest.mark.slow
def test_more_prompts_than_a_batch_holds_keep_their_order():
    session = tiny_session()
    prompts = RNG.integers(8, 128, (11, 3)).tolist()
    params = [GREEDY.replace(max_tokens=2 + i % 4) for i in range(11)]
    done = generate(session, prompts, params)
    assert [len(each.ids) for each in done] == [each.max_tokens for each in params]
    assert done[9].ids == generate(session, [prompts[9]], params[9])[0].ids


def test_closing_early_leaves_a_cancelled_answer():
    generation = Generation(tiny_session(), [[9, 10]], [GREEDY])
    for _, (_row, _delta) in zip(range(2), generation, strict=False):
        pass
    done = generation.completions()[0]
    assert done.finish_reason == "cancelled"
    assert 0 < len(done.ids) < 12


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([3, 128], "entry 1 is 128"),
        ([-1], "entry 0"),
        ([True], "entry 0"),
        ([5] * 256, "context is 256"),
    ],
)
def test_bad_prompts_are_refused(prompt, message):
    with pytest.raises(RequestError, match=message):
        generate(tiny_session(), [prompt], GREEDY)


@pytest.mark.slow
def test_max_tokens_is_cut_to_the_room_in_the_context():
    done = generate(tiny_session(), [[5] * 250], GREEDY.replace(max_tokens=1000))[0]
    assert len(done.ids) == 6


def test_too_many_drafts_are_refused():
    with pytest.raises(RequestError, match="has 3 MTP layers"):
        generate(tiny_session(), [[5]], GREEDY, speculate=4)


def test_score_agrees_with_logits_and_has_a_row_less_per_depth():
    session = tiny_session()
    ids = RNG.integers(8, 128, 300).tolist()[:200]
    logits, depths = session.score(ids)
    np.testing.assert_array_equal(logits, session.logits(ids))
    assert [len(each) for each in depths] == [199, 198, 197]
    assert session.score([4])[1][1].shape == (0, 128)
