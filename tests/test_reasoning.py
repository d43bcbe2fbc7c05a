"""The streaming reasoning parser against the plain rule, and the rule against examples."""

import itertools
import time

import pytest
from hypothesis import given, strategies as st

from stepjax.text.reasoning import ReasoningParser, reasoning_ended, split_reasoning
from tests.tokenizers_fixture import make_tokenizer

CALL = "<tool_call>\n<function=f>\n</function>\n</tool_call>"

EXAMPLES = [
    # output, reasoning, content
    ("", "", ""),
    ("thinking without end", "thinking without end", ""),
    ("thinking\n", "thinking\n", ""),
    ("why\n</think>\nbecause", "why", "because"),
    ("why\n\n</think>\n\nbecause\n", "why\n", "\nbecause\n"),
    ("why</think>because", "why", "because"),
    ("</think>because", "", "because"),
    ("\n</think>\n", "", ""),
    ("<think>\nwhy\n</think>\nbecause", "\nwhy", "because"),
    ("<think>why", "why", ""),
    ("<think><think>why", "<think>why", ""),
    ("<thi", "<thi", ""),
    ("a <b> </thin </think> c", "a <b> </thin ", " c"),
    ("a\n</think>\n</think>\nb", "a", "b"),
    ("a</think>b</think>c", "a", "bc"),
    ("a</think>\nb\n</think>\n\nc", "a", "b\n\nc"),
    (f"a\n</think>\n{CALL}", "a", CALL),
    (f"a\n</think>{CALL}", "a", CALL),
    (f"a\n{CALL}", "a", CALL),
    (f"a{CALL}\n</think>\nb", "a", f"{CALL}\nb"),
    ("a</think><tool_call>x</think>y</tool_call>z</think>!", "a", "<tool_call>x</think>y</tool_call>z!"),
    ("a</think><tool_call>x</think>", "a", "<tool_call>x</think>"),
    ("a\n<tool_cal", "a\n<tool_cal", ""),
    ("a</think>b</thi", "a", "b</thi"),
]
FRAGMENTS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "\n", "\n\n", "<", "</", "think>", "a", " "]
OUTPUTS = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)


def stream(pieces, *, in_reasoning=True):
    parser = ReasoningParser(in_reasoning=in_reasoning)
    deltas = [*(parser.push(piece) for piece in pieces), parser.flush()]
    return tuple("".join(part) for part in zip(*deltas, strict=True))


def in_two(text):
    return ([text[:i], text[i:]] for i in range(len(text) + 1))


@pytest.mark.parametrize(("text", "reasoning", "content"), EXAMPLES)
def test_examples(text, reasoning, content):
    assert split_reasoning(text) == (reasoning, content)
    for pieces in (*in_two(text), list(text)):
        assert stream(pieces) == (reasoning, content), pieces


@given(text=OUTPUTS, in_reasoning=st.booleans(), data=st.data())
def test_any_pieces_give_what_the_whole_gives(text, in_reasoning, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    groups = [text[i:j] for i, j in itertools.pairwise([0, *cuts, len(text)])]
    expected = split_reasoning(text, in_reasoning=in_reasoning)
    for pieces in (groups, list(text), *in_two(text)):
        assert stream(pieces, in_reasoning=in_reasoning) == expected


@given(text=OUTPUTS)
def test_no_more_is_held_back_than_a_marker(text):
    parser = ReasoningParser()
    given_out = dropped = 0
    for count, char in enumerate(text, 1):
        given_out += sum(map(len, parser.push(char)))
        dropped = count - given_out
    # Markers and their newlines vanish; beyond those, at most an unfinished one is missing.
    assert dropped <= len("\n<tool_call>") - 1 + text.count("think>") * len("\n</think>\n")


def test_deltas_arrive_as_soon_as_they_are_certain():
    parser = ReasoningParser()
    deltas = [tuple(parser.push(piece)) for piece in ["I see", ".", "\n", "So", "\n", "</think>", "\n", "Yes", "\n"]]
    expected = [("I see", ""), (".", ""), ("", ""), ("\nSo", ""), ("", ""), ("", ""), ("", ""), ("", "Yes"), ("", "\n")]
    assert deltas == expected


def test_one_delta_may_hold_both_kinds():
    assert ReasoningParser().push("so\n</think>\n<tool_call>\n") == ("so", "<tool_call>\n")


def test_verbatim_content_keeps_what_looks_like_a_marker():
    text = f"a\n</think>\n\nb</think>{CALL}\n</think>"
    for cut in range(len(text) + 1):
        parser = ReasoningParser(verbatim=True)
        parts = [parser.push(text[:cut]), parser.push(text[cut:]), parser.flush()]
        assert ["".join(part) for part in zip(*parts, strict=True)] == ["a", f"\nb</think>{CALL}\n</think>"]


def test_without_thinking_all_is_content():
    assert split_reasoning("a\n</think>\nb", in_reasoning=False) == ("", "a\nb")


def test_reasoning_ended_is_decided_by_the_last_marker():
    special = make_tokenizer().special
    a, (think, end, call) = 300, (special.think_open, special.think_close, special.tool_open)
    cases = {
        (): False,
        (a, a): False,
        (think, a): False,
        (think, a, end): True,
        (think, a, end, a, a): True,
        (end, a, think, a): False,
        (think, end, think, a, end, a): True,
        (think, a, call, a): True,
        (call, a, special.tool_close, think): False,
    }
    for ids, expected in cases.items():
        assert reasoning_ended(ids, special) is expected, ids


@pytest.mark.parametrize("unit", ["</think>", "<tool_call>", "<tool_call></tool_call>", "\n", "</thin", "a"])
def test_nothing_takes_quadratic_time(unit):
    text = "a</think>" + unit * (400_000 // len(unit))
    started = time.process_time()
    assert stream([text]) == split_reasoning(text)
    assert time.process_time() - started < 3
