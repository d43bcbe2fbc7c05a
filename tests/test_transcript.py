"""A growing answer against the same answer taken whole: where it ends, and what is thinking, answer and call."""

import functools
import json
from typing import NamedTuple

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers_fixture import make_tokenizer

from stepjax.errors import RequestError
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.transcript import Delta, Transcript, begins_in_reasoning
from stepjax.text.reasoning import ReasoningParser
from stepjax.text.tokenizer import IM_END as EOS_TEXT
from stepjax.text.tool_calls import ArgumentsDelta, CallStart, ContentDelta, ToolCallParser

TOKENIZER = make_tokenizer()
EOS = TOKENIZER.special.im_end
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    }
]
CALL = "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"

MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
WORDS = [
    "a",
    "ab",
    "b",
    "\n",
    " ",
    "é",
    "你好",
    "😀",
    "<",
    "</",
    "<function=add>",
    "</function>",
    "<parameter=a>1",
    "z",
]
FRAGMENTS = st.lists(st.sampled_from([*WORDS, *MARKERS, CALL, "\n</think>\n", "<|im_end|>"]), max_size=14)
STOPS = st.lists(st.sampled_from(["ab", "b", "aab", "\n\n", "é", "好😀", "</", "z ", "tion"]), max_size=3).map(tuple)


def encode(*fragments: str) -> list[int]:
    """Ids as a model emits them: a control token's spelling is its id."""
    ids = []
    for text in fragments:
        ids += [TOKENIZER.controls[text]] if text in TOKENIZER.controls else TOKENIZER.encode(text)
    return ids


def byte_ids(text: str) -> list[int]:
    """One id per UTF-8 byte."""
    by_bytes = {TOKENIZER.token_bytes([token]): token for token in reversed(range(len(TOKENIZER)))}
    return [by_bytes[bytes([byte])] for byte in text.encode()]


def transcript(params: SamplingParams | None = None, **options) -> Transcript:
    return Transcript(params or SamplingParams(), **{"eos_ids": {EOS}, "tokenizer": TOKENIZER} | options)


def cut(text: str, stops: tuple[str, ...]) -> str | None:
    """The text before the stop string that is complete first, None without one: the plain rule, prefix by prefix."""
    for end in range(len(text) + 1):
        if any(text[:end].endswith(stop) for stop in stops):
            return min((text[:end].removesuffix(stop) for stop in stops), key=len)
    return None


class Told(NamedTuple):
    """What a text says: its thinking, the runs of content between calls, and the calls."""

    reasoning: str
    runs: list[str]
    calls: list[tuple[str, str]]


def told(text: str, *, in_reasoning: bool, with_tools: bool, final: bool) -> Told:
    """Parsed in one piece. Before the end of an answer, what could still become a marker or a call is left out."""
    parser, tools = ReasoningParser(in_reasoning=in_reasoning), ToolCallParser(TOOLS)
    pieces = [parser.push(text), *([parser.flush()] if final else [])]
    content = "".join(piece.content for piece in pieces)
    events = [ContentDelta(content)]
    if with_tools:
        events = [*tools.push(content), *(tools.flush() if final else [])]
    runs, calls = [""], []
    for event in events:
        if isinstance(event, ContentDelta):
            runs[-1] += event.text
        elif isinstance(event, ArgumentsDelta):
            calls.append((calls.pop()[0], event.text))
        else:
            calls.append((event.name, ""))
            runs.append("")
    return Told("".join(piece.reasoning for piece in pieces), runs, calls)


def stopped(said: Told, stops: tuple[str, ...]) -> Told | None:
    """The same up to the stop string that is complete first, None without one."""
    for index, run in enumerate(said.runs):
        end = cut(run, stops)
        if end is not None:
            return Told(said.reasoning, [*said.runs[:index], end], said.calls[:index])
    return None


def taken_whole(ids: list[int], params: SamplingParams, **options: bool) -> tuple[list[int], Told, str]:
    """(ids, what they say, reason) by trying every length in turn."""
    for count in range(1, len(ids) + 1):
        text, reason = TOKENIZER.decode(ids[:count]), None
        if ids[count - 1] == EOS:
            reason = "stop"
        else:
            sure = text.removesuffix("\N{REPLACEMENT CHARACTER}")
            said = stopped(told(sure, final=False, **options), params.stop)
            if said is not None:
                return ids[:count], said, "stop"
            reason = "length" if count == params.max_tokens else None
        if reason:
            break
    else:
        count, text, reason = len(ids), TOKENIZER.decode(ids), "cancelled"
    said = told(text, final=True, **options)
    end = stopped(said, params.stop)
    return ids[:count], end or said, "stop" if end and reason == "length" else reason


@settings(max_examples=300)
@given(st.data(), FRAGMENTS, STOPS, st.booleans(), st.booleans(), st.booleans())
def test_any_grouping_equals_the_answer_taken_whole(data, fragments, stops, in_reasoning, with_tools, include):
    ids = data.draw(st.sampled_from([encode(*fragments), byte_ids("".join(fragments))]))
    params = SamplingParams(stop=stops, max_tokens=data.draw(st.integers(1, len(ids) + 2)))
    growing = transcript(params, in_reasoning=in_reasoning, tools=TOOLS if with_tools else None, include_stop=include)
    deltas, at = [], 0
    while at < len(ids):
        size = data.draw(st.integers(1, 5))
        deltas.append(growing.push(ids[at : at + size]))
        at += size
    deltas.append(growing.end("cancelled"))

    kept, said, reason = taken_whole(ids, params, in_reasoning=in_reasoning, with_tools=with_tools)
    found = told(growing.text, in_reasoning=in_reasoning, with_tools=with_tools, final=True)
    content = "".join(said.runs) + (growing.stopped_at or "" if include else "")
    assert growing.ids == kept
    assert (growing.reasoning, growing.content) == (said.reasoning, content)
    assert [(call.name, call.arguments) for call in growing.calls] == said.calls
    assert growing.finish_reason == ("tool_calls" if said.calls and reason == "stop" else reason)
    assert TOKENIZER.decode(kept).startswith(growing.text)
    assert (found.reasoning, "".join(found.runs), found.calls) == (said.reasoning, content, said.calls)
    # What was streamed is what there is in the end.
    streamed = functools.reduce(Delta.join, deltas)
    assert (streamed.reasoning, streamed.content) == (said.reasoning, content)
    assert [event.name for event in streamed.calls if isinstance(event, CallStart)] == [name for name, _ in said.calls]


@given(st.text("ab\né😀", max_size=20), STOPS)
def test_a_stop_string_cuts_alike_however_the_text_is_tokenized(text, stops):
    params = SamplingParams(stop=stops)
    texts = set()
    for ids in (TOKENIZER.encode(text), byte_ids(text), encode(*text)):
        one = transcript(params)
        one.push(ids)
        one.end("cancelled")
        texts.add(one.text)
    stopped = cut(text, stops)
    assert texts == {text if stopped is None else stopped}


def test_the_stop_that_is_complete_first_wins_even_if_another_began_earlier():
    one = transcript(SamplingParams(stop=("abcd", "bc")))
    assert one.push(TOKENIZER.encode("xabcdef")).content == "xa"
    assert one.finish_reason == "stop"


def test_what_may_become_a_stop_string_is_held_back_and_then_released():
    one = transcript(SamplingParams(stop=("</end>",)))
    assert [one.push([token]).content for token in byte_ids("a</en")] == ["a", "", "", "", ""]
    assert one.push(byte_ids("x")).content == "</enx"
    assert [one.push([token]).content for token in byte_ids("</")] == ["", ""]
    assert one.end("cancelled").content == "</"
    assert (one.text, one.finish_reason) == ("a</enx</", "cancelled")


def test_a_stop_string_across_the_bytes_of_characters():
    one = transcript(SamplingParams(stop=("é😀",)))
    assert "".join(one.push([token]).content for token in byte_ids("aéé😀b")) == "aé"
    assert len(one.ids) == len("aéé😀".encode())


@pytest.mark.parametrize("stop", ["why", "</think>", "\n", "ny\n", "\n</think>"])
def test_a_stop_string_acts_on_the_answer_and_not_on_the_thinking(stop):
    one = transcript(SamplingParams(stop=(stop,)), in_reasoning=True)
    one.push(encode("why\nany\n", "</think>", "\nbecause\nof why\n", EOS_TEXT))
    end = {"why": "because\nof ", "\n": "because"}.get(stop, "because\nof why\n")
    assert (one.reasoning, one.content, one.finish_reason) == ("why\nany", end, "stop")
    assert one.stopped_at == (stop if len(end) < 15 else None)
    assert one.text == f"why\nany\n</think>\n{end}"


@pytest.mark.parametrize("stop", ["\n", "add", "1", "</tool_call>", "hino"])
def test_a_stop_string_acts_neither_within_nor_across_calls(stop):
    one = transcript(SamplingParams(stop=(stop,)), tools=TOOLS)
    one.push([*encode("hi"), *byte_ids(CALL), *encode("no", EOS_TEXT)])
    assert ([call.arguments for call in one.calls], one.content) == (['{"a": 1}'], "hino")
    assert (one.stopped_at, one.finish_reason) == (None, "tool_calls")
    one = transcript(SamplingParams(stop=(stop,)))  # without tools, the same text is content
    one.push([*encode("hi"), *byte_ids(CALL), EOS])
    assert (one.stopped_at is None) == (stop == "hino")


def test_a_block_that_never_closes_is_content_and_ends_at_a_stop_string():
    one = transcript(SamplingParams(stop=("\n",), max_tokens=50), tools=TOOLS)
    one.push(byte_ids("hi <tool_call>\n<function=add>\n<parameter=a>\n" + "1" * 50))
    assert (one.content, one.stopped_at, one.finish_reason) == ("hi <tool_call>", "\n", "stop")


@pytest.mark.parametrize(
    ("least", "content"), [(0, "x"), (2, "x"), (3, "x"), (4, "xax"), (6, "xaxax"), (9, "xaxaxaxab")]
)
def test_a_stop_string_counts_once_the_answer_has_its_least_length(least, content):
    """Tokens of the thinking do not count. A stop string may begin among the first tokens and end after them."""
    params = SamplingParams(stop=("ax", "axa"), min_tokens=least, max_tokens=100)
    one = transcript(params, in_reasoning=True)
    one.push([*encode("axaxax", "</think>"), *byte_ids("xaxaxaxab"), EOS])
    assert one.num_reasoning == len(encode("axaxax"))
    assert one.content == content


def test_tokens_after_the_end_are_ignored():
    one = transcript(SamplingParams(max_tokens=3))
    one.push(byte_ids("abcdef"))
    assert (one.text, len(one.ids), one.finish_reason) == ("abc", 3, "length")
    assert one.push(byte_ids("gh")) == one.end("cancelled") == Delta()
    assert (one.text, one.finish_reason) == ("abc", "length")


def test_an_end_id_stays_in_the_ids_and_not_in_the_text():
    one = transcript()
    one.push([*byte_ids("a"), EOS, *byte_ids("b")])
    assert (one.ids, one.text, one.finish_reason) == ([*byte_ids("a"), EOS], "a", "stop")


def test_own_stop_ids_and_ignored_ends():
    (a, b) = byte_ids("ab")
    one = transcript(SamplingParams(stop_ids=(b,), ignore_eos=True))
    one.push([a, EOS, a, b, a])
    assert (one.ids, one.text, one.finish_reason) == ([a, EOS, a, b], "aa", "stop")


def test_a_stop_on_the_last_allowed_token_is_a_stop():
    for params in (
        SamplingParams(max_tokens=2, stop=("b",)),
        SamplingParams(max_tokens=2, stop_ids=(byte_ids("b")[0],)),
    ):
        one = transcript(params)
        one.push(byte_ids("ab"))
        assert (one.text, one.finish_reason) == ("a", "stop")


def test_half_a_character_at_the_end_is_marked():
    one = transcript(SamplingParams(max_tokens=2))
    one.push(byte_ids("a😀"))
    assert one.text == one.content == "a\N{REPLACEMENT CHARACTER}"


def test_calls_come_as_events_in_order():
    one = transcript(tools=TOOLS, in_reasoning=True)
    deltas = [one.push([token]) for token in [*encode("t", "</think>", "\nhi\n"), *byte_ids(CALL + CALL), EOS]]
    events = [event for delta in deltas for event in delta.calls]
    assert [type(event) for event in events] == [CallStart, ArgumentsDelta] * 2
    assert [event.index for event in events] == [0, 0, 1, 1]
    assert [json.loads(call.arguments) for call in one.calls] == [{"a": 1}] * 2
    assert len({call.id for call in one.calls}) == 2
    assert (one.reasoning, one.content, one.finish_reason) == ("t", "hi\n", "tool_calls")


@pytest.mark.parametrize(
    ("tail", "max_tokens", "reason"),
    [([EOS], 1000, "tool_calls"), ([], 1000, "cancelled"), (encode("x"), len(byte_ids(CALL)) + 1, "length")],
)
def test_only_an_answer_that_ends_by_itself_finishes_with_its_calls(tail, max_tokens, reason):
    one = transcript(SamplingParams(max_tokens=max_tokens), tools=TOOLS)
    one.push([*byte_ids(CALL), *tail])
    one.end("cancelled")
    assert len(one.calls) == 1
    assert one.finish_reason == reason


def test_without_tools_a_call_is_content():
    one = transcript()
    one.push([*byte_ids(CALL), EOS])
    assert (one.content, one.calls, one.finish_reason) == (CALL, [], "stop")


def test_without_a_tokenizer_there_are_ids_only():
    one = transcript(SamplingParams(stop=("a",), max_tokens=3), tokenizer=None)
    assert one.push([5, 6]) == Delta()
    one.push([7, 8])
    assert (one.ids, one.text, one.finish_reason) == ([5, 6, 7], "", "length")
    one = transcript(tokenizer=None)
    one.push([5, EOS])
    assert one.finish_reason == "stop"


@pytest.mark.parametrize(
    ("prompt", "thinking"),
    [
        (["plain text"], False),
        (["<|im_start|>", "a\n", "<think>", "\n"], True),
        (["<think>", "\n", "</think>", "\n"], False),
        (["<think>", "x", "</think>", "y", "<think>"], True),
        (["</think>"], False),
    ],
)
def test_a_prompt_begins_thinking_if_its_last_marker_opens_it(prompt, thinking):
    assert begins_in_reasoning(encode(*prompt), TOKENIZER) is thinking


@pytest.mark.parametrize("stop", ["ab", ("",), (3,)])
def test_stops_that_are_not_strings_are_refused(stop):
    with pytest.raises(RequestError, match="stop: is"):
        SamplingParams(stop=stop)
