"""Objectives of a user: what their code raises or returns wrongly is told in one line, with the line of the file."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np

from stepjax.errors import ConfigError, StepjaxError
from stepjax.train.objectives.objective import Averaging, Objective, TokenInputs, TokenLoss
from stepjax.train.plugins.failure import described
from stepjax.train.plugins.reference import parted

METHODS = tuple("token_loss policy_loss loss advantages averaging uses_reference uses_entropy scored metrics".split())


def guarded(kind: type[Objective], reference: str) -> Objective:
    """An instance of a user's class, whose own methods end with ConfigError where they raise or return what cannot be.

    Args:
      reference: that named the class.
    """
    place, name = parted(reference)
    title, file = f"{Path(place).name}:{name}" if place else reference, inspect.getsourcefile(kind)

    def failed(what: str, error: BaseException) -> ConfigError:
        return ConfigError(f"loss.objective: {title}{what} failed: {described(error, file=file)}")

    try:
        objective = kind()
    except Exception as error:
        raise failed("()", error) from None
    if _is_ours(objective.uses_entropy):  # without its gradient, a term with the entropy would do nothing in silence
        objective.__dict__["uses_entropy"] = lambda settings: True
    for method in METHODS:
        function = getattr(objective, method, None)
        if function is not None and not _is_ours(function):
            guard = _guard(function, _CHECKS.get(method), f"{title}.{method}", functools.partial(failed, f".{method}"))
            objective.__dict__[method] = guard
    return objective


def _is_ours(function: Any) -> bool:
    return getattr(function, "__module__", "").startswith("stepjax.")


def _guard(
    function: Callable[..., Any],
    check: Callable[..., Any] | None,
    title: str,
    failed: Callable[[BaseException], ConfigError],
) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            result = function(*arguments, **options)
        except StepjaxError:
            raise
        except Exception as error:
            raise failed(error) from None
        return check(title, result, *arguments) if check else result

    return call


def _checked_loss(title: str, result: Any, inputs: TokenInputs, *_: Any) -> TokenLoss:
    """A loss of each token: an array of numbers, not a mean over them."""
    shape = inputs.mask.shape
    if not isinstance(result, TokenLoss):
        raise ConfigError(
            f"loss.objective: {title} returned {type(result).__name__}, expected TokenLoss, such as "
            "TokenLoss.of_all(loss)"
        )
    for name in ("loss", "kept_tokens", "kept_sequences"):
        found = jnp.shape(getattr(result, name))
        if found != shape:
            raise ConfigError(
                f"loss.objective: {title} returned {name} of shape {found}, expected a value for each token, {shape}"
            )
    if not jnp.issubdtype(result.loss.dtype, jnp.floating):
        raise ConfigError(f"loss.objective: {title} returned a loss of {result.loss.dtype}, expected floating point")
    return result


def _checked_advantages(title: str, result: Any, rewards: np.ndarray, *_: Any) -> np.ndarray:
    """A number for each answer."""
    try:
        advantages = np.asarray(result, np.float32)
    except (TypeError, ValueError):
        advantages = np.asarray(result, object)
    if advantages.shape != np.shape(rewards) or advantages.dtype != np.float32:
        raise ConfigError(
            f"loss.objective: {title} returned {type(result).__name__} of shape {advantages.shape}, expected a number "
            f"for each answer, {np.shape(rewards)}"
        )
    return advantages


def _checked_averaging(title: str, result: Any, *_: Any) -> Averaging:
    if result not in get_args(Averaging):
        raise ConfigError(f"loss.objective: {title} returned {result!r}, expected one of {get_args(Averaging)}")
    return result


_CHECKS: dict[str, Callable[..., Any]] = {
    "token_loss": _checked_loss,
    "policy_loss": _checked_loss,
    "advantages": _checked_advantages,
    "averaging": _checked_averaging,
}
