"""What the server does with a field of a request: it does what the field says, refuses it, or ignores it because it has
no effect on the answer. `stepjax.infer.serve.fields.dialects` says it for every field of every interface.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from stepjax.errors import RequestError

Treatment = Literal["done", "refused", "ignored"]
MAX_IGNORED = 256  # names of ignored fields that are collected; the header holds fewer
_STEP = re.compile(r"\[\]|[^.\[\]]+")


@dataclass(frozen=True)
class FieldRule:
    """What is done with one field."""

    treatment: Treatment
    reason: str = ""
    neutral: tuple[Any, ...] = ()  # values of a refused field that have no effect, besides null, false and empty ones


@dataclass
class _Node:
    rule: FieldRule | None = None
    fields: dict[str, _Node] = field(default_factory=dict)  # "[]" are the items of a list, "*" all other names

    def at(self, path: str) -> _Node:
        node = self
        for step in _STEP.findall(path):
            node = node.fields.setdefault(step, _Node())
        return node


class FieldTable:
    """The fields of one interface, at every depth. A path is written as in ``messages[].content[].text``; ``*`` stands
    for all names that have no path of their own.

    Below a path that is done and has no paths below it, everything is a part of its value, as in a JSON schema. Below a
    path that is ignored or refused everything is.
    """

    def __init__(
        self, *, done: str, ignored: Mapping[str, str] | None = None, refused: Mapping[str, str] | None = None
    ):
        """
        Args:
          done: paths, separated by spaces.
          ignored: paths by the reason why they have no effect.
          refused: paths by the reason; ``path=1`` also lets the value 1 pass, which asks for nothing.
        """
        self._root = _Node()
        for path in done.split():
            self.add(path, FieldRule("done"))
        for reason, paths in (ignored or {}).items():
            for path in paths.split():
                self.add(path, FieldRule("ignored", reason))
        for reason, paths in (refused or {}).items():
            for entry in paths.split():
                path, *neutral = entry.split("=")
                self.add(path, FieldRule("refused", reason, tuple(map(_value, neutral))))

    def add(self, path: str, rule: FieldRule) -> None:
        """Add a path that the table does not have."""
        node = self._root.at(path)
        assert node.rule is None, f"{path} has two rules"
        node.rule = rule

    def rule(self, path: str) -> FieldRule | None:
        """The rule for a path, its own or that of the path that it is a part of; None if the table does not have it."""
        node, rule = self._root, None
        for step in _STEP.findall(path):
            if rule is not None and (rule.treatment != "done" or not node.fields):
                return rule
            child = node.fields.get(step) or node.fields.get("*")
            if child is None:
                return None
            node, rule = child, child.rule
        return rule

    def paths(self) -> Iterator[tuple[str, FieldRule]]:
        """All paths with rules of their own."""
        yield from _paths(self._root, "")

    def done(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The given fields of the top level that are done.

        Raises:
          RequestError: a field is given that would change the answer and is not supported.
        """
        self.ignored(body)
        return {name: value for name, value in body.items() if (rule := self.rule(name)) and rule.treatment == "done"}

    def ignored(self, body: Mapping[str, Any]) -> list[str]:
        """Names of the given fields that have no effect, unknown ones among them, in order of the alphabet.

        Raises:
          RequestError: a field is given that would change the answer and is not supported.
        """
        names: set[str] = set()
        _collect(self._root, body, [], names)
        return sorted(names)


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    return float(text) if re.fullmatch(r"-?[0-9.]+", text) else text


def _paths(node: _Node, prefix: str) -> Iterator[tuple[str, FieldRule]]:
    for step, child in node.fields.items():
        path = f"{prefix}{step}" if step == "[]" or not prefix else f"{prefix}.{step}"
        if child.rule is not None:
            yield path, child.rule
        yield from _paths(child, path)


def _collect(node: _Node, value: Any, trail: list[str | int], names: set[str]) -> None:
    """Add the ignored fields within a value to ``names``; ``trail`` is where the value stands."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            if item is None:
                continue
            child = node.fields.get(name) if name != "[]" else None
            child = child or node.fields.get("*")
            trail.append(name)
            if child is None or (child.rule is not None and child.rule.treatment == "ignored"):
                if len(names) < MAX_IGNORED:
                    names.add(_spelled(trail, numbered=False))
            elif child.rule is not None and child.rule.treatment == "refused":
                _check_refused(child.rule, item, trail)
            elif child.fields:
                _collect(child, item, trail, names)
            trail.pop()
    elif isinstance(value, Sequence) and not isinstance(value, str) and "[]" in node.fields:
        for index, item in enumerate(value):
            trail.append(index)
            _collect(node.fields["[]"], item, trail, names)
            trail.pop()


def _check_refused(rule: FieldRule, value: Any, trail: list[str | int]) -> None:
    if not _asks_nothing(rule, value):
        name = _spelled(trail, numbered=True)
        raise RequestError(f"{name}: is given, but is not supported here ({rule.reason}); leave it out")


def _asks_nothing(rule: FieldRule, value: Any) -> bool:
    """Whether a value of a refused field would change nothing."""
    if isinstance(value, bool):
        return value is any(neutral is True for neutral in rule.neutral)
    if isinstance(value, list):
        return all(isinstance(item, str) and item in rule.neutral for item in value)
    return value in ({}, "") or (isinstance(value, str | int | float) and value in rule.neutral)


def _spelled(trail: list[str | int], *, numbered: bool) -> str:
    name = ""
    for step in trail:
        if isinstance(step, int):
            name += f"[{step}]" if numbered else "[]"
        else:
            name += f".{step[:80]}" if name else step[:80]
    return name
