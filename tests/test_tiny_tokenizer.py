"""step-tiny's tokenizer and chat template, alone and through the code that serves them."""

from __future__ import annotations

import itertools
import json
import re

import numpy as np
import pytest
from items import items
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from stepjax.text import chat, tokenizer as tokenizer_module
from stepjax.train.data import task_batches, tasks, tiny_tokenizer, tools as toolbox, words

MAX_COMPLETION = 72  # tokens; what an evaluation must allow for
SPLITS: tuple[words.Split, ...] = ("train", "test")


def test_tokenizer_is_the_one_its_script_builds(tokenizer: Tokenizer) -> None:
    pieces = [str(tokenizer.id_to_token(i)) for i in range(265, tokenizer.get_vocab_size())]
    assert tokenizer.get_vocab_size() <= tiny_tokenizer.MAX_ENTRIES
    assert tiny_tokenizer.build(pieces).to_str() == tokenizer.to_str()
    assert set(pieces) <= set(tiny_tokenizer.candidates(tasks.TinyTemplate()))
    for index, entry in enumerate(tiny_tokenizer.SPECIALS):
        assert tokenizer.encode(entry, add_special_tokens=False).ids == [index]
    for byte in range(128):
        assert tokenizer.encode(chr(byte), add_special_tokens=False).ids == [9 + byte]
    identifiers = {tool.name for tool in toolbox.TOOLS}
    roles = {piece for piece in pieces if re.match(r"[a-z_]+\n", piece)}
    for piece in pieces:
        assert not re.search(r"\d", piece)
        if piece not in identifiers | roles:
            assert re.fullmatch(r"[^a-z0-9].*[^A-Za-z0-9]", piece, re.DOTALL), piece


def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer) -> None:
    for text in (
        "",
        " ",
        "ÆØÅ æøå",
        "日本語 😀",
        "a\r\n\tb",
        'What is "x',
        "Ġ▁|<|im_star",
        "<|im_end|><think>",
        "\x00\x7f\u2028",
    ):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(tokenizer.encode("<|im_start|>x</think><tool_call>").ids) == "x</think><tool_call>"


def test_slots_are_spelled_in_bytes(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    slots = [*words.CITIES, *(words.word(rng, "train") for _ in range(300)), *(str(n) for n in range(0, 1000, 7))]
    slots += ["hello", "weather", "city", "carry", "minutes", "cloudy", "Paris", "assistant", "user"]
    frames = ('Spell "{}" backwards.', "What is the weather in {}?", "=city>\n{}\n</parameter>\n", "{}<|im_end|>")
    for slot, frame in itertools.product(slots, frames):
        if slot in ("assistant", "user") and "\n" in frame:
            continue  # the names of the roles are pieces when a line ends after them
        before, after = (tokenizer.encode(part, add_special_tokens=False).ids for part in frame.split("{}"))
        ids = tokenizer.encode(frame.format(slot), add_special_tokens=False).ids
        assert ids == before + [9 + byte for byte in slot.encode()] + after, (slot, frame)


@pytest.mark.parametrize("split", SPLITS)
def test_renders_survive_the_tokenizer(split: words.Split, tokenizer: Tokenizer, template: tasks.TinyTemplate) -> None:
    for item in items(split):
        prompt, completion = tasks.render(item, template)
        assert prompt.endswith("<|im_start|>assistant\n<think>\n")
        assert completion.endswith("<|im_end|>")
        assert completion.count("<|im_end|>") == 1
        example = task_batches.encode(item, tokenizer, template)
        ids = [*example.prompt, *example.completion]
        assert tokenizer.encode(prompt + completion, add_special_tokens=False).ids == ids  # no piece spans the seam
        assert tokenizer.decode(ids, skip_special_tokens=False) == prompt + completion
        assert len(example.completion) <= MAX_COMPLETION


def test_a_tool_prompt_is_short(tokenizer: Tokenizer, template: tasks.TinyTemplate) -> None:
    rng = np.random.default_rng(0)
    sizes = [
        len(task_batches.encode(tasks.make("tool_call", rng, "test"), tokenizer, template).prompt) for _ in range(300)
    ]
    assert np.mean(sizes) < 90
    assert np.percentile(sizes, 95) < 140


@pytest.mark.oracle
def test_transformers_loads_the_tokenizer(tokenizer: Tokenizer, template: tasks.TinyTemplate) -> None:
    import transformers

    loaded = transformers.PreTrainedTokenizerFast.from_pretrained(tasks.ASSETS)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 4, 2)
    for item in items("test", count=6):
        prompt, _ = tasks.render(item, template)
        options = {"tools": item.tools, "add_generation_prompt": True, "tokenize": False}
        assert loaded.apply_chat_template(item.messages, **options) == prompt
        ids = loaded(prompt, add_special_tokens=False)["input_ids"]
        assert ids == tokenizer.encode(prompt, add_special_tokens=False).ids


def test_template_turns_and_contents(template: tasks.TinyTemplate) -> None:
    bos = "<｜begin▁of▁sentence｜>"
    user = {"role": "user", "content": "a"}
    assert template.render([user], add_generation_prompt=False) == f"{bos}<|im_start|>user\na<|im_end|>\n"
    for content in (
        {"value": "a"},
        {"text": "a"},
        [{"type": "text", "text": "a"}],
        ["a"],
        [{"text": ""}, {"value": "a"}],
    ):
        same = template.render([{"role": "user", "content": content}], add_generation_prompt=False)
        assert same == f"{bos}<|im_start|>user\na<|im_end|>\n"
    system = {"role": "system", "content": "s"}
    later = [system, user, {**system, "name": "observation"}, {**system, "name": "other"}]
    assert template.render(later, add_generation_prompt=False) == (
        f"{bos}<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>observation\ns<|im_end|>\n<|im_start|>system\ns<|im_end|>\n"
    )
    merged = template.render([system, user], tools=[{"type": "function", "function": {"name": "ø"}}])
    assert merged.startswith(f"{bos}<|im_start|>system\ns\n\n# Tools\n")
    assert '\n<tools>\n{"type": "function", "function": {"name": "ø"}}\n</tools>\n' in merged
    assert re.search(
        r"<tool_call>\n<function=.*</tool_call>\n\n<IMPORTANT>\n.*\n</IMPORTANT><\|im_end\|>\n", merged, re.DOTALL
    )
    assert merged.count("<|im_start|>system") == 1
    assert merged.endswith("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n")


def test_template_keeps_reasoning_after_the_last_question_only(template: tasks.TinyTemplate) -> None:
    call = {"function": {"name": "f", "arguments": {"x": 1, "y": [1, "é"], "z": "a\nb"}}}
    called = {"role": "assistant", "reasoning_content": " r\n", "content": "c", "tool_calls": [call, {"name": "g"}]}
    inlined = {"role": "assistant", "content": "<think>\n r\n\n</think>\nc", "tool_calls": called["tool_calls"]}
    user, tool = {"role": "user", "content": "q"}, {"role": "tool", "content": "t"}
    wrapped = {"role": "user", "content": "<tool_response>u</tool_response>"}
    calls = (
        '<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n<parameter=y>\n[1, "é"]\n</parameter>\n'
        "<parameter=z>\na\nb\n</parameter>\n</function>\n</tool_call><tool_call>\n<function=g>\n</function>\n</tool_call>"
    )
    for turn in (called, inlined):
        text = template.render([user, turn, tool, tool, wrapped], add_generation_prompt=False)
        assert text.endswith(
            f"<|im_start|>assistant\n<think>\n r\n\n</think>\nc{calls}<|im_end|>\n<|im_start|>tool_response\n"
            "<tool_response>t</tool_response><tool_response>t</tool_response><|im_end|>\n"
            "<|im_start|>user\n<tool_response>u</tool_response><|im_end|>\n"
        )
        past = template.render([user, turn, tool, user], add_generation_prompt=False)
        assert f"<|im_start|>assistant\nc{calls}<|im_end|>\n" in past
    silent = template.render([user, {"role": "assistant", "content": None, "reasoning_content": None}])
    assert "<|im_start|>assistant\n<think>\n\n</think>\n<|im_end|>\n" in silent


def test_template_does_not_depend_on_white_space_options(template: tasks.TinyTemplate) -> None:
    environment = ImmutableSandboxedEnvironment()
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    plain = environment.from_string((tasks.ASSETS / "chat_template.jinja").read_text("utf-8"))
    for item in items("test", count=5):
        rendered = plain.render(messages=item.messages, tools=item.tools, add_generation_prompt=True)
        assert rendered == tasks.render(item, template)[0]


def test_serving_renders_and_encodes_as_training_does(tokenizer: Tokenizer, template: tasks.TinyTemplate) -> None:
    served, served_template = (
        tokenizer_module.Tokenizer.from_folder(tasks.ASSETS),
        chat.ChatTemplate.from_folder(tasks.ASSETS),
    )
    for item in items("test", count=4):
        example = task_batches.encode(item, tokenizer, template)
        assert chat.encode_chat(served, served_template, item.messages, tools=item.tools) == example.prompt
        assert served.decode(example.completion[:-1]) + "<|im_end|>" == tasks.render(item, template)[1]
        prompt, completion = tasks.render(item, served_template)
        assert (prompt, completion) == tasks.render(item, template)
    served_template.close()
