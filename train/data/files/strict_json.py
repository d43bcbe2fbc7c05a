"""JSON as its standard has it: no NaN, no duplicate keys, no numbers beyond a float, valid Unicode, bounded depth."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

MAX_DEPTH = 64  # levels of nesting
MAX_DIGITS = 308  # of an integer, as large as floats go
SPACES = "\ufeff\u200b \t\r\n"  # around a row: byte order marks and spaces without width are no content

# What JSON may hold that needs a look at the values: an escaped NUL or surrogate.
_SUSPECT = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")


def strict_object(raw: bytes) -> dict[str, Any]:
    """The object that is written in ``raw``. ValueError: it is not one; the text says why."""
    try:
        text = raw.decode("utf-8").strip(SPACES)
    except UnicodeDecodeError as error:
        byte = f"0x{raw[error.start]:02x}, byte {error.start + 1} of the row"
        raise ValueError(f"not valid UTF-8 ({byte}); save the file as UTF-8") from None
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not readable as JSON ({error.msg}, character {error.pos + 1})") from None
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        raise ValueError(f"not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"holds a JSON {_name(value)}, expected an object")
    if text.count("{") + text.count("[") > MAX_DEPTH or ("\\u" in text and _SUSPECT.search(text)):
        check_values(value)
    return value


def check_json_text(text: str) -> None:
    """ValueError: JSON that a lenient reader accepts, but that gives a key twice or has numbers that JSON lacks."""
    try:
        _DECODER.decode(text)
    except (json.JSONDecodeError, RecursionError):
        return  # whoever reads it says so


def check_values(value: Any, where: str = "", depth: int = 0) -> None:
    """ValueError: a value that has no place in a row, with the path to it."""
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, str):
        _check_text(value, where)
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            path = f"{where}.{key}" if where else str(key)
            if isinstance(key, str):
                _check_text(key, f"a key of {where or 'the row'}")
            check_values(entry, path, depth + 1)
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            check_values(entry, f"{where}[{index}]", depth + 1)


def _check_text(text: str, where: str) -> None:
    if "\0" in text:
        raise ValueError(f"{where}: has a NUL character (U+0000) at character {text.index(chr(0)) + 1}")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            surrogate = f"U+{ord(text[error.start]):04X} at character {error.start + 1}"
            raise ValueError(
                f"{ascii(where)[1:-1]}: has the lone surrogate {surrogate}, which is no character"
            ) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!a} is given twice in one object")
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} is too large for a float")
    return value


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(text.lstrip('-')):,} digits, expected at most {MAX_DIGITS}")
    return int(text)


def _name(value: Any) -> str:
    return {"list": "list", "str": "string", "NoneType": "null", "bool": "boolean"}.get(type(value).__name__, "number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_constant, parse_float=_number, parse_int=_integer
)
