"""Our model under the names of `golden.make.Oracle.run`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.config import ModelConfig
from stepjax.model.cache import Chunk
from stepjax.model.step3p5 import Step3p5, abstract, bind
from stepjax.weights.inventory import inventory

Arrays = dict[str, Any]


def params_of_hub(
    config: ModelConfig, tensors: Mapping[str, np.ndarray], dtype: Any = jnp.float32
) -> dict[str, jax.Array]:
    """The parameter table of a checkpoint's tensors, by the table of names alone."""
    return {
        spec.path: jnp.asarray(tensors[spec.hub_name]).astype(jnp.float32 if spec.dtype == "F32" else dtype)
        for spec in inventory(config)
    }


def build(config: ModelConfig, params: Mapping[str, Any], dtype: Any = jnp.float32) -> Step3p5:
    """A model with these parameters."""
    return bind(abstract(config, dtype=dtype), params)


def outputs(model: Step3p5, ids_BT: jax.Array) -> Arrays:
    """Everything the oracle reports; a row of MTP depth k that was fed past the end is cut off."""
    B, T = ids_BT.shape
    chunk = Chunk.whole(B, T)
    hidden, _, experts = model.forward(ids_BT, chunk)
    out = {"hidden": hidden, "normed": model.norm(hidden), "logits": model.logits(hidden)}
    out["experts"] = jnp.sort(jnp.stack(experts), axis=-1)
    for k, state in enumerate(model.mtp_hidden(ids_BT, hidden, chunk), start=1):
        out[f"mtp_{k}"] = model.mtp[k - 1].logits(state)[:, : T - k]
        out[f"mtp_hidden_{k}"] = state[:, : T - k]
    return out


def difference(ours: Mapping[str, Any], theirs: Mapping[str, np.ndarray], names: str) -> float:
    """Largest absolute difference over the arrays named, ``"logits mtp_1"``."""
    return max(
        float(np.abs(np.asarray(ours[name], np.float32) - np.asarray(theirs[name], np.float32)).max())
        for name in names.split()
    )
