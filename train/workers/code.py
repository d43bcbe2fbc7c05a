"""The rewards, environments and tools that the sources of a run name, as its trainer calls them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Self

import jax

from stepjax.errors import ConfigError
from stepjax.infer.hosts import agreed_json
from stepjax.train.config.rewards import RewardSettings
from stepjax.train.config.tune import DataSettings
from stepjax.train.environments.episode import Environment, Message, Turn
from stepjax.train.plugins.reference import parted
from stepjax.train.workers.plugin import CodeCall, Plugin, UserCodeError, short
from stepjax.train.workers.pool import WorkerPool

MAX_WORKERS = 8  # where the settings do not say


@dataclass(frozen=True)
class NamedReward:
    """One reward of a source."""

    plugin: int
    name: str  # of its part in the metrics
    reference: str  # with a short file, for messages
    weight: float


class UserCode:
    """All code of the user in one run. On several hosts, process 0 runs it and all agree on what it returned.

    Without such code no process is started.
    """

    def __init__(self, data: Mapping[str, DataSettings], settings: RewardSettings):
        """
        Raises:
          ConfigError: a file, module or name does not exist, cannot be loaded or has the wrong parameters.
        """
        self._plugins: list[Plugin] = []
        self._rewards: dict[str, list[NamedReward]] = {}
        self._environments: dict[str, int] = {}
        for name, source in data.items():
            if source.weight or len(data) == 1:
                self._add(name, source)
        self._pool: WorkerPool | None = None
        self._sessions = itertools.count()
        workers = settings.workers or min(os.cpu_count() or 1, MAX_WORKERS)
        problem = ""
        if self._plugins and is_leader():
            try:
                self._pool = WorkerPool(self._plugins, workers=workers, timeout_s=settings.timeout_s)
            except ConfigError as error:
                problem = str(error)
        if self._plugins and _several():
            problem = agreed_json(problem)
        if problem:
            raise ConfigError(problem)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        if self._pool:
            self._pool.close()

    def of_source(self, name: str) -> SourceCode | None:
        """The code of a source; None if it has none."""
        if name not in self._rewards and name not in self._environments:
            return None
        return SourceCode(self, tuple(self._rewards.get(name, ())), self._environments.get(name))

    def submit(self, call: CodeCall) -> Future:
        """The future result of a call. Read it with `results_of`."""
        return self._pool.submit(call) if self._pool else Future()

    def new_session(self) -> str:
        return str(next(self._sessions))

    def what(self, plugin: int) -> str:
        """The setting and the name of a plugin, for messages."""
        return self._plugins[plugin].what

    def _add(self, name: str, source: DataSettings) -> None:
        weights = source.reward_weights
        labels = _labels(list(weights))
        for reference, weight in weights.items():
            plugin = self._plugin(Plugin("reward", (reference,), f"data.{name}.reward"))
            named = NamedReward(plugin, labels[reference], short(reference), weight)
            self._rewards.setdefault(name, []).append(named)
        if source.environment:
            setting, options = f"data.{name}.environment", source.environment_options
            self._environments[name] = self._plugin(Plugin("environment", (source.environment,), setting, options))
        if source.tool_references:
            plugin = Plugin("tools", source.tool_references, f"data.{name}.tool_functions")
            self._environments[name] = self._plugin(plugin)

    def _plugin(self, plugin: Plugin) -> int:
        self._plugins.append(plugin)
        return len(self._plugins) - 1


@dataclass(frozen=True)
class SourceCode:
    """The code of one source."""

    code: UserCode
    rewards: tuple[NamedReward, ...]
    environment: int | None  # number of its plugin

    def reward(self, reward: NamedReward, values: Mapping[str, Any]) -> Future:
        """The future result of a reward: {"total": …, "parts": {…}}."""
        return self.code.submit(CodeCall("reward", reward.plugin, values))

    def open(self, values: Mapping[str, Any], *, otherwise: Environment | None) -> CodeEpisode:
        """Begin an episode of the environment.

        Args:
          values: the keywords of `stepjax.train.environments.episode.OPENING_KEYWORDS` without options.
          otherwise: gives the reward if the environment has none.

        Raises:
          ConfigError: it cannot be made.
        """
        assert self.environment is not None
        session = self.code.new_session()
        (about,) = results_of([self.code.submit(CodeCall("open", self.environment, values, session))])
        if isinstance(about, UserCodeError):
            text, what = str(about), self.code.what(self.environment)
            raise ConfigError(text if text.startswith(what) else f"{what}: {text}")
        return CodeEpisode(self, session, about, otherwise)


class CodeEpisode:
    """An episode of a user's environment. What it returns are futures."""

    def __init__(self, code: SourceCode, session: str, about: Mapping[str, Any], otherwise: Environment | None):
        self._code, self._session, self._otherwise = code, session, otherwise
        self.messages: list[Message] | None = about["messages"]
        self.tools: list[dict[str, Any]] = about["tools"]
        self.rewarded: bool = about["rewarded"]

    def respond(self, turn: Turn) -> Future:
        """The future messages that answer a turn."""
        if self._otherwise:
            self._otherwise.respond(turn)
        values = {
            "reasoning": turn.reasoning,
            "content": turn.content,
            "calls": turn.calls,
            "finished": turn.finished,
        }
        return self._submit("respond", values)

    def reward(self) -> Future:
        """The future reward, {"total": …, "parts": {…}}."""
        if self.rewarded:
            return self._submit("episode_reward", {})
        future = Future()
        future.set_result({"total": self._otherwise.reward() if self._otherwise else 0.0, "parts": {}})
        return future

    def close(self) -> Future:
        return self._submit("close", {})

    def _submit(self, operation: Any, values: Mapping[str, Any]) -> Future:
        assert self._code.environment is not None
        return self._code.code.submit(CodeCall(operation, self._code.environment, values, self._session))


def results_of(futures: Sequence[Future]) -> list[Any]:
    """The results of calls, in order; `UserCodeError` in place of the result of a call that failed.

    On several hosts every process calls this at the same point, and all get the results of process 0.
    """
    results = [_outcome(future) for future in futures] if is_leader() else []
    if _several() and futures:
        results = agreed_json(results)
    return [value if ok else UserCodeError(value) for ok, value in results]


def runs_alone() -> bool:
    """Whether this is the only process of the run."""
    return not _several()


def is_leader() -> bool:
    """Whether this process runs the code of the user."""
    return not _several() or jax.process_index() == 0


def _several() -> bool:
    # process_count() would open the devices before the model does
    return jax.distributed.is_initialized() and jax.process_count() > 1


def _outcome(future: Future) -> tuple[bool, Any]:
    try:
        return True, future.result()
    except UserCodeError as error:
        return False, str(error)


def _labels(references: Sequence[str]) -> dict[str, str]:
    """A short name of each reward: its function's, with its file's where two have one name."""
    names = [parted(reference)[1] for reference in references]
    labels = {}
    for reference, name in zip(references, names, strict=True):
        place = parted(reference)[0].rpartition("/")[2].removesuffix(".py")
        labels[reference] = name if names.count(name) == 1 else f"{place}.{name}"
    if len(set(labels.values())) != len(labels):  # two files of one name in two folders
        labels = {reference: f"{label}.{number}" for number, (reference, label) in enumerate(labels.items())}
    return labels
