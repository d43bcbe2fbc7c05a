"""The table of settings in docs/settings.md, made from the classes: name, default, range and explanation.

python tests/settings_table.py     writes the page anew
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import tokenize
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from stepjax.ranges import annotations_of, range_of
from stepjax.train.config.pretrain import PretrainConfig
from stepjax.train.config.rewards import RewardSettings
from stepjax.train.config.tune import (
    DataSettings,
    EvalSettings,
    LoraSettings,
    ModelSettings,
    OptimSettings,
    RolloutSettings,
    RunSettings,
    TeacherSettings,
)
from stepjax.train.objectives.objective import LossSettings

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"
BEGIN, END = "<!-- made by tests/settings_table.py -->\n", "<!-- end -->\n"
SECTIONS: dict[str, type] = {
    "[model]": ModelSettings,
    "[lora]": LoraSettings,
    "[data.NAME]": DataSettings,
    "[teachers.NAME]": TeacherSettings,
    "[rollout]": RolloutSettings,
    "[rewards]": RewardSettings,
    "[loss]": LossSettings,
    "[optim]": OptimSettings,
    "[eval]": EvalSettings,
    "[run]": RunSettings,
    "stepjax pretrain": PretrainConfig,
}


def page() -> str:
    """The page with its tables as the classes are."""
    text = PAGE.read_text(encoding="utf-8")
    return text[: text.index(BEGIN) + len(BEGIN)] + tables() + text[text.index(END) :]


def tables() -> str:
    parts = []
    for section, kind in SECTIONS.items():
        rows = [f"\n## {section}\n", "| setting | default | values | |", "|---|---|---|---|"]
        explained = explanations(kind)
        for name, annotation in annotations_of(kind).items():
            cells = f"`{name}`", default(kind, name), values(annotation), explained.get(name, "")
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts).lstrip("\n") + "\n"


def default(kind: type, name: str) -> str:
    field = next(field for field in dataclasses.fields(kind) if field.name == name)
    if field.default_factory is not dataclasses.MISSING:
        return "all tasks" if field.default_factory() else "`{}`"
    value = field.default
    return f"`{toml(value)}`"


def toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def values(annotation: Any) -> str:
    """The values that a setting can have, in words."""
    limits, inner = range_of(annotation), get_args(annotation)
    if limits:
        return limits[0].describe(whole=limits[1]).removeprefix("a ").removeprefix("an ")
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(f"`{toml(value)}`" for value in inner)
    if origin is Annotated:
        return values(inner[0])
    if origin is tuple:
        return f"list of {values(inner[0])}"
    if origin is dict:
        return f"table of {values(inner[1])}"
    if origin is Union or not isinstance(annotation, type):
        return " or ".join(map(values, inner)) if inner else "any"
    return {str: "text", bool: "`true`, `false`"}.get(annotation, annotation.__name__)


def explanations(kind: type) -> dict[str, str]:
    """The comment of each field: behind it, or in the lines above."""
    source = inspect.getsource(kind)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    whole_lines = {number for number, line in enumerate(source.splitlines(), 1) if line.lstrip().startswith("#")}
    found = {}
    tree = ast.parse(source).body[0]
    assert isinstance(tree, ast.ClassDef)
    for node in tree.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        assert node.end_lineno is not None
        first, above = node.lineno, []
        while (first := first - 1) in whole_lines:
            above.insert(0, comments[first])
        beside = [comments[line] for line in range(node.lineno, node.end_lineno + 1) if line in comments]
        found[node.target.id] = " ".join([*above, *(["—"] if above and beside else []), *beside])
    return found


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
