"""Calls a user's function with those keywords that it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from stepjax.errors import ConfigError

# What other trainers pass, and what has it here.
ELSEWHERE = {
    "completion": "answer.text",
    "completions": "answer.text, of one answer a call",
    "prompts": "prompt.messages, of one prompt a call",
    "solution_str": "answer.text",
    "ground_truth": 'row["answer"], or another column',
    "extra_info": "row",
    "data_source": "source",
    "info": 'row["info"]',
    "state": "answer.messages",
}


def keywords_of(function: Callable[..., Any], offered: Mapping[str, str], *, what: str) -> tuple[str, ...]:
    """Those of the offered keywords that a function takes.

    Args:
      offered: name → explanation.
      what: the setting and the function, for errors.

    Raises:
      ConfigError: the function needs a parameter that is not offered.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise ConfigError(f"{what}: its parameters cannot be read; wrap it in a function of your own") from None
    listed = ", ".join(f"{name} ({text})" for name, text in offered.items())
    taken = []
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            return tuple(offered)
        if parameter.kind is parameter.VAR_POSITIONAL:
            continue
        if parameter.name in offered and parameter.kind is not parameter.POSITIONAL_ONLY:
            taken.append(parameter.name)
        elif parameter.default is parameter.empty:
            reason = "is positional only" if parameter.kind is parameter.POSITIONAL_ONLY else "is not offered"
            instead = f" (take {ELSEWHERE[parameter.name]})" if parameter.name in ELSEWHERE else ""
            raise ConfigError(f"{what}: its parameter {parameter.name!r} {reason}{instead}; it may take {listed}")
    return tuple(taken)
