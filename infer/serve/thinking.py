"""The switches of thinking that the interfaces have, as one wish: whether the model thinks, how long, and visibly."""

from __future__ import annotations

from dataclasses import dataclass

from stepjax.errors import RequestError
from stepjax.infer.serve.schemas import ChatRequest
from stepjax.text.chat import THINKING_KWARGS

# Tokens of thinking; None is unbounded. The model was not trained with efforts.
EFFORTS = {"none": None, "minimal": 512, "low": 2048, "medium": 8192, "high": None, "xhigh": None, "max": None}


@dataclass(frozen=True)
class ThinkingWish:
    """What a request says about the thinking."""

    enabled: bool
    budget: int | None  # tokens after which it is closed; None: no limit
    shown: bool  # whether it is part of the answer


def thinking_of(body: ChatRequest) -> ThinkingWish:
    """What the switches say together. Any of them switches thinking off, the smallest budget holds, and a budget in
    tokens takes precedence over an effort.

    Raises:
      RequestError: an effort is unknown.
    """
    thinking, reasoning = body.thinking, body.reasoning
    efforts = {"reasoning_effort": body.reasoning_effort, "reasoning.effort": reasoning.effort if reasoning else None}
    for name, effort in efforts.items():
        if effort is not None and effort not in EFFORTS:
            raise RequestError(f"{name}: is {effort[:40]!a}, expected one of {', '.join(EFFORTS)}")
    kwargs = body.chat_template_kwargs or {}
    switches = [
        body.enable_thinking is False,
        *(kwargs.get(name) is False for name in THINKING_KWARGS),
        thinking is not None and thinking.type == "disabled",
        reasoning is not None and reasoning.enabled is False,
        *(effort == "none" for effort in efforts.values()),
    ]
    budgets = [
        body.thinking_token_budget,
        thinking.budget_tokens if thinking else None,
        reasoning.max_tokens if reasoning else None,
        body.nvext.max_thinking_tokens if body.nvext else None,
    ]
    limits = [budget for budget in budgets if budget is not None]
    limits = limits or [limit for effort in efforts.values() if effort and (limit := EFFORTS[effort]) is not None]
    return ThinkingWish(
        enabled=not any(switches),
        budget=min(limits, default=None),
        shown=body.include_reasoning is not False and not (reasoning is not None and reasoning.exclude),
    )
