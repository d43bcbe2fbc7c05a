"""Tools from functions: the schema from signature and docstring, and the call with the model's arguments."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

from stepjax.errors import ConfigError
from stepjax.train.plugins.failure import described

SECTION = re.compile(r"^\s*(Args|Arguments|Parameters|Returns|Return|Raises|Yields|Examples?|Notes?)\s*:?\s*$")
GOOGLE = re.compile(r"^(?P<indent>\s+)(?P<name>\w+)\s*(?:\([^)]*\))?\s*:\s*(?P<text>.*)$")
SPHINX = re.compile(r"^\s*:param\s+(?:[\w\[\], |]+\s+)?(?P<name>\w+)\s*:\s*(?P<text>.*)$")


@dataclass(frozen=True)
class FunctionTool:
    """A function that the model may call.

    Example:
      >>> from stepjax.train.environments.functions import FunctionTool
      >>> def lookup(city: str, days: int = 1) -> str:
      ...     '''The weather of a city.
      ...
      ...     Args:
      ...       city: its name.
      ...     '''
      ...     return f"{city}: sun for {days} days"
      >>> tool = FunctionTool(lookup, "tools")
      >>> tool.schema["function"]["parameters"]["properties"]["city"]
      {'type': 'string', 'description': 'its name.'}
      >>> tool.schema["function"]["parameters"]["required"]
      ['city']
    """

    function: Callable[..., Any]
    setting: str  # for errors

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    @cached_property
    def schema(self) -> dict[str, Any]:
        """In OpenAI form. ConfigError: a parameter has no type, or one that JSON cannot say."""
        from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

        try:
            parameters = self._arguments.json_schema()
        except (PydanticSchemaGenerationError, PydanticUserError) as error:
            raise ConfigError(
                f"{self.setting}: {self.name}: a type of its parameters has no JSON schema "
                f"({str(error).splitlines()[0]}); use str, int, float, bool, list, dict, Literal or a pydantic model"
            ) from None
        text, _ = described_parameters(inspect.getdoc(self.function) or "")
        function = {"name": self.name, "description": text, "parameters": _untitled(parameters)}
        return {"type": "function", "function": function}

    @cached_property
    def _arguments(self) -> Any:
        """Pydantic's adapter of a dataclass with the function's parameters as fields."""
        from pydantic import ConfigDict, Field, TypeAdapter

        _, texts = described_parameters(inspect.getdoc(self.function) or "")
        try:
            types = typing.get_type_hints(self.function, include_extras=True)
        except Exception as error:
            raise ConfigError(f"{self.setting}: {self.name}: its types cannot be read: {described(error)}") from None
        required, optional = [], []
        for parameter in inspect.signature(self.function).parameters.values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
                raise ConfigError(
                    f"{self.setting}: {self.name}: parameter {parameter} cannot be called by name; name each parameter"
                )
            if parameter.name not in types:
                raise ConfigError(
                    f"{self.setting}: {self.name}: parameter {parameter.name!r} has no type, expected one such as "
                    f"{parameter.name}: str"
                )
            kind = types[parameter.name]
            if parameter.name in texts:
                kind = Annotated[kind, Field(description=texts[parameter.name])]
            if parameter.default is parameter.empty:
                required.append((parameter.name, kind))
            else:
                optional.append((parameter.name, kind, _defaulting(parameter.default)))
        fields = dataclasses.make_dataclass("Arguments", [*required, *optional])
        fields.__pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=False)
        return TypeAdapter(fields)

    async def call(self, arguments: Mapping[str, Any]) -> str:
        """What the function returned, as text. An error becomes text too, for the model to read."""
        from pydantic import ValidationError

        try:
            values = self._arguments.validate_python(dict(arguments))
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
            return f"Error: {'; '.join(problems)}"
        try:
            result = self.function(**{field.name: getattr(values, field.name) for field in dataclasses.fields(values)})
            if inspect.isawaitable(result):
                result = await result
            return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
        except Exception as error:
            return f"Error: {type(error).__name__}: {error}"


def described_parameters(doc: str) -> tuple[str, dict[str, str]]:
    """The text of a docstring without its sections, and what it says of each parameter (Google's form or Sphinx's)."""
    text: list[str] = []
    texts: dict[str, str] = {}
    section, current, indent = "", "", ""
    for line in doc.splitlines():
        heading, sphinx = SECTION.match(line), SPHINX.match(line)
        if heading:
            section, current = heading[1], ""
        elif sphinx:
            section, current, indent = "Args", sphinx["name"], ""
            texts[current] = sphinx["text"].strip()
        elif section in ("Args", "Arguments", "Parameters"):
            entry = GOOGLE.match(line)
            if entry and (not current or len(entry["indent"]) <= len(indent)):
                current, indent = entry["name"], entry["indent"]
                texts[current] = entry["text"].strip()
            elif current and line.strip():
                texts[current] = f"{texts[current]} {line.strip()}".strip()
        elif line.lstrip().startswith(":return"):
            section = "Returns"
        elif not section:
            text.append(line)
    return "\n".join(text).strip(), {name: value for name, value in texts.items() if value}


def _defaulting(value: Any) -> Any:
    return dataclasses.field(default_factory=lambda: value)


def _untitled(schema: Any) -> Any:
    """Without the titles that pydantic makes from names, and with the properties that models expect."""
    schema.pop("title", None)
    schema.setdefault("properties", {})
    for table in (schema, *schema.get("$defs", {}).values()):
        for entry in table.get("properties", {}).values():
            entry.pop("title", None)
    return schema
