"""Losses that ``stepjax serve --train`` has beyond the Tinker API, for users of the unmodified SDK.

The teacher is held by the server: the base model by its name, or saved weights by their path. The divergence is over
the whole vocabulary, so that one call a batch is exact on-policy distillation.

Example::

    from stepjax.train.client import reverse_kl

    reverse_kl(training_client, data, teacher="step-tiny").result()
    training_client.optim_step(tinker.AdamParams(learning_rate=1e-4)).result()
"""

from __future__ import annotations

import functools
import json
import os
import urllib.request
from collections.abc import Sequence
from typing import Any

from stepjax.errors import ConfigError

CAPABILITIES = "/api/v1/get_server_capabilities"
TIMEOUT_S = 30.0


def reverse_kl(client: Any, data: Sequence[Any], *, teacher: str, base_url: str | None = None) -> Any:
    """Add the gradient of Σ w·KL(π‖q), π the model and q the teacher, over the positions of ``data``.

    Args:
      client: a ``tinker.TrainingClient``.
      data: ``tinker.Datum`` with ``target_tokens``, and ``weights`` w where not all positions count as 1.
      teacher: the base model's name, or a ``tinker://`` path of saved weights.
      base_url: of the server; None: ``TINKER_BASE_URL``.

    Returns: the future of ``forward_backward``. Its outputs have ``logprobs`` and ``kl``, its metrics ``loss:sum`` and
    ``kl:sum``.

    Raises:
      ConfigError: the server has no such loss.
    """
    return _taught(client, data, "reverse_kl", base_url, {"teacher": teacher})


def forward_kl(client: Any, data: Sequence[Any], *, teacher: str, base_url: str | None = None) -> Any:
    """As `reverse_kl`, with KL(q‖π)."""
    return _taught(client, data, "forward_kl", base_url, {"teacher": teacher})


def jsd(client: Any, data: Sequence[Any], *, teacher: str, beta: float = 0.5, base_url: str | None = None) -> Any:
    """As `reverse_kl`, with β·KL(q‖m) + (1 − β)·KL(π‖m) and m = βq + (1 − β)π."""
    return _taught(client, data, "jsd", base_url, {"teacher": teacher, "beta": beta})


def _taught(client: Any, data: Sequence[Any], loss: str, base_url: str | None, config: dict[str, Any]) -> Any:
    url = (base_url or os.environ.get("TINKER_BASE_URL", "")).rstrip("/")
    served = served_losses(url) if url else ()
    if loss not in served:
        where = url or "the hosted service"
        raise ConfigError(
            f"loss: {where} has no {loss}, which is an extension of stepjax serve --train; give the address of such a "
            "server as base_url, or set TINKER_BASE_URL"
        )
    return client.forward_backward(list(data), loss, config)


def served_losses(base_url: str) -> tuple[str, ...]:
    """The losses that a server names; none if it names none."""
    return tuple(capabilities(base_url).get("losses", ()))


@functools.cache
def capabilities(base_url: str) -> dict[str, Any]:
    """What a server says of itself.

    Raises:
      ConfigError: it cannot be asked.
    """
    headers = {"X-API-Key": os.environ.get("TINKER_API_KEY", "tml-none")}
    request = urllib.request.Request(f"{base_url}{CAPABILITIES}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return dict(json.load(answer))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{base_url}: cannot be asked what it serves ({error})") from None
