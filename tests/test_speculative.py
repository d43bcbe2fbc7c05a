"""MTP decoding: drafts are what the heads say, and no draft ever changes an answer."""

import numpy as np
import pytest
from alone import Batch
from tiny import tiny_session

from stepjax.infer.generate import generate
from stepjax.infer.sampling.params import SamplingParams

PROMPT = np.random.default_rng(0).integers(8, 128, 21).tolist()
GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, seed=0)
DRAWN = SamplingParams(max_tokens=40, temperature=0.7, top_k=9, top_p=0.9, ignore_eos=True, seed=5)


@pytest.mark.slow
@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_the_answer_is_the_same_with_any_number_of_drafts(params, drafts):
    session = tiny_session()
    prompts = [PROMPT, PROMPT[:1], PROMPT * 3]
    plain, drafted = ([done.ids for done in generate(session, prompts, params, speculate=k)] for k in (0, drafts))
    assert plain == drafted
    assert len({tuple(ids) for ids in plain}) == 3


@pytest.mark.slow
def test_a_prompt_alone_and_among_others_gets_the_same_answer():
    session = tiny_session()
    prompts = [PROMPT[:1], PROMPT[:9], PROMPT, PROMPT * 3]
    together = generate(session, prompts, DRAWN)
    alone = [generate(session, [ids], DRAWN, speculate=0)[0] for ids in prompts]
    assert [done.ids for done in together] == [done.ids for done in alone]


def drafts_by_hand(session, known: list[int]) -> list[int]:
    """Draft after ``known`` by evaluating each depth over the whole sequence, its own drafts appended."""
    drafts: list[int] = []
    for depth in range(3):
        # Index m − 1 of a depth is fed the newest known token (depth 1) or the draft before; m = len(known) − 1.
        logits = session.mtp_logits([*known, *drafts])[depth]
        drafts.append(int(logits[len(known) - 2].argmax()))
    return drafts


def test_drafts_equal_the_heads_evaluated_over_the_whole_sequence():
    """After prefill and after every step, drafts and their caches equal a recomputation from nothing."""
    session = tiny_session()
    batch = Batch(session.runner(3), session.params, [PROMPT], [GREEDY], dtype=session.dtype)
    known = PROMPT + batch.prefill()
    for _ in range(12):
        assert np.asarray(batch.state.progress.draft_SK)[0].tolist() == drafts_by_hand(session, known)
        known += batch.step([True])[0]


def with_drafts(state, drafts):
    return state._replace(progress=state.progress._replace(draft_SK=drafts))


@pytest.mark.slow
def test_right_drafts_are_all_accepted():
    """With the answer itself as drafts, every step emits four tokens, past the window and round the ring."""
    session = tiny_session()
    answer = generate(session, [PROMPT], GREEDY, speculate=0)[0].ids
    batch = Batch(session.runner(3), session.params, [PROMPT], [GREEDY], dtype=session.dtype)
    known = batch.prefill()
    while len(known) < 36:
        drafts = np.asarray([answer[len(known) : len(known) + 3]], np.int32)
        batch.state = with_drafts(batch.state, drafts)
        new = batch.step([True])[0]
        assert len(new) == 4
        known += new
    assert known == answer[: len(known)]


@pytest.mark.slow
def test_partly_right_drafts_are_accepted_as_far_as_they_are_right():
    session = tiny_session()
    answer = generate(session, [PROMPT], GREEDY, speculate=0)[0].ids
    batch = Batch(session.runner(3), session.params, [PROMPT], [GREEDY], dtype=session.dtype)
    known = batch.prefill()
    for right in [0, 1, 2, 3, 0, 3, 2, 1, 1, 0, 2] * 2:
        if len(known) > 34:
            break
        drafts = answer[len(known) : len(known) + 3]
        drafts = [token if i < right else (token + 1) % 128 for i, token in enumerate(drafts)]
        batch.state = with_drafts(batch.state, np.asarray([drafts], np.int32))
        new = batch.step([True])[0]
        assert len(new) == right + 1
        known += new
    assert known == answer[: len(known)]


@pytest.mark.slow
def test_an_idle_row_keeps_its_state():
    session = tiny_session()
    pair = Batch(session.runner(3), session.params, [PROMPT, PROMPT[:5]], [GREEDY] * 2, dtype=session.dtype)
    first = pair.prefill()
    tokens = [[token] for token in first]
    for live in [(True, False), (True, False), (False, True), (True, True), (False, True), (True, True)]:
        for row, new in enumerate(pair.step(live)):
            assert bool(new) == live[row]
            tokens[row] += new
    for row, prompt in enumerate([PROMPT, PROMPT[:5]]):
        alone = generate(session, [prompt], GREEDY, speculate=0)[0].ids
        assert tokens[row] == alone[: len(tokens[row])]
