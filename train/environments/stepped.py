"""Plays environments with `reset` and `step`, as Gymnasium and OpenEnv have them, in text.

Gymnasium's `step` returns (observation, reward, terminated, truncated, info), OpenEnv's an object with ``observation``,
``reward`` and ``done``. Sources: gymnasium.farama.org/api/env, github.com/meta-pytorch/OpenEnv.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from stepjax.errors import ConfigError
from stepjax.train.environments.episode import Message, Turn
from stepjax.train.environments.session import settled

ABOUT = {"reward", "done", "metadata"}  # fields of OpenEnv's observations that are not for the model


class ActionError(Exception):
    """The text of a turn is no action. The model reads the message."""


def is_stepped(made: Any) -> bool:
    """Whether an object is played by `reset` and `step`."""
    return all(callable(getattr(made, name, None)) for name in ("reset", "step")) and not callable(
        getattr(made, "respond", None)
    )


class SteppedSession:
    """One episode. The reward is the sum over its steps.

    The object may have ``to_action(turn)`` and ``to_text(observation)``, which say how text becomes an action and an
    observation text. Without them an action is the whole text, or what ``action_space`` needs: an integer for a
    discrete space, JSON for the others.
    """

    def __init__(self, made: Any, *, seed: int, instructions: str = "", what: str):
        self._made, self._seed, self._what = made, seed, what
        self._space = getattr(made, "action_space", None)
        self._instructions = instructions or _instructions(self._space)
        self._total, self._steps, self._over = 0.0, 0, False

    async def start(self) -> dict[str, Any]:
        reset = self._made.reset
        seeded = _takes(reset, "seed")
        first = await settled(reset(seed=self._seed) if seeded else reset())
        observation = first[0] if isinstance(first, tuple) else getattr(first, "observation", first)
        system = [{"role": "system", "content": self._instructions}] if self._instructions else []
        messages = [*system, {"role": "user", "content": await self._text(observation)}]
        return {"messages": messages, "tools": [], "rewarded": True}

    async def respond(self, turn: Turn) -> list[Message]:
        if self._over or not turn.finished:
            return []
        try:
            action = await self._action(turn)
        except ActionError as error:
            return [_reply(turn, f"Error: {error}")]
        observation, reward, self._over = _stepped(await settled(self._made.step(action)), self._what)
        self._total += reward
        self._steps += 1
        return [] if self._over else [_reply(turn, await self._text(observation))]

    async def reward(self) -> tuple[float, dict[str, float]]:
        return self._total, {"steps": float(self._steps), "ended": float(self._over)}

    async def close(self) -> None:
        if callable(getattr(self._made, "close", None)):
            await settled(self._made.close())

    async def _action(self, turn: Turn) -> Any:
        if callable(getattr(self._made, "to_action", None)):
            return await settled(self._made.to_action(turn))
        return action_of(turn.content, self._space)

    async def _text(self, observation: Any) -> str:
        if callable(getattr(self._made, "to_text", None)):
            return str(await settled(self._made.to_text(observation)))
        return text_of(observation)


def action_of(text: str, space: Any) -> Any:
    """The action that a text names.

    Args:
      space: of Gymnasium; None: any text.

    Raises:
      ActionError: the text names none of the space.
    """
    text = text.strip()
    if space is None or type(space).__name__ == "Text":
        action: Any = text
    elif hasattr(space, "n") and np.ndim(space.n) == 0:
        numbers = re.findall(r"-?\d+", text)
        if not numbers:
            raise ActionError(f"expected {_described(space)}")
        action = int(numbers[-1])
    else:
        try:
            action = np.asarray(json.loads(text), getattr(space, "dtype", None))
        except (ValueError, TypeError):
            raise ActionError(f"expected {_described(space)}") from None
    if space is not None and not space.contains(action):
        raise ActionError(f"{text[:40]!r} is no action, expected {_described(space)}")
    return action


def text_of(observation: Any) -> str:
    """An observation as text: text as it is, other values as JSON."""
    if isinstance(observation, str):
        return observation
    if callable(getattr(observation, "model_dump", None)):
        observation = observation.model_dump()
    elif dataclasses.is_dataclass(observation) and not isinstance(observation, type):
        observation = dataclasses.asdict(observation)
    if isinstance(observation, Mapping):
        fields = {str(name): value for name, value in observation.items() if name not in ABOUT}
        only = next(iter(fields.values())) if len(fields) == 1 else None
        return only if isinstance(only, str) else json.dumps(fields, ensure_ascii=False, default=_json)
    return json.dumps(observation, ensure_ascii=False, default=_json)


def gymnasium_factory(name: str, *, what: str) -> Callable[..., Any]:
    """A factory of Gymnasium's registered environment ``name``. ConfigError: Gymnasium is not installed."""
    try:
        make = importlib.import_module("gymnasium").make
    except ImportError:
        raise ConfigError(f"{what}: needs gymnasium; install the extra as pip install 'stepjax[gymnasium]'") from None
    return lambda options: make(name, **{key: value for key, value in options.items() if key != "instructions"})


def _stepped(result: Any, what: str) -> tuple[Any, float, bool]:
    """Observation, reward and end of a step."""
    if isinstance(result, tuple) and len(result) == 5:
        observation, reward, terminated, truncated, _ = result
        return observation, float(reward), bool(terminated or truncated)
    if isinstance(result, tuple) and len(result) == 4:  # OpenAI Gym before 0.26
        observation, reward, done, _ = result
        return observation, float(reward), bool(done)
    fields: Any = result
    if all(hasattr(fields, name) for name in ("observation", "reward", "done")):
        return fields.observation, float(fields.reward or 0.0), bool(fields.done)
    raise TypeError(
        f"{what}: step returned {type(result).__name__}, expected (observation, reward, terminated, truncated, info) "
        "or an object with observation, reward and done"
    )


def _reply(turn: Turn, text: str) -> Message:
    if turn.calls:
        return {"role": "tool", "tool_call_id": "call_0", "content": text}
    return {"role": "user", "content": text}


def _instructions(space: Any) -> str:
    return "" if space is None or type(space).__name__ == "Text" else f"Answer each message with {_described(space)}."


def _described(space: Any) -> str:
    if hasattr(space, "n") and np.ndim(space.n) == 0:
        start = int(getattr(space, "start", 0))
        return f"one integer from {start} to {start + int(space.n) - 1}"
    return f"a JSON value in {space}"


def _takes(function: Any, name: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _json(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    return str(value)
