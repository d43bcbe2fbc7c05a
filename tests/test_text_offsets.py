"""Where tokens begin in a text, against the text itself."""

import pytest
from hypothesis import given, strategies as st
from tokenizers_fixture import make_tokenizer

from stepjax.infer.serve.text_offsets import TextOffsets

TOKENIZER = make_tokenizer()
BY_BYTES = {TOKENIZER.token_bytes([token]): token for token in reversed(range(len(TOKENIZER)))}
CONTROLS = list(TOKENIZER.controls.values())


def byte_ids(data: bytes) -> list[int]:
    return [BY_BYTES[bytes([byte])] for byte in data]


def beginnings(data: bytes) -> list[int]:
    """The byte at which each character of the text begins."""
    places, at = [], 0
    while at < len(data):
        places.append(at)
        at += next((size for size in range(1, 5) if _is_character(data[at : at + size])), 0) or _num_invalid(data[at:])
    return places


def _is_character(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


def _num_invalid(data: bytes) -> int:
    """Bytes at the beginning that are shown as one U+FFFD."""
    with pytest.raises(UnicodeDecodeError) as error:
        data.decode()
    return error.value.end


def test_a_character_of_several_tokens_begins_once():
    ids = byte_ids("aé好😀z".encode())
    assert TextOffsets(TOKENIZER).push(ids) == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4]


def test_bytes_that_are_no_text_count_as_what_is_shown():
    ids = byte_ids(b"\xf0\x9fb\xff\xc3\xc3\xa9\xef\xbf\xbdz")
    text = TOKENIZER.decode(ids)
    assert text == "\ufffdb\ufffd\ufffdé\ufffdz"
    assert TextOffsets(TOKENIZER).push(ids) == [0, 0, 1, 2, 3, 4, 4, 5, 5, 5, 6]


def test_control_tokens_are_characters_only_where_they_are_shown():
    end = TOKENIZER.special.im_end
    ids = [*byte_ids(b"a"), end, *byte_ids(b"b")]
    assert TextOffsets(TOKENIZER).push(ids) == [0, 1, 1]
    assert TextOffsets(TOKENIZER, skip_special=False).push(ids) == [0, 1, 1 + len("<|im_end|>")]


def test_a_text_that_follows_begins_behind_what_was_unfinished():
    offsets = TextOffsets(TOKENIZER)
    assert offsets.push(byte_ids(b"a\xf0\x9f")) == [0, 1, 1]
    offsets.flush()
    assert offsets.push(byte_ids(b"\x98b")) == [2, 3]
    assert TextOffsets(None).push([5, 6]) == [0, 0]


@given(
    st.lists(st.sampled_from([*b"ab\n", *"é好😀".encode(), 0xFF, 0x80, 0xC3, 0xF0, 0x9F]), max_size=16),
    st.lists(st.integers(0, 16), max_size=3),
    st.booleans(),
)
def test_offsets_are_those_of_the_text(data, controls, skip_special):
    ids = byte_ids(bytes(data))
    for place in controls:
        ids.insert(place, CONTROLS[0])
    offsets = TextOffsets(TOKENIZER, skip_special=skip_special)
    found = [offset for token in ids for offset in offsets.push([token])]
    places = beginnings(TOKENIZER.token_bytes(ids, skip_special=skip_special))
    for at, offset in enumerate(found):
        byte = len(TOKENIZER.token_bytes(ids[:at], skip_special=skip_special))
        if TOKENIZER.token_bytes(ids[at : at + 1], skip_special=skip_special):
            assert offset == sum(place <= byte for place in places) - 1
