"""One answer as its readers see it: what updates add up to, and who ends it."""

import numpy as np
from tokenizers_fixture import make_tokenizer

from stepjax.infer.engine.answer import TokenScore, split_request
from stepjax.infer.engine.engine import Update
from stepjax.infer.engine.sequence import FinishReason
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.transcript import AnswerDelta, AnswerStream, Delta, Part, Transcript
from stepjax.text.tool_calls import ContentDelta

TOKENIZER = make_tokenizer()
EOS = TOKENIZER.special.im_end
A, B, C = (TOKENIZER.encode(letter)[0] for letter in "abc")


def stream(**params) -> AnswerStream:
    return AnswerStream(Transcript(SamplingParams(**params), eos_ids={EOS}, tokenizer=TOKENIZER))


def content(text: str, num_ids: int) -> Delta:
    return Delta("", (Part(ContentDelta(text), num_ids),))


def scores(*values: float) -> tuple[TokenScore, ...]:
    return tuple(TokenScore(value, ()) for value in values)


def test_updates_add_up_however_they_are_joined():
    updates = [
        Update("x", (A,), scores=scores(-1), prompt_scores=scores(-7)),
        Update("x", (B, C), scores=scores(-2, -3)),
        Update("x", (EOS,), "stop", scores=scores(-4), experts=np.zeros((6, 1, 2), np.uint16)),
    ]
    single, joined = stream(), stream()
    deltas = [single.take(update) for update in updates]
    whole = joined.take(*updates)
    assert deltas[1] == AnswerDelta(content("bc", 3), (B, C), scores(-2, -3), None, ended_early=False)
    assert whole == AnswerDelta(content("abc", 3), (A, B, C, EOS), scores(-1, -2, -3, -4), "stop", ended_early=False)
    for one in (single, joined):
        assert one.finish_reason == "stop"
        assert one.scores == list(whole.scores)
        assert one.prompt_scores == scores(-7)
        assert one.num_decode_steps == 2
        assert one.experts is updates[-1].experts


def test_a_stop_string_ends_it_before_the_engine():
    one = stream(stop=("b",))
    added = one.take(Update("x", (A, B, C), scores=scores(-1, -2, -3)))
    assert added == AnswerDelta(content("a", 1), (A, B), scores(-1, -2), "stop", ended_early=True)
    later = one.take(Update("x", (), "error", fault="too late"))
    assert later == AnswerDelta(Delta(), (), (), "stop", ended_early=False)
    assert one.fault == ""


def test_a_stop_string_in_the_engines_last_update():
    added = stream(stop=("b",), max_tokens=3).take(Update("x", (A, B, C), "length"))
    assert (added.ids, added.finish_reason, added.ended_early) == ((A, B), "stop", False)


def test_the_engine_ends_it_without_a_token():
    """Where a grammar lets nothing follow, where the logits are not finite, and where the grammar failed."""
    endings: list[tuple[FinishReason, str]] = [
        ("stop", ""),
        ("error", ""),
        ("error", "the grammar's limits were reached"),
    ]
    for reason, fault in endings:
        one = stream(stop=("ab",))
        assert one.take(Update("x", (A,))).delta == Delta()  # it may become a stop string
        added = one.take(Update("x", (), reason, fault=fault))
        assert added == AnswerDelta(content("a", 1), (), (), reason, ended_early=False)
        assert one.fault == fault


def test_answers_of_a_request_have_ids_and_seeds_of_their_own():
    alone = SamplingParams(seed=5, prompt_logprobs=1)
    assert split_request("x", alone) == [("x", alone)]
    top = 2**32 - 1
    assert split_request("x", SamplingParams(n=3, seed=top, prompt_logprobs=1)) == [
        ("x/0", SamplingParams(seed=top, prompt_logprobs=1)),
        ("x/1", SamplingParams(seed=0)),
        ("x/2", SamplingParams(seed=1)),
    ]
