"""Rewards, environments and tools as a user writes them; tests name this file in settings."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import sys
import time
from decimal import Decimal
from typing import Literal

import numpy as np


def exact(answer, row):
    return answer.text.strip() == row["answer"]


async def parts(answer, prompt):
    await asyncio.sleep(0)
    return {"length": len(answer.text), "asked": len(prompt.question)}


def totalled(answer):
    return {"reward": 0.25, "right": 1.0}


def everything(**given):
    return float(sorted(given) == ["answer", "prompt", "row", "source"])


class Judge:
    """A reward that is made once."""

    def __init__(self):
        self.calls = 0

    async def __call__(self, answer):
        self.calls += 1
        return self.calls


def greedy_writer(row, answer):
    """Changes what it is given."""
    row["answer"] = "changed"
    answer.messages.append("changed")
    return len(row) + len(answer.messages)


def numpy_scalar(answer):
    return np.float32(0.5)


def array_0d(answer):
    return np.asarray(0.5)


def decimal(answer):
    return Decimal("0.5")


def talker(answer):
    print("a reward may print")
    sys.stderr.write("and write\n")
    return 0.5


def raises(answer):
    return 1 / len(answer.text[:0])


def leaves(answer):
    sys.exit(3)


def interrupts(answer):
    class Pressed(KeyboardInterrupt):
        pass

    raise Pressed("now")


def dies(answer):
    os._exit(7)


def hangs(answer):
    while answer.text == "hang":
        time.sleep(0.01)
    return 1.0


async def waits_forever(answer):
    await asyncio.sleep(1000)


async def will_not_stop(answer):
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(1000)


def forks(answer):
    if os.fork() == 0:
        return 0.0
    return 1.0


def none(answer):
    return None


def nan(answer):
    return float("nan")


def infinite(answer):
    return {"a": 1.0, "b": float("inf")}


def text(answer):
    return "True"


def vector(answer):
    return np.ones(2)


def empty(answer):
    return {}


def positional(answer, /):
    return 1.0


def trl(prompts, completions, **kwargs):
    return [1.0 for _ in completions]


not_callable = 3


def lookup(city: str, unit: Literal["C", "F"] = "C") -> str:
    """The temperature of a city.

    Args:
        city: Name of the city,
            in any language.
        unit: Celsius or Fahrenheit.

    Returns:
        A sentence.
    """
    if city == "Atlantis":
        raise KeyError(city)
    return f"{city}: 20 {unit}"


async def total(values: list[float]) -> float:
    """The sum.

    :param values: numbers
    """
    return sum(values)


class Shop:
    """A shop, in which the model buys with a tool and is then told to stop."""

    def __init__(self, row, seed, options):
        self.messages = [{"role": "user", "content": f"Buy {row.get('item', 'tea')}."}]
        self.bought = []
        self.price = options.get("price", 3)
        self.tools = [self.buy]

    def buy(self, item: str) -> str:
        """Buy something.

        Args:
          item: what to buy
        """
        self.bought.append(item)
        return f"It costs {self.price}."

    async def respond(self, turn):
        return None if self.bought else "Please buy something."

    async def reward(self):
        return {"bought": len(self.bought), "cheap": float(self.price < 5)}


class Unsteady:
    """Begins otherwise each time."""

    def __init__(self):
        self.messages = [{"role": "user", "content": os.urandom(4).hex()}]

    def respond(self, turn):
        return None

    def reward(self):
        return 0.0


class Broken:
    """Fails in its second turn."""

    messages = ({"role": "user", "content": "Hello"},)

    def respond(self, turn):
        raise RuntimeError("no reply")

    def reward(self):
        return 1.0


class Mute:
    """Has nothing to answer with."""

    messages = ({"role": "user", "content": "Hello"},)


@dataclasses.dataclass
class Result:
    """As OpenEnv's clients return it."""

    observation: object
    reward: float | None
    done: bool


class Guess:
    """Guess a number: as OpenEnv's clients are, asynchronous."""

    instructions = "Guess."

    def __init__(self):
        self.number = None

    async def reset(self):
        self.number = 3
        return Result({"text": "Guess a number.", "done": False}, None, False)

    async def step(self, action):
        right = action == str(self.number)
        return Result({"text": "Right." if right else "Wrong."}, float(right), right)


class Counter:
    """As Gymnasium's are: count to the number that the seed gives."""

    class action_space:
        n, start = 3, 1

        @staticmethod
        def contains(action):
            return 1 <= action <= 3

    def reset(self, *, seed=None, options=None):
        self.left = 4 + (seed or 0) % 2
        return np.asarray([self.left]), {}

    def step(self, action):
        self.left -= action
        return np.asarray([self.left]), float(self.left == 0), self.left <= 0, False, {}

    def close(self):
        pass


def make_counter(row, split):
    return Counter()


def weather(city: str) -> dict:
    """Weather of a city."""
    return {"temp": 21, "sky": "sunny"}


weather.__name__ = "get_weather"


def told(answer):
    """Whether a tool was called and its answer told."""
    return {"called": bool(answer.tool_calls), "told": "21" in answer.text, "turns": answer.turns}


class Weather:
    """Makes its own prompts."""

    def __init__(self, index, split):
        self.messages = [{"role": "user", "content": f"What is the weather in {('Paris', 'Rome')[index % 2]}?"}]
        self.tools = [weather]
        self.split = split

    def respond(self, turn):
        self.text = turn.content
        return None

    def reward(self):
        return {"told": "21" in self.text, "test": self.split == "test"}
