"""Reads what a reward returned: a number or named parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TOTAL = "reward"  # the part that is the total, if there is one


class RewardValueError(Exception):
    """What a reward returned is no finite number, and no table of finite numbers."""


@dataclass(frozen=True)
class Reward:
    """The reward of one answer."""

    total: float  # NaN if it failed
    parts: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""  # why there is no reward; "" if there is one


def number_of(value: Any, *, what: str) -> float:
    """The value as a finite float. Booleans, numpy scalars and arrays or tensors of one element are accepted.

    Raises:
      RewardValueError: text, None, another object, NaN or an infinity.
    """
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise RewardValueError(f"{what} is {_shown(value)}, expected a number")
    try:
        number = float(value)
    except Exception as error:  # an array of several elements, a number that is too large
        raise RewardValueError(f"{what} is {_shown(value)}, expected one number ({error})") from None
    if not math.isfinite(number):
        raise RewardValueError(f"{what} is {number}, expected a finite number")
    return number


def parts_of(value: Any) -> tuple[float, dict[str, float]]:
    """Total and named parts of what a reward returned; a plain number has no parts.

    Raises:
      RewardValueError: as `number_of`, or the table is empty or has names that are no text.
    """
    if not isinstance(value, Mapping):
        return number_of(value, what="the reward"), {}
    if not value or not all(isinstance(name, str) and name for name in value):
        raise RewardValueError(f"the reward is {_shown(value)}, expected a number or a table of named numbers")
    parts = {str(name): number_of(part, what=f"part {name!r} of the reward") for name, part in value.items()}
    total = parts[TOTAL] if TOTAL in parts else math.fsum(parts.values())
    return number_of(total, what="the sum of the parts"), {name: part for name, part in parts.items() if name != TOTAL}


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} of type {type(value).__name__}"
