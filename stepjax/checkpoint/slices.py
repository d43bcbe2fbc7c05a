"""Parts of arrays, as one slice per axis without steps."""

from __future__ import annotations

import math

Index = tuple[slice, ...]


def absolute_index(index: Index | None, shape: tuple[int, ...]) -> Index:
    """``index`` with numbers in place of None and of negative ends."""
    index = index or (slice(None),) * len(shape)
    assert len(index) == len(shape), f"{len(index)} slices for shape {shape}"
    ranges = [span.indices(size) for span, size in zip(index, shape, strict=True)]
    assert all(step == 1 for _, _, step in ranges), f"{index} has steps"
    return tuple(slice(start, stop) for start, stop, _ in ranges)


def num_elements(where: Index) -> int:
    """Elements of a part."""
    return math.prod(span.stop - span.start for span in where)


def covering(where: Index, shape: tuple[int, ...], unit: tuple[int, int]) -> tuple[Index, Index]:
    """The smallest range of whole units of rows and columns around ``where``, and the place of ``where`` in it."""
    outer, inner = list(where), [slice(None)] * len(where)
    for axis, size in zip((-2, -1), unit, strict=True):
        start, stop = where[axis].start, where[axis].stop
        first = start // size * size
        outer[axis] = slice(first, min(-(-stop // size) * size, shape[axis]))
        inner[axis] = slice(start - first, stop - first)
    return tuple(outer), tuple(inner)
