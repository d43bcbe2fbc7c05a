"""Rewards of finished episodes: of the environment, and of the functions of the user."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from stepjax.infer.session import Session
from stepjax.train.data.prompts import Prompt
from stepjax.train.environments.episode import Environment, Message, Turn
from stepjax.train.rewards.answer import RewardAnswer, RewardPrompt
from stepjax.train.rewards.value import Reward
from stepjax.train.workers.code import CodeEpisode, NamedReward, results_of
from stepjax.train.workers.plugin import UserCodeError


@dataclass
class Dialogue:
    """What was said in an episode after its prompt."""

    turns: list[Turn] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)  # turns and replies in OpenAI form

    def answer(self, *, raw: str, ids: Sequence[int]) -> RewardAnswer:
        """As a reward sees it."""
        last = self.turns[-1] if self.turns else Turn("", "", (), False)
        calls = [dict(call) for turn in self.turns for call in turn.calls]
        return RewardAnswer(
            text=last.content,
            reasoning=last.reasoning,
            tool_calls=calls,
            finished=last.finished,
            messages=list(self.messages),
            turns=len(self.turns),
            raw=raw,
            ids=list(ids),
        )


@dataclass
class Grade:
    """The rewards of one episode, which may not be known yet."""

    prompt: Prompt
    failure: str = ""  # the environment failed in the middle of the episode
    known: float = 0.0  # of an environment in this process
    futures: list[Future] = field(default_factory=list)
    functions: tuple[NamedReward, ...] = ()  # those of the first futures; an environment's may follow

    def reward(self, results: Sequence[Any]) -> Reward:
        """The reward from the results of the futures."""
        if self.failure:
            return Reward(math.nan, {}, self.failure)
        total, parts = self.known, {}
        for position, result in enumerate(results):
            function = self.functions[position] if position < len(self.functions) else None
            if isinstance(result, UserCodeError):
                what = f"reward {function.reference}" if function else self._environment
                return Reward(math.nan, {}, f"{what} failed: {result}")
            if function is None:
                total += result["total"]
                parts |= result["parts"] or ({"environment": result["total"]} if self.functions else {})
                continue
            total += function.weight * result["total"]
            if result["parts"]:
                parts |= {f"{function.name}/{name}": value for name, value in result["parts"].items()}
            else:
                parts[function.name] = result["total"]
        return Reward(total, parts)

    @property
    def _environment(self) -> str:
        return environment_name(self.prompt)


def environment_name(prompt: Prompt) -> str:
    """What messages call the environment of a prompt."""
    code = prompt.code
    return code.code.what(code.environment) if code and code.environment is not None else "the environment"


def begin_grade(
    prompt: Prompt, environment: Environment | CodeEpisode, answer: RewardAnswer, session: Session, *, failure: str = ""
) -> Grade:
    """Ask for the rewards of an episode that is over.

    Args:
      failure: why the episode could not go on; "" if it could.
    """
    functions = prompt.code.rewards if prompt.code else ()
    grade = Grade(prompt, failure, functions=functions)
    if not failure:
        if prompt.code and functions:
            values = {
                "prompt": _reward_prompt(prompt, session),
                "answer": answer,
                "row": dict(prompt.row),
                "source": prompt.source,
            }
            grade.futures += [prompt.code.reward(function, values) for function in functions]
        if isinstance(environment, CodeEpisode):
            if environment.rewarded or not functions:
                grade.futures.append(environment.reward())
        elif not functions:
            grade.known = float(environment.reward())
    if isinstance(environment, CodeEpisode):
        environment.close()
    return grade


def finished_grades(grades: Sequence[Grade]) -> list[Reward]:
    """The rewards of these episodes, once all are known. All processes have the same."""
    results = iter(results_of([future for grade in grades for future in grade.futures]))
    return [grade.reward([next(results) for _ in grade.futures]) for grade in grades]


def _reward_prompt(prompt: Prompt, session: Session) -> RewardPrompt:
    assert session.tokenizer is not None
    text = session.tokenizer.decode(prompt.ids, skip_special=False)
    asked = [message for message in prompt.messages if message.get("role") == "user"]
    question = asked[-1].get("content") if asked else text
    tools = [dict(tool) for tool in prompt.tools] if prompt.tools else None
    return RewardPrompt(
        messages=[dict(message) for message in prompt.messages],
        text=text,
        question=question if isinstance(question, str) else text,
        ids=list(prompt.ids),
        tools=tools,
    )
