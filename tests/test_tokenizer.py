"""Text to ids and back, against the tokenizers library itself."""

import json

import pytest
from hypothesis import given, strategies as st
from tokenizers import Tokenizer as Backend

from stepjax.errors import RequestError, TokenizerError
from stepjax.text.tokenizer import BOS, CONTROL_NAMES, IncrementalDetokenizer, Segment, Tokenizer
from tests.tokenizers_fixture import (
    ALL_CONTROLS,
    BASE_SPECIALS,
    CORPUS,
    MARKERS,
    ORDINARY_ADDED,
    added_token,
    make_spec,
    make_tokenizer,
)

BOTH = pytest.mark.parametrize("markers_special", [False, True])
SPELLINGS = st.sampled_from([*ALL_CONTROLS, *ORDINARY_ADDED, "<", "|", "think", ">", "</", " ", "\n"])
TEXTS = st.lists(st.one_of(SPELLINGS, st.sampled_from(CORPUS), st.text(st.characters(exclude_categories=["Cs"])))).map(
    "".join
)


def reference(markers_special: bool = False) -> Backend:
    return Backend.from_str(json.dumps(make_spec(markers_special=markers_special)))


@BOTH
def test_ids_are_found_by_name(markers_special):
    tokenizer, backend = make_tokenizer(markers_special=markers_special), reference(markers_special)
    special = tokenizer.special
    found = [special.bos, special.im_start, special.im_end, special.think_open, special.think_close]
    found += [special.tool_open, special.tool_close]
    assert found == [backend.token_to_id(name) for name in CONTROL_NAMES]
    assert set(tokenizer.controls) == set(ALL_CONTROLS)
    assert len(tokenizer) == tokenizer.vocab_size == backend.get_vocab_size()


@BOTH
@given(text=TEXTS)
def test_plain_text_never_becomes_control(markers_special, text):
    tokenizer = make_tokenizer(markers_special=markers_special)
    ids = tokenizer.encode(text)
    assert set(ids).isdisjoint(tokenizer.controls.values())
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text, bos=True) == [tokenizer.special.bos, *ids]


@given(text=TEXTS)
def test_text_without_control_spellings_encodes_as_the_library_does(text):
    for control in ALL_CONTROLS:
        text = text.replace(control, "")
    if not any(control in text for control in ALL_CONTROLS):
        assert make_tokenizer().encode(text) == reference().encode(text, add_special_tokens=False).ids


@BOTH
@given(pieces=st.lists(st.one_of(st.sampled_from(ALL_CONTROLS), st.sampled_from([*CORPUS, " ", "\n", "a<b"]))))
def test_rendered_segments_encode_as_the_library_encodes_trusted_text(markers_special, pieces):
    """Ordinary text beside a control token merges exactly as in the whole text, even if it came in two segments."""
    segments = [Segment(piece, piece in ALL_CONTROLS) for piece in pieces]
    halves = []
    for text, is_control in segments:
        cut = len(text) if is_control else len(text) // 2
        halves += [Segment(text[:cut], is_control), *([] if is_control else [Segment(text[cut:], False)])]
    expected = reference(markers_special).encode("".join(pieces), add_special_tokens=False).ids
    tokenizer = make_tokenizer(markers_special=markers_special)
    assert tokenizer.encode_rendered(segments) == tokenizer.encode_rendered(halves) == expected


def test_control_tokens_may_swallow_the_space_around_them():
    spec = make_spec()
    for token in spec["added_tokens"]:
        token.update(lstrip=token["content"] == "<|im_end|>", rstrip=token["content"] == "<|im_start|>")
    segments = [Segment("<|im_start|>", True), Segment(" \n a \n ", False), Segment("<|im_end|>", True)]
    expected = (
        Backend.from_str(json.dumps(spec)).encode("<|im_start|> \n a \n <|im_end|>", add_special_tokens=False).ids
    )
    assert Tokenizer(spec).encode_rendered(segments) == expected


@BOTH
@given(data=st.data())
def test_decode_equals_the_library(markers_special, data):
    tokenizer, backend = make_tokenizer(markers_special=markers_special), reference(markers_special)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1)))
    assert tokenizer.decode(ids, skip_special=False) == backend.decode(ids, skip_special_tokens=False)


@BOTH
def test_skipping_special_tokens_leaves_the_markers_that_parsers_need(markers_special):
    tokenizer = make_tokenizer(markers_special=markers_special)
    ids = [*tokenizer.controls.values(), *tokenizer.encode("hi")]
    assert tokenizer.decode(ids) == "".join(sorted(MARKERS)) + "hi"


@given(text=TEXTS, data=st.data())
def test_stream_of_text_equals_decode(text, data):
    tokenizer = make_tokenizer()
    ids = tokenizer.encode(text)
    stream = IncrementalDetokenizer(tokenizer)
    pieces = []
    while ids:
        count = data.draw(st.integers(1, 5))
        pieces.append(stream.push(ids[:count]))
        ids = ids[count:]
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert "".join(pieces) == text
    assert stream.flush() == ""


@given(data=st.data(), skip=st.booleans())
def test_stream_of_any_ids_equals_decode(data, skip):
    """Random ids are mostly invalid UTF-8: broken sequences in the middle, half characters at the end."""
    tokenizer = make_tokenizer()
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1)))
    stream = IncrementalDetokenizer(tokenizer, skip_special=skip)
    assert "".join([*(stream.push([token]) for token in ids), stream.flush()]) == tokenizer.decode(
        ids, skip_special=skip
    )


def test_half_characters_wait_for_the_rest():
    tokenizer = make_tokenizer()
    ids = tokenizer.encode("🦆")  # not in the corpus, so several tokens
    stream = IncrementalDetokenizer(tokenizer)
    assert len(ids) > 2
    assert [stream.push([token]) for token in ids] == [*[""] * (len(ids) - 1), "🦆"]
    assert (stream.push(ids[:2]), stream.flush(), stream.push(ids), stream.flush()) == ("", "\ufffd", "🦆", "")


@pytest.mark.parametrize("ids", [[-1], [10**6], [0, 2**70]])
def test_decode_refuses_ids_outside_the_vocabulary(ids):
    with pytest.raises(RequestError, match="expected 0 to"):
        make_tokenizer().decode(ids)


def test_encode_refuses_lone_surrogates():
    with pytest.raises(RequestError, match="valid Unicode"):
        make_tokenizer().encode("a\ud800b")


@pytest.mark.parametrize("name", CONTROL_NAMES)
def test_a_missing_entry_is_named(name):
    spec = make_spec()
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != name]
    spec["model"]["vocab"].pop(name, None)
    with pytest.raises(TokenizerError, match="no entry") as caught:
        Tokenizer(spec)
    assert repr(name) in str(caught.value)


def test_from_folder(tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: cannot be read.*copy it"):
        Tokenizer.from_folder(tmp_path)
    file = tmp_path / "tokenizer.json"
    for damaged in (
        "",
        "{",
        "[]",
        "[" * 100_000,
        json.dumps({"model": {}}),
        json.dumps({**make_spec(), "model": {"type": "BPE"}}),
    ):
        file.write_text(damaged)
        with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
            Tokenizer.from_folder(tmp_path)
    file.write_text(json.dumps(make_spec()))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS}))
    assert Tokenizer.from_folder(tmp_path).config == {"bos_token": BOS}
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: damaged"):
        Tokenizer.from_folder(tmp_path)


def test_other_decoders_are_refused():
    with pytest.raises(TokenizerError, match="ByteLevel decoder, found 'Metaspace'"):
        Tokenizer({**make_spec(), "decoder": {"type": "Metaspace"}})


def test_settings_in_the_file_that_change_prompts_are_ignored():
    spec = make_spec()
    spec["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    assert Tokenizer(spec).encode(CORPUS[0]) == make_tokenizer().encode(CORPUS[0])


def test_merges_that_build_a_control_token_do_not():
    """A crafted file can reach a control id by merging ordinary text."""
    spec = make_spec()
    model = spec["model"]
    for part in ("<t", "<th", "<thi", "<thin", "<think"):
        model["vocab"].setdefault(part, len(model["vocab"]))
    model["vocab"]["<think>"] = len(model["vocab"])
    joins = [("<", "t"), ("<t", "h"), ("<th", "i"), ("<thi", "n"), ("<thin", "k"), ("<think", ">")]
    model["merges"] = [*joins, *model["merges"]]
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\S+|\s+"}
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in BASE_SPECIALS]
    names = [name for name in CONTROL_NAMES if name not in (BOS, "<think>")]
    spec["added_tokens"] += [added_token(len(model["vocab"]) + i, name, False) for i, name in enumerate(names)]
    assert Backend.from_str(json.dumps(spec)).encode("<think>").ids == [model["vocab"]["<think>"]]
    tokenizer = Tokenizer(spec)
    assert set(tokenizer.encode("<think>")).isdisjoint(tokenizer.controls.values())
    assert tokenizer.decode(tokenizer.encode("<think>")) == "<think>"


def test_special_by_the_config_alone_is_control_too():
    config = {"added_tokens_decoder": {"7": {"content": ORDINARY_ADDED[0], "special": True}}}
    assert ORDINARY_ADDED[0] in Tokenizer(make_spec(), config=config).controls
