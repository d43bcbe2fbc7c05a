"""Tools of the generated tasks: their schemas, questions that need them, what they return and the right answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from numpy.random import Generator

from stepjax.train.data.words import Split, chance, city, name, pick, symbol, word

SKIES = ("cloudy", "sunny", "rainy", "windy", "clear")
LANGUAGES = ("French", "German", "Spanish", "Italian", "Danish", "Polish", "Turkish", "Greek")
CURRENCIES = ("euros", "yen", "pounds", "francs", "rupees", "pesos")
PARAMETER_NOTES = ("The name.", "The value to use.", "Required.")
INTEGER_KINDS = ("small", "count", "number")


@dataclass(frozen=True)
class Tool:
    """One kind of tool. Texts name parameters and result keys in braces. `value` draws a value by its kind."""

    name: str
    descriptions: tuple[str, ...]
    parameters: dict[str, str]  # parameter → kind
    questions: tuple[str, ...]
    result: dict[str, str]  # key of the returned JSON → kind
    reply: str


def _schema(
    tool_name: str, description: str | None, parameters: dict[str, str], note: str | None = None
) -> dict[str, Any]:
    properties: dict[str, dict[str, str]] = {}
    for key, kind in parameters.items():
        properties[key] = {"type": "integer" if kind in INTEGER_KINDS else "string"}
        if note:
            properties[key]["description"] = note
    function: dict[str, Any] = {"name": tool_name}
    if description is not None:
        function["description"] = description
    function["parameters"] = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": function}


def value(rng: Generator, kind: str, split: Split) -> str | int:
    """A value of the kind. Words, names and cities depend on the split; numbers and fixed lists do not."""
    match kind:
        case "city":
            return city(rng, split)
        case "name":
            return name(rng, split)
        case "word":
            return word(rng, split, longest=9)
        case "symbol":
            return symbol(rng, split)
        case "words":
            return " ".join(word(rng, split, shortest=2, longest=6) for _ in range(int(rng.integers(1, 4))))
        case "small":
            return int(rng.integers(2, 61))
        case "number":
            return int(rng.integers(1, 10 ** int(rng.integers(1, 4))))
        case "count":
            return int(rng.integers(10, 10 ** int(rng.integers(2, 6))))
        case "temperature":
            return int(rng.integers(1, 100))
        case "path":
            return word(rng, split, longest=7) + pick(rng, (".txt", ".py", ".md"))
        case "clock":
            return f"{int(rng.integers(24)):02d}:{int(rng.integers(60)):02d}"
        case "sky":
            return pick(rng, SKIES)
        case "language":
            return pick(rng, LANGUAGES)
        case "currency":
            return pick(rng, CURRENCIES)
        case "yes":
            return True
    raise ValueError(f"unknown kind of value: {kind!r}")


TOOLS = (
    Tool(
        "get_weather",
        ("Weather of a city.", "Get the current weather."),
        {"city": "city"},
        (
            "What is the weather in {city}?",
            "How is the weather in {city} now?",
            "Is it warm in {city}?",
            "Weather in {city}?",
        ),
        {"temp": "temperature", "sky": "sky"},
        "It is {temp} degrees and {sky} in {city}.",
    ),
    Tool(
        "get_time",
        ("Local time of a city.", "Get the current time."),
        {"city": "city"},
        ("What time is it in {city}?", "What is the time in {city}?", "Tell me the time in {city}."),
        {"time": "clock"},
        "It is {time} in {city}.",
    ),
    Tool(
        "get_population",
        ("Population of a place.",),
        {"place": "city"},
        ("How many people live in {place}?", "What is the population of {place}?"),
        {"people": "count"},
        "{place} has {people} people.",
    ),
    Tool(
        "get_distance",
        ("Distance of two cities in km.",),
        {"from": "city", "to": "city"},
        ("How far is it from {from} to {to}?", "What is the distance from {from} to {to}?"),
        {"km": "count"},
        "It is {km} km from {from} to {to}.",
    ),
    Tool(
        "get_price",
        ("Price of an item.", "Look up a price."),
        {"item": "word"},
        ("What is the price of {item}?", "How much is {item}?", "How much does {item} cost?"),
        {"price": "number"},
        "The price of {item} is {price}.",
    ),
    Tool(
        "get_stock",
        ("Value of a stock.",),
        {"symbol": "symbol"},
        ("What is the stock value of {symbol}?", "How is the {symbol} stock?"),
        {"value": "number"},
        "{symbol} stands at {value}.",
    ),
    Tool(
        "find_person",
        ("Find a person.",),
        {"name": "name"},
        ("Where is {name}?", "In which room is {name}?", "Find {name} for me."),
        {"room": "number"},
        "{name} is in room {room}.",
    ),
    Tool(
        "translate_word",
        ("Translate a word.",),
        {"word": "word", "language": "language"},
        ('Translate "{word}" into {language}.', 'What is "{word}" in {language}?'),
        {"text": "word"},
        'In {language} it is "{text}".',
    ),
    Tool(
        "define_word",
        ("Meaning of a word.",),
        {"word": "word"},
        ('What does "{word}" mean?', 'Define "{word}".'),
        {"meaning": "word"},
        '"{word}" means "{meaning}".',
    ),
    Tool(
        "set_timer",
        ("Set a timer.", "Start a timer in minutes."),
        {"minutes": "small"},
        ("Set a timer for {minutes} minutes.", "Wake me in {minutes} minutes.", "Start a timer of {minutes} minutes."),
        {"done": "yes"},
        "The timer is set for {minutes} minutes.",
    ),
    Tool(
        "convert_money",
        ("Convert dollars.",),
        {"amount": "number", "currency": "currency"},
        ("Convert {amount} dollars to {currency}.", "How much is {amount} dollars in {currency}?"),
        {"value": "number"},
        "{amount} dollars are {value} {currency}.",
    ),
    Tool(
        "play_song",
        ("Play a song.",),
        {"title": "words"},
        ('Play the song "{title}".', 'Play "{title}".', 'I want to hear "{title}".'),
        {"done": "yes"},
        'Now playing "{title}".',
    ),
    Tool(
        "search_web",
        ("Search the web.", "Find pages on the web."),
        {"query": "words"},
        ('Search the web for "{query}".', 'Look up "{query}" on the web.', "Search for {query}."),
        {"pages": "count"},
        'I found {pages} pages about "{query}".',
    ),
    Tool(
        "send_message",
        ("Send a message.",),
        {"to": "name", "text": "words"},
        ('Send "{text}" to {to}.', 'Tell {to} "{text}".'),
        {"done": "yes"},
        "I sent it to {to}.",
    ),
    Tool(
        "book_table",
        ("Book a table.",),
        {"place": "name", "people": "small"},
        ("Book a table at {place} for {people} people.", "Reserve a table for {people} people at {place}."),
        {"time": "clock"},
        "Your table at {place} is booked for {time}.",
    ),
    Tool(
        "read_file",
        ("Read a file.",),
        {"path": "path"},
        ("Read the file {path}.", "How long is the file {path}?", "Open {path}."),
        {"lines": "count"},
        "The file {path} has {lines} lines.",
    ),
)

WILD_KINDS = ("word", "name", "city", "number")
VERBS = ("get", "find", "set", "run", "make", "check", "read", "list")
WILD_QUESTIONS = {
    1: ("Call {tool} with {p0} {v0}.", "Use {tool} with {p0} {v0}.", "Use {tool}: {p0} = {v0}."),
    2: ("Call {tool} with {p0} {v0} and {p1} {v1}.", "Use {tool}: {p0} = {v0}, {p1} = {v1}."),
}
WILD_REPLY = "The result is {result}."


def wild_tool(rng: Generator, split: Split) -> Tool:
    """A tool with made-up names: its name and parameters can only be copied from the schema and the question."""
    subject = word(rng, split, longest=7)
    tool_name = pick(rng, (f"{pick(rng, VERBS)}_{subject}", subject))
    kinds = {word(rng, split, longest=6): pick(rng, WILD_KINDS) for _ in range(1 + chance(rng, 0.25))}
    fields = {f"p{i}": key for i, key in enumerate(kinds)} | {f"v{i}": f"{{{key}}}" for i, key in enumerate(kinds)}
    questions = tuple(text.format(tool=tool_name, **fields) for text in WILD_QUESTIONS[len(kinds)])
    return Tool(
        tool_name, (_noise(rng, split),), kinds, questions, {"result": pick(rng, ("word", "count"))}, WILD_REPLY
    )


def _noise(rng: Generator, split: Split) -> str:
    return " ".join(word(rng, split, shortest=2, longest=5) for _ in range(int(rng.integers(1, 3))))


def schema(rng: Generator, tool: Tool, split: Split) -> dict[str, Any]:
    """The tool in OpenAI form. Descriptions vary, since users write their own."""
    description: str | None = pick(rng, tool.descriptions)
    draw = float(rng.random())
    if draw < 0.08:
        description = None
    elif draw < 0.16:
        description = _noise(rng, split)
    note = pick(rng, PARAMETER_NOTES) if chance(rng, 0.12) else None
    return _schema(tool.name, description, tool.parameters, note)


def offer(rng: Generator, split: Split) -> tuple[Tool, list[dict[str, Any]]]:
    """The tool to call, and the schemas of the one to three tools on offer. At most one of them is made up."""
    count = pick(rng, (1, 1, 1, 1, 2, 2, 2, 2, 3, 3))
    chosen = [TOOLS[i] for i in rng.permutation(len(TOOLS))[:count]]
    if chance(rng, 0.3):
        chosen[int(rng.integers(count))] = wild_tool(rng, split)
    schemas = [schema(rng, tool, split) for tool in chosen]
    return chosen[0], [schemas[i] for i in rng.permutation(count)]


def arguments(rng: Generator, tool: Tool, split: Split) -> dict[str, Any]:
    """A value of each parameter, of the type that the schema gives."""
    return {key: value(rng, kind, split) for key, kind in tool.parameters.items()}


def respond(rng: Generator, tool: Tool, call_arguments: dict[str, Any], split: Split) -> tuple[str, str]:
    """What the tool returns (JSON text) and the answer that reports it."""
    result = {key: value(rng, kind, split) for key, kind in tool.result.items()}
    return json.dumps(result), tool.reply.format(**call_arguments, **result)
