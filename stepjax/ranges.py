"""The numbers that a setting can have: a range beside its type, which is checked wherever the setting is given."""

from __future__ import annotations

import dataclasses
import functools
import types
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from stepjax.errors import ConfigError

SHOWN = 60  # characters of a wrong value in a message


@dataclass(frozen=True)
class Range:
    """The range of a number, as ``Annotated[float, Range(0, 1)]``. NaN and infinity are in none.

    Example:
      >>> from stepjax.ranges import Range
      >>> Range(1, 100, zero="off").describe(whole=True)
      '0 (off) or an integer from 1 to 100'
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None  # in place of ``least``: a bound that is not in the range
    below: float | None = None  # in place of ``most``
    zero: str = ""  # what 0 means, where it is a switch; it need not lie between the bounds
    note: str = ""  # what a message adds

    def __contains__(self, value: float) -> bool:
        if self.zero and value == 0:
            return True
        low = value >= self.least if self.least is not None else self.above is None or value > self.above
        high = value <= self.most if self.most is not None else self.below is None or value < self.below
        return low and high and value == value and abs(value) != float("inf")

    def describe(self, *, whole: bool) -> str:
        """The range in words."""
        bounds = []
        if self.least is not None and self.most is not None:
            bounds.append(f"from {_digits(self.least)} to {_digits(self.most)}")
        elif self.least is not None:
            bounds.append(f"of at least {_digits(self.least)}")
        elif self.above is not None:
            bounds.append(f"above {_digits(self.above)}")
        if self.below is not None:
            bounds.append(f"below {_digits(self.below)}")
        elif self.most is not None and self.least is None:
            bounds.append(f"of at most {_digits(self.most)}")
        text = f"{'an integer' if whole else 'a number'} {' and '.join(bounds)}".rstrip()
        if not self.zero:
            return text
        return f"{text}, 0: {self.zero}" if 0 in dataclasses.replace(self, zero="") else f"0 ({self.zero}) or {text}"

    def checked(self, name: str, value: Any, *, whole: bool) -> Any:
        """The value as an int or a float.

        Raises:
          ConfigError: it is no number, or not in the range. The message has the name, the value and the range.
        """
        is_number = type(value) is int or (not whole and type(value) is float)
        if not is_number or value not in self:
            note = f"; {self.note}" if self.note else ""
            raise ConfigError(f"{name}: is {shown(value)}, expected {self.describe(whole=whole)}{note}")
        return value if whole else float(value)


def argument(limits: Range, *, whole: bool) -> Callable[[str], Any]:
    """The ``type`` of a command-line option: a number of this range, else an error of the command line (exit 2)."""

    def number(text: str) -> Any:
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            value = None
        if value is None or value not in limits:
            given = text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
            raise ArgumentTypeError(f"is {given!r}, expected {limits.describe(whole=whole)}")
        return value

    return number


def range_of(kind: Any) -> tuple[Range, bool] | None:
    """The range in an annotation, and whether its numbers are whole; None if the annotation has no range."""
    if get_origin(kind) in (Union, types.UnionType):
        return next(filter(None, map(range_of, get_args(kind))), None)
    if get_origin(kind) is Annotated:
        for about in kind.__metadata__:
            if isinstance(about, Range):
                return about, kind.__origin__ is int
    return None


def check_ranges(settings: Any, section: str = "") -> None:
    """Check the numbers of a dataclass, in tuples and dictionaries too.

    Args:
      section: name of the settings in messages.

    Raises:
      ConfigError: a number is outside of its range.
    """
    for name, kind in annotations_of(type(settings)).items():
        _check(f"{section}.{name}" if section else name, getattr(settings, name), kind)


@functools.cache
def annotations_of(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields by name, with their ranges."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def shown(value: Any) -> str:
    """A value as messages show it: its text in Python, cut if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return f"a value of type {type(value).__name__} that is too long to show"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _check(name: str, value: Any, kind: Any) -> None:
    limits, inner = range_of(kind), get_args(kind)
    if limits:
        optional = get_origin(kind) in (Union, types.UnionType)
        if not (optional and value is None):
            limits[0].checked(name, value, whole=limits[1])
    elif get_origin(kind) is tuple and inner[-1] is Ellipsis:
        for entry in value:
            _check(name, entry, inner[0])
    elif get_origin(kind) is dict:
        for key, entry in value.items():
            _check(f"{name}.{key}", entry, inner[1])


def _digits(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"
