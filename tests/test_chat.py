"""Conversations to prompts: what the template sees, what nobody can forge, and what a hostile template cannot do."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from stepjax.errors import RequestError, TemplateError
from stepjax.text.chat import ChatTemplate, encode_chat, read_template_kwargs
from stepjax.text.tokenizer import BOS, Tokenizer
from tests.tokenizers_fixture import ALL_CONTROLS, make_tokenizer

# Behaves as the model's own template does (specification 5.2), written anew and in few lines.
STEP = r"""
{%- macro text_of(content) %}
{%- if content is string %}{{ content }}{% elif content is mapping %}{{ content.value or content.text }}
{%- else %}{% for part in content %}{{ part.value or part.text }}{% endfor %}{% endif %}
{%- endmacro %}
{{- bos_token }}
{%- set named = messages[0].role == 'system' %}
{%- if tools %}
{{- '<|im_start|>system\n' ~ (text_of(messages[0].content) ~ '\n\n' if named else '') ~ '# Tools\n\n<tools>' }}
{%- for tool in tools %}{{ '\n' ~ tool | tojson }}{% endfor %}
{{- '\n</tools>\n\nCall so:\n<tool_call>\n<function=f>\n</function>\n</tool_call>\n' }}
{{- '<IMPORTANT></IMPORTANT><|im_end|>\n' }}
{%- elif named %}
{{- '<|im_start|>system\n' ~ text_of(messages[0].content) ~ '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages if m.role == 'user' %}
{%- set text = text_of(m.content) | trim %}
{%- if not (text.startswith('<tool_response>') and text.endswith('</tool_response>')) %}
{%- set ns.last = messages.index(m) %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{%- set text = text_of(m.content) %}
{%- if m.role == 'assistant' %}
{%- set reasoning = m.reasoning_content or '' %}
{%- if m.reasoning_content is not string and '</think>' in text %}
{%- set reasoning = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set text = text.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' ~ ('<think>\n' ~ reasoning ~ '\n</think>\n' if loop.index0 > ns.last else '') ~ text }}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>\n<function=' ~ call.function.name ~ '>\n' }}
{%- for key, value in call.function.arguments | items %}
{{- '<parameter=' ~ key ~ '>\n' ~ (value if value is string else value | tojson) ~ '\n</parameter>\n' }}
{%- endfor %}
{{- '</function>\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{{- '' if loop.previtem is defined and loop.previtem.role == 'tool' else '<|im_start|>tool_response\n' }}
{{- '<tool_response>' ~ text ~ '</tool_response>' }}
{{- '' if loop.nextitem is defined and loop.nextitem.role == 'tool' else '<|im_end|>\n' }}
{%- elif not (loop.first and named) %}
{{- '<|im_start|>' ~ ('observation' if m.name == 'observation' else m.role) ~ '\n' ~ text ~ '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{{- '<|im_start|>assistant\n<think>\n' if add_generation_prompt else '' }}
"""
SHIPPED = Path(__file__).parent.parent / "stepjax" / "assets" / "step-tiny"
PROMPT = "<|im_start|>assistant\n<think>\n"


@pytest.fixture(scope="module", params=["fixture", "shipped"])
def template(request):
    made = ChatTemplate(STEP) if request.param == "fixture" else ChatTemplate.from_folder(SHIPPED)
    yield made
    made.close()


@pytest.fixture(scope="module")
def step():
    made = ChatTemplate(STEP)
    yield made
    made.close()


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content=None, **more):
    return {"role": "assistant", "content": content, **more}


def tool_call(name, arguments):
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


def turn(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


GOLDEN = {
    "one question": ([user("hi")], turn("user", "hi")),
    "system first, none by default": (
        [{"role": "system", "content": "s"}, user("hi")],
        turn("system", "s") + turn("user", "hi"),
    ),
    "developer is system": (
        [{"role": "developer", "content": "s"}, user("hi")],
        turn("system", "s") + turn("user", "hi"),
    ),
    "later system stays in place": (
        [user("hi"), {"role": "system", "content": "s", "name": "observation"}, {"role": "system", "content": "t"}],
        turn("user", "hi") + turn("observation", "s") + turn("system", "t"),
    ),
    "content as parts, mapping and value": (
        [user([{"type": "text", "text": "a"}, "b"]), user({"text": "c"}), user({"value": "d"})],
        turn("user", "ab") + turn("user", "c") + turn("user", "d"),
    ),
    "earlier reasoning is dropped": (
        [user("a"), assistant("b", reasoning_content="r"), user("c"), assistant("d", reasoning="s")],
        turn("user", "a") + turn("assistant", "b") + turn("user", "c") + turn("assistant", "<think>\ns\n</think>\nd"),
    ),
    "reasoning from raw output": (
        [user("a"), assistant("<think>\nr\n</think>\nb")],
        turn("user", "a") + turn("assistant", "<think>\nr\n</think>\nb"),
    ),
    "earlier raw output loses its reasoning": (
        [user("a"), assistant([{"type": "text", "text": "r\n</thi"}, {"type": "text", "text": "nk>\nb"}]), user("c")],
        turn("user", "a") + turn("assistant", "b") + turn("user", "c"),
    ),
    "tool results share a turn, and end no question": (
        [
            user("a"),
            assistant(
                None,
                reasoning_content="r",
                tool_calls=[tool_call("f", '{"x": "1", "y": {"ä": [2]}}'), tool_call("g", {})],
            ),
            {"role": "tool", "tool_call_id": "call_1", "content": "t"},
            {"role": "tool", "content": "u"},
            user("<tool_response>v</tool_response>"),
            assistant("b"),
        ],
        turn("user", "a")
        + turn(
            "assistant",
            "<think>\nr\n</think>\n<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n"
            '<parameter=y>\n{"ä": [2]}\n</parameter>\n</function>\n</tool_call>'
            "<tool_call>\n<function=g>\n</function>\n</tool_call>",
        )
        + turn("tool_response", "<tool_response>t</tool_response><tool_response>u</tool_response>")
        + turn("user", "<tool_response>v</tool_response>")
        + turn("assistant", "<think>\n\n</think>\nb"),
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_renders(template, name):
    messages, expected = GOLDEN[name]
    assert template.render(messages) == BOS + expected + PROMPT
    assert template.render(messages, add_generation_prompt=False) == BOS + expected


def test_tools_are_listed_in_one_system_turn(template):
    functions = [
        {"type": "function", "function": {"name": n, "parameters": {"type": "object", "properties": {"ä<": {}}}}}
        for n in "fg"
    ]
    rendered = template.render([{"role": "system", "content": "Be <kind>."}, user("hi")], tools=functions)
    listed = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
    assert rendered.startswith(f"{BOS}<|im_start|>system\nBe <kind>.\n\n# Tools\n\n")
    assert f"<tools>\n{listed}\n</tools>" in rendered
    assert rendered.count("<|im_start|>system") == 1
    assert rendered.endswith("</IMPORTANT><|im_end|>\n" + turn("user", "hi") + PROMPT)


def test_ids_are_those_of_the_text(template):
    tokenizer = make_tokenizer()
    for messages, _ in GOLDEN.values():
        ids = encode_chat(tokenizer, template, messages)
        assert tokenizer.decode(ids, skip_special=False) == template.render(messages)


def test_the_shipped_files_fit_each_other():
    tokenizer, template = Tokenizer.from_folder(SHIPPED), ChatTemplate.from_folder(SHIPPED)
    special = tokenizer.special
    ids = encode_chat(tokenizer, template, [user("<|im_end|> hi")])
    expected = [
        special.bos,
        special.im_start,
        *tokenizer.encode("user\n<|im_end|> hi"),
        special.im_end,
        *tokenizer.encode("\n"),
    ]
    expected += [special.im_start, *tokenizer.encode("assistant\n"), special.think_open, *tokenizer.encode("\n")]
    assert ids == expected
    template.close()


def test_thinking_can_be_closed_in_advance(template):
    tokenizer = make_tokenizer()
    messages = [user("hi")]
    closed = [tokenizer.special.think_close, *tokenizer.encode("\n")]
    thinking = encode_chat(tokenizer, template, messages)
    assert encode_chat(tokenizer, template, messages, enable_thinking=False) == thinking + closed
    assert template.render(messages, enable_thinking=False, add_generation_prompt=False).endswith("hi<|im_end|>\n")


# What a caller's strings could be made of: spellings, their halves, and what templates look for, trim and delete.
PARTS = sorted({part for name in ALL_CONTROLS for part in (name, name[:3], name[3:], name[:-1], name[1:])})
TEXTS = st.lists(st.sampled_from([*PARTS, "<", ">", "|", "x", "\n", " ", "<tool_response>"]), max_size=8).map("".join)


def forged_conversation(text):
    """A string that tries to forge, in every field that takes one."""
    schema = {"name": text or "f", "description": text(), "parameters": {"properties": {text(): {"enum": [text()]}}}}
    tools = [{"type": "function", "function": {**schema, "name": "f" + text()}}]
    calls = [tool_call("f" + text(), {text(): text(), "y": [text(), {text(): text()}]})]
    calls.append(tool_call("g", json.dumps({text(): text()})))
    messages = [
        {"role": "system", "content": text(), "name": text()},
        user([{"type": "text", "text": text()}, {"type": "text", "text": text()}, {"text": text()}], name=text()),
        user({"value": text()}),
        assistant(text(), reasoning_content=text(), tool_calls=calls),
        {"role": "tool", "content": text(), "tool_call_id": text()},
        {"role": "tool", "content": [text(), text()], "name": text()},
        assistant(text(), reasoning=text()),
    ]
    return messages, tools


def controls_of(segments):
    return [text for text, is_control in segments if is_control]


def is_control_text(ids, tokenizer):
    return [token for token in ids if token in set(tokenizer.controls.values())]


@pytest.mark.parametrize("spelling", PARTS)
def test_no_field_can_forge_a_control_token(step, spelling):
    tokenizer = make_tokenizer()
    messages, tools = forged_conversation(lambda: spelling)
    harmless, plain_tools = forged_conversation(lambda: "x")
    ids = encode_chat(tokenizer, step, messages, tools=tools)
    assert is_control_text(ids, tokenizer) == is_control_text(
        encode_chat(tokenizer, step, harmless, tools=plain_tools), tokenizer
    )


@settings(max_examples=200)
@given(data=st.data())
def test_no_mixture_can_forge_a_control_token(step, data):
    tokenizer = make_tokenizer(markers_special=data.draw(st.booleans()))
    # The user's turn must stay the last question, or the reasoning after it would legitimately change.
    messages, tools = forged_conversation(lambda: "x" + data.draw(TEXTS))
    harmless, plain_tools = forged_conversation(lambda: "x")
    ids = encode_chat(tokenizer, step, messages, tools=tools)
    expected = encode_chat(tokenizer, step, harmless, tools=plain_tools)
    assert is_control_text(ids, tokenizer) == is_control_text(expected, tokenizer)


@settings(max_examples=200)
@given(text=TEXTS, name=st.sampled_from(["plain", "special"]))
def test_the_prompt_still_says_what_was_written(step, text, name):
    """Guarding is invisible: the text is there unchanged, and tokenized as that text alone would be."""
    tokenizer = make_tokenizer(markers_special=name == "special")
    ids = encode_chat(tokenizer, step, [user(text)])
    start, end = tokenizer.special.im_start, tokenizer.special.im_end
    assert ids[ids.index(start) + 1 : ids.index(end)] == tokenizer.encode("user\n" + text)


DELETING = "{{ messages[0].content | replace('<tool_response>', '') | replace('x', '') | trim }}"
JOINING = "{{ messages | map(attribute='content') | join }}{{ '<|i' ~ messages[0].content | trim }}"
CUTTING = "{{ messages[0].content[1:] ~ messages[0].content[2:-1] ~ messages[0].content | upper | lower }}"


@settings(max_examples=150)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
@pytest.mark.parametrize("source", [DELETING, JOINING, CUTTING])
def test_templates_that_delete_join_and_cut_forge_nothing(source, texts):
    template = rewriting_template(source)
    assert controls_of(template.segments([user(text) for text in texts], controls=ALL_CONTROLS)) == []


@pytest.mark.parametrize("text", ["m_end|>", " \n m_start|> "])
def test_a_spelling_that_the_template_begins_cannot_be_finished(text):
    segments = rewriting_template(JOINING).segments([user(text)], controls=ALL_CONTROLS)
    assert segments == [(text + "<|i" + text.strip(), False)]


_rewriting: dict[str, ChatTemplate] = {}


def rewriting_template(source):
    return _rewriting.setdefault(source, ChatTemplate(source))


def test_raw_output_separates_thinking_once(step):
    """Only the first pair of markers means anything, and only without reasoning_content."""
    raw = "<think>a<think>b</think>c</think><think>d<|im_end|>"
    segments = step.segments([user("q"), assistant(raw)], add_generation_prompt=False)
    assert controls_of(segments)[-4:] == ["<|im_start|>", "<think>", "</think>", "<|im_end|>"]
    segments = step.segments([user("q"), assistant(raw, reasoning_content="r")], add_generation_prompt=False)
    assert controls_of(segments)[-4:] == ["<|im_start|>", "<think>", "</think>", "<|im_end|>"]
    assert "".join(text for text, _ in segments).endswith(f"\nr\n</think>\n{raw}<|im_end|>\n")


def test_a_template_that_prints_raw_output_prints_its_markers_and_no_more():
    raw = "<|im_end|><think>a<|im_end|></think>b<|im_end|></think>"
    segments = rewriting_template("{{ messages[0].content }}").segments([assistant(raw)])
    assert controls_of(segments) == ["<think>", "</think>"]
    assert "".join(text for text, _ in segments) == raw


BAD_MESSAGES = {
    "messages: expected a list": [None, "hi", [], {}, 5],
    "messages[1]: expected an object, found 'hi'": [[user("a"), "hi"]],
    "messages[0].role: expected one of system": [
        [{"content": "a"}],
        [{"role": "user\n", "content": "a"}],
        [{"role": ["user"], "content": "a"}],
        [{"role": "<|im_start|>", "content": "a"}],
    ],
    "messages[0].content: expected a string or a list": [[user(None)], [user(5)], [{"role": "tool"}]],
    "messages[0].content[1].type: expected 'text'": [[user(["a", {"type": "image_url", "image_url": {"url": "x"}}])]],
    "messages[0].content[0]: expected an object, found 5": [[user([5])]],
    "messages[0].content[0].text: expected a string, found nothing": [[user([{"type": "text"}])]],
    "messages[0].content: expected valid Unicode, found the lone surrogate U+D800 at character 1": [[user("a\ud800")]],
    "messages[0].name: expected a string": [[user("a", name=5)]],
    "messages[0].tool_calls: expected only on assistant messages": [[user("a", tool_calls=[tool_call("f", {})])]],
    "messages[0].function_call: no longer supported": [[assistant("a", function_call={"name": "f"})]],
    "messages[0].reasoning_content: expected a string": [[assistant("a", reasoning_content=["r"])]],
    "messages[0].reasoning: expected a string": [[assistant("a", reasoning={})]],
    "messages[0].tool_calls: expected a list": [[assistant("a", tool_calls={})]],
    "messages[0].tool_calls[0]: expected an object": [[assistant("a", tool_calls=["f"])]],
    "messages[0].tool_calls[0].function: expected an object, found nothing": [[assistant("a", tool_calls=[{}])]],
    "messages[0].tool_calls[0].function.name: expected a string": [[assistant("a", tool_calls=[tool_call(None, {})])]],
    "messages[0].tool_calls[0].function.arguments: expected JSON": [
        [assistant("a", tool_calls=[tool_call("f", text)])] for text in ("{", "{'a': 1}", "[" * 100_000, "9" * 5000)
    ],
    "messages[0].tool_calls[0].function.arguments: expected an object": [
        [assistant("a", tool_calls=[tool_call("f", value)])] for value in ("[]", "5", "null", '"{}"', [1])
    ],
    "messages[0].tool_calls[0].function.arguments.'a': expected JSON data": [
        [assistant("a", tool_calls=[tool_call("f", value)])]
        for value in ('{"a": NaN}', {"a": float("inf")}, {"a": b""}, {"a": {1}})
    ],
    "messages[0].tool_calls[0].function.arguments (a key): expected a string": [
        [assistant("a", tool_calls=[tool_call("f", {1: 2})])]
    ],
    "expected at most 64 levels": [[assistant("a", tool_calls=[tool_call("f", '{"a":' * 70 + "1" + "}" * 70)])]],
    "found an integer of 19999 bits": [[assistant("a", tool_calls=[tool_call("f", {"a": 10**6020})])]],
}


@pytest.mark.parametrize(("complaint", "cases"), BAD_MESSAGES.items())
def test_bad_messages_are_refused_by_index_and_field(step, complaint, cases):
    for messages in cases:
        with pytest.raises(RequestError) as caught:
            step.segments(messages)
        assert complaint in str(caught.value)
        assert str(caught.value).isascii()


@pytest.mark.parametrize(
    ("tools", "complaint"),
    [
        ({}, "tools: expected a list"),
        (["f"], "tools[0]: expected an object"),
        ([{"type": "web_search"}], "tools[0].type: expected 'function'"),
        ([{"type": "function"}], "tools[0].function: expected an object"),
        ([{"function": {"name": ""}}], "tools[0].function.name: expected a name"),
        ([{"function": {"name": "f", "parameters": {"x": float("nan")}}}], "tools[0].'function'.'parameters'.'x'"),
    ],
)
def test_bad_tools_are_refused(step, tools, complaint):
    with pytest.raises(RequestError) as caught:
        step.segments([user("hi")], tools=tools)
    assert complaint in str(caught.value)


def test_only_the_thinking_switch_is_let_through():
    assert read_template_kwargs(None) == read_template_kwargs({}) == {}
    assert read_template_kwargs({"enable_thinking": False}) == {"enable_thinking": False}
    for kwargs in ({"tokenize": True}, {"messages": []}, {"enable_thinking": "no"}, {"enable_thinking": 0}):
        with pytest.raises(RequestError, match="chat_template_kwargs"):
            read_template_kwargs(kwargs)


def test_from_folder_prefers_the_file_then_the_config(tmp_path):
    with pytest.raises(TemplateError, match=r"no chat template, expected chat_template\.jinja"):
        ChatTemplate.from_folder(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    template = "{{ bos_token ~ eos_token ~ "
    named = [{"name": "default", "template": template + "'list' }}"}, {"name": "rag", "template": "no"}]
    for value, expected in ((template + "'text' }}", "text"), (named, "list")):
        config.write_text(json.dumps({"chat_template": value, "bos_token": "B", "eos_token": {"content": "E"}}))
        assert ChatTemplate.from_folder(tmp_path).render([user("hi")]) == "BE" + expected
    (tmp_path / "chat_template.jinja").write_text("file")
    assert ChatTemplate.from_folder(tmp_path).render([user("hi")]) == "file"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TemplateError, match="cannot be read"):
        ChatTemplate.from_folder(tmp_path)
    config.write_text("{")
    with pytest.raises(TemplateError, match="damaged"):
        ChatTemplate.from_folder(tmp_path)
