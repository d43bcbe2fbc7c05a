"""Environments of the library `verifiers` (github.com/PrimeIntellect-ai/verifiers), as ``verifiers:NAME``.

The environment runs its own rollout, and calls the model through `Endpoint`. So setup, tools, turns and stop conditions
are its own. Its rubric gives the reward, and each function of the rubric is a part.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import importlib
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from stepjax.errors import ConfigError
from stepjax.train.environments.endpoint import MODEL, Caller, Endpoint
from stepjax.train.environments.episode import Message, Turn
from stepjax.train.environments.session import settled
from stepjax.train.plugins.failure import described

KEY_VARIABLE = "STEPJAX_ENDPOINT_KEY"  # clients want one
INSTALL = "install the extra as pip install 'stepjax[verifiers]'"

_failures: contextvars.ContextVar[list[str]] = contextvars.ContextVar("failures")


class VerifiersSource:
    """An environment of the library, and its rows."""

    waits = True
    file = None

    def __init__(self, name: str, options: Mapping[str, Any], *, what: str):
        """
        Raises:
          ConfigError: the library or the environment is not installed, or its rubric compares answers with each other.
        """
        self._what = what
        try:
            self._library = importlib.import_module("verifiers")
            load = self._library.load_environment
        except ImportError:
            raise ConfigError(f"{what}: needs verifiers; {INSTALL}") from None
        except AttributeError as error:
            version, reason = getattr(self._library, "__version__", ""), described(error.__cause__ or error)
            raise ConfigError(
                f"{what}: verifiers {version} offers no load_environment ({reason}); versions 0.1.14 to 0.3 have it: "
                f"{INSTALL}"
            ) from None
        os.environ.setdefault(KEY_VARIABLE, "none")
        try:
            self._environment = load(name, **options)
        except BaseException as error:
            raise ConfigError(f"{what}: cannot be loaded: {described(error)}") from None
        rubric = self._environment.rubric
        if getattr(rubric, "has_group_rewards", False) or getattr(rubric, "_get_group_reward_funcs", list)():
            raise ConfigError(
                f"{what}: its rubric scores all answers to a prompt together, but here each answer is scored alone"
            )
        for part in getattr(rubric, "rubrics", None) or [rubric]:
            part.funcs[:] = [_recorded(function) for function in part.funcs]
        self._endpoint: Endpoint | None = None

    async def open(self, values: Mapping[str, Any]) -> VerifiersSession:
        """Begin an episode with a row of the environment's data set."""
        if self._endpoint is None:
            self._endpoint = Endpoint()
            await self._endpoint.start()
        caller, url = self._endpoint.caller()
        row = self._row(values["index"], values["split"])
        client = _client(self._library, url)
        work = asyncio.create_task(self._environment.rollout(row, client, MODEL, {}))
        return VerifiersSession(self._environment, caller, work)

    def _row(self, index: int, split: str) -> dict[str, Any]:
        """A row, in a new order each epoch."""
        environment = self._environment
        rows = environment.get_eval_dataset() if split == "test" else environment.get_dataset()
        epoch, position = divmod(index, len(rows))
        order = np.random.default_rng([epoch, 11]).permutation(len(rows))
        row = dict(rows[int(order[position])])
        row.setdefault("example_id", int(order[position]))
        return row


class VerifiersSession:
    """One rollout of the library."""

    def __init__(self, environment: Any, caller: Caller, work: asyncio.Task):
        self._environment, self._caller, self._work = environment, caller, work

    async def start(self) -> dict[str, Any]:
        try:
            messages, tools = await self._caller.first(self._work)
        except RuntimeError as error:
            failure = self._work.result().get("error") if self._work.done() else None
            raise RuntimeError(f"{error}: {described(failure)}" if failure else str(error)) from None
        return {"messages": messages, "tools": tools, "rewarded": True}

    async def respond(self, turn: Turn) -> list[Message]:
        return await self._caller.reply(turn, self._work)

    async def reward(self) -> tuple[float, dict[str, float]]:
        """The weighted sum of the rubric, and each of its functions. RuntimeError: one of them failed."""
        await self._caller.end()
        state = await self._work
        if state.get("error") is not None:
            raise RuntimeError(f"the rollout failed: {described(state['error'])}")
        failures: list[str] = []
        _failures.set(failures)
        await self._environment.rubric.score_rollout(state)
        if failures:  # the library takes 0 for them
            raise RuntimeError("; ".join(failures))
        total = float(state["reward"])
        if not math.isfinite(total):
            raise RuntimeError(f"the reward is {total}, expected a finite number")
        metrics = {str(name): value for name, value in (state.get("metrics") or {}).items()}
        return total, {name: float(value) for name, value in metrics.items() if _is_finite(value)}

    async def close(self) -> None:
        await self._caller.end()
        self._work.cancel()


def _recorded(function: Any) -> Any:
    """The function of a rubric, which also says when it fails."""

    @functools.wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return await settled(function(*args, **kwargs))
        except Exception as error:
            _failures.get([]).append(f"{getattr(function, '__name__', 'reward')}: {described(error)}")
            raise

    return call


def _client(library: Any, url: str) -> Any:
    """What the library's version takes for a client of our endpoint."""
    kind = getattr(library, "ClientConfig", None)
    if kind is not None:
        return kind(api_base_url=url, api_key_var=KEY_VARIABLE, max_retries=0)
    return importlib.import_module("openai").AsyncOpenAI(base_url=url, api_key="none", max_retries=0)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False
