"""The streaming tool-call parser against the one-shot parser, and that against examples."""

import itertools
import json
import re
import time

import pytest
from hypothesis import given, strategies as st

from stepjax.text.reasoning import ReasoningParser, split_reasoning
from stepjax.text.tool_calls import ArgumentsDelta, CallStart, ContentDelta, ToolCallParser, parse


def tool(name, **properties):
    parameters = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [
    tool("weather", city="string", days="integer"),
    tool("run", code="string", path="string"),
    tool("all", s="string", i="integer", n="number", b="boolean", o="object", a="array"),
    tool("now"),
]


def call(name, /, wrapped=True, **values: str):
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    function = f"<function={name}>\n{body}</function>"
    return f"<tool_call>\n{function}\n</tool_call>" if wrapped else function


W = call("weather", city="Paris")
PARIS = ("weather", {"city": "Paris"})

EXAMPLES = {
    # output: (content, calls)
    "": ("", []),
    "just text\n": ("just text\n", []),
    " \n ": (" \n ", []),
    W: ("", [PARIS]),
    f"Let me see.\n\n{W}": ("Let me see.\n\n", [PARIS]),
    f"\n\n{W}\n": ("", [PARIS]),
    f"{W}\n \n{W}": ("", [PARIS, PARIS]),
    f"{W}{W} done": (" done", [PARIS, PARIS]),
    f"{W}\nand\n{W}\n": ("\nand\n", [PARIS, PARIS]),
    call("now"): ("", [("now", {})]),
    call("now", wrapped=False): ("", [("now", {})]),
    f"a {call('weather', wrapped=False, city='Paris')} b": ("a  b", [PARIS]),
    f"<tool_call>{call('weather', wrapped=False, city='Paris')}\n{call('now', wrapped=False)}</tool_call>": (
        "",
        [PARIS, ("now", {})],
    ),
    # on one line, without newlines around values
    "<tool_call><function=weather><parameter=city>Paris</parameter></function></tool_call>": ("", [PARIS]),
    # values are verbatim but for one newline at each end
    call("run", code="\n  x = 1\n\ty < 2 > 3 && </b>\n"): ("", [("run", {"code": "\n  x = 1\n\ty < 2 > 3 && </b>\n"})]),
    call("run", code=""): ("", [("run", {"code": ""})]),
    call("run", code="ŝ 你好 😀 \\ \" '"): ("", [("run", {"code": "ŝ 你好 😀 \\ \" '"})]),
    # tags inside values
    call("run", code="a </tool_call> b"): ("", [("run", {"code": "a </tool_call> b"})]),
    call("run", code="a </parameter> b"): ("", [("run", {"code": "a </parameter> b"})]),
    call("run", code="a </function> b"): ("", [("run", {"code": "a </function> b"})]),
    call("run", code="<parameter=x> <tool_call> <function=f>"): (
        "",
        [("run", {"code": "<parameter=x> <tool_call> <function=f>"})],
    ),
    # missing ends
    "<tool_call><function=run><parameter=code>1<parameter=path>2</parameter></function></tool_call>": (
        "",
        [("run", {"code": "1", "path": "2"})],
    ),
    "<tool_call><function=other><parameter=x>1<parameter=y>2</function></tool_call>": (
        "",
        [("other", {"x": "1", "y": "2"})],
    ),
    "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</function>\n</tool_call>": ("", [PARIS]),
    "<tool_call><function=weather><parameter=city>Paris</parameter></tool_call>": ("", [PARIS]),
    f"<tool_call><function=weather><parameter=city>Paris</tool_call>\n{W}": ("", [PARIS, PARIS]),
    # an abandoned call's value takes in what follows: it could be code
    f"<tool_call><function=run><parameter=code>x {call('weather', city='Paris')}": (
        "",
        [("run", {"code": "x <tool_call>\n<function=weather>\n<parameter=city>\nParis"})],
    ),
    # names
    "<tool_call><function=\"weather\"><parameter='city'>Paris</parameter></function></tool_call>": ("", [PARIS]),
    "<tool_call><function==weather><parameter=city=>Paris</parameter></function></tool_call>": ("", [PARIS]),
    call(""): (call(""), []),
    f"{call('')}{W}": (call(""), [PARIS]),
    W.replace("<parameter=city>", "<parameter=>\nx\n</parameter>\n<parameter=city>"): ("", [PARIS]),
    # prose and blocks that are none
    "Use the <tool_call> tag.": ("Use the <tool_call> tag.", []),
    "Write <function=name> so.": ("Write <function=name> so.", []),
    'a <tool_call>{"name": "f"}</tool_call> b': ('a <tool_call>{"name": "f"}</tool_call> b', []),
    f'<tool_call>{{"name": "f"}}</tool_call>\n{W}': ('<tool_call>{"name": "f"}</tool_call>\n', [PARIS]),
    "<tool_call>": ("<tool_call>", []),
    "</tool_call>": ("</tool_call>", []),
    "a <tool_c": ("a <tool_c", []),
    "<tool_call>\n<function=weather>\n<parameter=city>\nPar": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nPar",
        [],
    ),
    f"<tool_call><function=a>\n{W}": ("<tool_call><function=a>\n", [PARIS]),
    f"<tool_call>{' ' * 65}<function=now></function></tool_call>": (
        f"<tool_call>{' ' * 65}</tool_call>",
        [("now", {})],
    ),
    f"<function={'f' * 257}></function>": (f"<function={'f' * 257}></function>", []),
}

FRAGMENTS = [
    "<tool_call>",
    "</tool_call>",
    "<function=weather>",
    "<function=>",
    "<function=",
    "</function>",
    "<parameter=city>",
    "<parameter=x>",
    "</parameter>",
    "\n",
    " ",
    " " * 40,
    "a",
    "<",
    "</",
    W,
    call("weather", wrapped=False, city="Oslo", days="3"),
]
OUTPUTS = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)


def stream(pieces, tools=TOOLS):
    """Content and (name, arguments) of the streamed events, after checking their form."""
    parser = ToolCallParser(tools)
    events = [event for piece in pieces for event in parser.push(piece)] + parser.flush()
    content, names, arguments, ids = "", [], [], set()
    for event in events:
        match event:
            case ContentDelta(text):
                assert text
                content += text
            case CallStart(index, identifier, name):
                assert index == len(names) == len(arguments)
                assert re.fullmatch("call_[0-9a-f]{24}", identifier)
                assert identifier not in ids
                ids.add(identifier)
                names.append(name)
                arguments.append("")
            case ArgumentsDelta(index, text):
                assert index == len(names) - 1
                arguments[index] += text
    return content, list(zip(names, arguments, strict=True))


def whole(text, tools=TOOLS):
    content, calls = parse(text, tools)
    return content, [(found.name, found.arguments) for found in calls]


def in_two(text):
    return ([text[:i], text[i:]] for i in range(len(text) + 1))


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples(text):
    content, calls = whole(text)
    assert (content, [(name, json.loads(arguments)) for name, arguments in calls]) == EXAMPLES[text]


@pytest.mark.parametrize("text", EXAMPLES)
def test_every_two_piece_split_and_every_character(text):
    expected = whole(text)
    for pieces in ([text], list(text), *in_two(text)):
        assert stream(pieces) == expected, pieces


@given(text=OUTPUTS, data=st.data())
def test_any_pieces_give_what_the_whole_gives(text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    groups = [text[i:j] for i, j in itertools.pairwise([0, *cuts, len(text)])]
    expected = whole(text)
    assert stream(groups) == stream(list(text)) == expected


@given(text=st.lists(st.sampled_from(["<think>", "</think>", *FRAGMENTS]), max_size=10).map("".join))
def test_behind_the_reasoning_parser(text):
    """Markers of both parsers in one delta, as speculative decoding delivers them."""
    reasoning = ReasoningParser()
    pieces = [reasoning.push(char).content for char in text] + [reasoning.flush().content]
    assert stream(pieces) == whole(split_reasoning(text).content)


@given(code=st.text(st.sampled_from(list("ab<>/\n ='\"{}=\\😀"))), path=st.text(st.sampled_from(list("ab \n"))))
def test_values_survive(code, path):
    text = call("run", code=code, path=path)
    expected = {"code": code, "path": path}
    ((_, arguments),) = whole(text)[1]
    assert json.loads(arguments) == {key: None if value == "null" else value for key, value in expected.items()}


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("s", "5", "5"),
        ("s", " a ", " a "),
        ("s", "null", None),
        ("s", "null\n", "null\n"),
        ("unknown", "5", "5"),
        ("unknown", "null", None),
        ("i", "5", 5),
        ("i", " -5 ", -5),
        ("i", "5.0", 5),
        ("i", "5.5", "5.5"),
        ("i", "five", "five"),
        ("i", "1_000", "1_000"),
        ("i", "٣", "٣"),
        ("i", "9" * 30, int("9" * 30)),
        ("i", "9" * 5000, "9" * 5000),
        ("n", "0.5", 0.5),
        ("n", "5.0", 5),
        ("n", "1e3", 1000),
        ("n", "1e300", 1e300),
        ("n", "1e400", "1e400"),
        ("n", "nan", "nan"),
        ("n", "Infinity", "Infinity"),
        ("b", "true", True),
        ("b", "False", False),
        ("b", "yes", "yes"),
        ("o", '{"a": [1, null, "é"]}', {"a": [1, None, "é"]}),
        ("o", "{'a': True, 'b': None}", {"a": True, "b": None}),
        ("o", "{a: 1}", "{a: 1}"),
        ("a", "[1, 2]", [1, 2]),
        ("a", "(1, 2)", [1, 2]),
        ("a", "[NaN]", "[NaN]"),
        ("a", "{1, 2}", "{1, 2}"),
        ("a", "[1e999, -1e999]", [1.7976931348623157e308, -1.7976931348623157e308]),
        ("o", '{"a": "\\ud800"}', '{"a": "\\ud800"}'),
        ("a", "[" * 10_000, "[" * 10_000),
        ("a", "__import__('os')", "__import__('os')"),
        ("a", "", ""),
    ],
)
def test_values_are_typed_by_the_schema(kind, text, value):
    ((name, arguments),) = whole(call("all", **{kind: text}))[1]
    assert name == "all"
    assert json.loads(arguments) == {kind: value}
    assert type(json.loads(arguments)[kind]) is type(value)


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "5", 5),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "null", None),
        ({"type": ["string", "integer"]}, "5", "5"),
        ({"type": ["integer", "string"]}, "5", 5),
        ({"type": ["integer", "string"]}, "x", "x"),
        ({"oneOf": [{"type": "boolean"}, {"type": "object"}]}, "{}", {}),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"type": {"odd": 1}}, "1", "1"),
        ({"type": [["odd"]]}, "1", "1"),
        ("odd", "1", "1"),
        (None, "1", "1"),
    ],
)
def test_unions_and_odd_schemas(schema, text, value):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": schema}}}}]
    assert whole(call("f", x=text), tools) == ("", [("f", json.dumps({"x": value}))])


@pytest.mark.parametrize(
    "tools",
    [None, [], [None], [{}], [{"function": None}], [{"function": {"name": 5}}], [{"name": "f", "parameters": 1}]],
)
def test_unreadable_tools_type_nothing(tools):
    assert whole(call("f", x="1"), tools) == stream([call("f", x="1")], tools) == ("", [("f", '{"x": "1"}')])


def test_arguments_keep_their_characters():
    assert whole(call("weather", city="北京 é"))[1] == [("weather", '{"city": "北京 é"}')]


def test_prose_about_tags_does_not_wait():
    parser = ToolCallParser(TOOLS)
    shown = "".join(
        event.text
        for event in parser.push("Use <tool_call> as in <function=f> and go on. <")
        if isinstance(event, ContentDelta)
    )
    assert shown == "Use <tool_call> as in <function=f> and go on. "


def test_a_call_is_emitted_when_it_closes():
    parser = ToolCallParser(TOOLS)
    assert parser.push(W[:-1]) == []
    assert [type(event) for event in parser.push(W[-1])] == [CallStart, ArgumentsDelta]
    # without the function's end, only the next block's opening tells
    assert parser.push("<tool_call><function=run><parameter=code>1</tool_call>" + "\n" * 9 + "<tool_call") == []
    assert [type(event) for event in parser.push(">")] == [CallStart, ArgumentsDelta]


LONG = {
    "value": call("run", code="x < y </p> " * 40_000),
    "openings": "<tool_call><function=run><parameter=code>" * 10_000,
    "bare openings": "<function=" * 40_000,
    "functions": "<function=f>\n</function>" * 10_000,
    "parameters": "<tool_call><function=f>" + "<parameter=" * 40_000 + "</function></tool_call>",
    "closes": call("run", code="</tool_call>x" * 30_000),
    "spaced closes": "<tool_call><function=f><parameter=x>" + ("</tool_call>" + " " * 60) * 5_000,
    "ends": call("run", code="</parameter></function> x" * 20_000),
    "spaces": "<tool_call>" + " " * 400_000,
    "headers": "<tool_call> " * 40_000,
    "equals": "<tool_call><function=f><parameter=" + "=" * 400_000 + "></function></tool_call>",
}


@pytest.mark.parametrize("name", LONG)
def test_nothing_takes_quadratic_time(name):
    """With 400 000 characters, quadratic means minutes."""
    text = LONG[name]
    started = time.process_time()
    expected = whole(text)
    assert stream([text]) == expected
    assert time.process_time() - started < 3
    assert stream([text[i : i + 50] for i in range(0, len(text), 50)]) == expected
    assert time.process_time() - started < 6
