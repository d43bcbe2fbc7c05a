"""The encoding of protocol buffers (https://protobuf.dev/programming-guides/encoding): fields by number.

Few messages are read and written here, so that a table of numbers beside each reader does without generated code.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from stepjax.infer.serve.errors import ApiError

T = TypeVar("T")

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SIZES = {_FIXED64: 8, _FIXED32: 4}


def damaged(message: str) -> ApiError:
    """A body that is no message of its kind."""
    return ApiError(f"body: {message}", code="invalid_protobuf")


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field, in order: integers of varints, bytes of all else.

    Raises:
      ApiError: the bytes are no message.
    """
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise damaged(f"expected a field's number from 1 to 2^29 - 1, found {number}")
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in _SIZES:
            size = _SIZES[kind]
        else:
            raise damaged(f"field {number} has wire type {kind}, expected 0, 1, 2 or 5")
        if size > end - at:
            raise damaged(f"field {number} has {size} bytes, but {end - at} are left")
        yield number, data[at : at + size]
        at += size


def nested(value: int | memoryview, what: str) -> memoryview:
    """The bytes of a field that is a message, a string or bytes."""
    if isinstance(value, int):
        raise damaged(f"{what} is a number, expected bytes")
    return value


def number(value: int | memoryview, what: str) -> int:
    """A varint as a signed 64-bit integer."""
    if not isinstance(value, int):
        raise damaged(f"{what} is bytes, expected a number")
    return value - (1 << 64) if value >> 63 else value


def text(value: int | memoryview, what: str) -> str:
    """The string of a field."""
    try:
        return bytes(nested(value, what)).decode("utf-8")
    except UnicodeDecodeError as error:
        raise damaged(f"{what} is not UTF-8 ({error.reason})") from None


def double(value: int | memoryview, what: str) -> float:
    """A field of 8 bytes as a float."""
    if isinstance(value, int) or len(value) != 8:
        raise damaged(f"{what} is not a double of 8 bytes")
    return struct.unpack("<d", value)[0]


def numbers(value: int | memoryview, what: str) -> list[int]:
    """Integers of a repeated field, packed or one by one."""
    if isinstance(value, int):
        return [number(value, what)]
    out, at = [], 0
    while at < len(value):
        item, at = _varint(value, at)
        out.append(number(item, what))
    return out


def entry(value: int | memoryview, what: str, read: Callable[[int | memoryview], T], empty: T) -> tuple[str, T]:
    """Key and value of an entry of a map whose keys are strings."""
    key, out = "", empty
    for index, part in fields(nested(value, what)):
        if index == 1:
            key = text(part, f"a key of {what}")
        elif index == 2:
            out = read(part)
    return key, out


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise damaged("a number does not end")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value & (1 << 64) - 1, at
        shift += 7


def written(*parts: tuple[int, Any]) -> bytes:
    """A message of fields by number: integers, floats (as doubles), strings, bytes. None is left out."""
    out = bytearray()
    for index, value in parts:
        if value is None:
            continue
        if isinstance(value, bool | int):
            out += _written_varint(index << 3 | _VARINT) + _written_varint(int(value) & (1 << 64) - 1)
        elif isinstance(value, float):
            out += _written_varint(index << 3 | _FIXED64) + struct.pack("<d", value)
        else:
            content = value.encode("utf-8") if isinstance(value, str) else value
            out += _written_varint(index << 3 | _BYTES) + _written_varint(len(content)) + content
    return bytes(out)


def written_map(index: int, entries: Mapping[str, Any]) -> list[tuple[int, bytes]]:
    """The fields of a map whose keys are strings."""
    return [(index, written((1, key), (2, value))) for key, value in entries.items()]


def packed(values: Iterable[int]) -> bytes | None:
    """Integers of a packed repeated field; None if there are none."""
    return b"".join(_written_varint(value & (1 << 64) - 1) for value in values) or None


def _written_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
