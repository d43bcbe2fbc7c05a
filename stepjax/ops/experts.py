"""Routed experts without dropping a token: one function, seven fast forms, one slow reference (`expert_sizes`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from stepjax.gpu_target import kernel_choice, kernels_target
from stepjax.ops.expert_choice import Formulation, buffer_rows, choose_form, choose_form_cpu
from stepjax.ops.expert_dense import ExpertWeights, batched, gathered, held_ids, in_turn, reference
from stepjax.ops.expert_sorted import blocked, capacity, grouped, grouped_fits
from stepjax.ops.expert_stored import stored, stored_readers
from stepjax.ops.manual_axes import vary_alike
from stepjax.ops.pallas_hopper import hopper_cores
from stepjax.weights.adapted import plain
from stepjax.weights.quantised import format_of


def routed_experts(
    x_TD: jax.Array,
    ids_TA: jax.Array,
    combine_TA: jax.Array,
    weights: ExpertWeights,
    *,
    limit: float | None,
    form: Formulation | None = None,
    load: int | None = None,
    slot_T: jax.Array | None = None,
    first: jax.Array | int | None = None,
) -> jax.Array:
    """``Σ_a combine[t, a] · SwiGLU_{ids[t, a]}(x[t])`` as float32 [T, D].

    Args:
      ids_TA: int32 expert of each assignment; an id ≥ E contributes nothing (padding, or another device's expert).
      combine_TA: float32.
      limit: clamp inside the SwiGLU, or None.
      form: pins the formulation; None chooses by the static token count.
      load: assignments to expect among ``ids`` that are not ≥ E; None: all. It sizes buffers and bounds nothing.
      first: the experts at hand are those from here on of all that ids may name; None: ids name these.
      slot_T: int32, which adapter of a stack each token uses (`stepjax.weights.adapted`).
    """
    first = None if first is None else jnp.asarray(first, jnp.int32).reshape(1)
    x_TD, ids_TA, combine_TA, weights, slot_T, first = vary_alike((x_TD, ids_TA, combine_TA, weights, slot_T, first))
    load = ids_TA.size if load is None else load
    gpu = kernels_target("on", "all")
    rows = buffer_rows(load / weights.gate.shape[0], most=x_TD.shape[0])

    def run(form: Formulation) -> Callable[..., jax.Array]:
        forms = {"gathered": gathered, "batched": batched, "in_turn": in_turn, "reference": reference}
        forms |= {"capacity": partial(capacity, rows=rows), "blocked": partial(blocked, rows=rows)}
        forms |= {"grouped": partial(grouped, rows=rows, load=load)}

        def of_these(x: Any, ids: Any, combine: Any, weights: ExpertWeights, slot: Any, first: Any) -> jax.Array:
            if form == "stored":
                return stored(x, ids, combine, weights, slot, limit=limit, load=load, gpu=gpu, first=first)
            ids = ids if first is None else held_ids(ids, first[0], weights.gate.shape[0])
            return forms[form](x, ids, combine, weights, slot, limit=limit)

        return jax.named_scope(f"experts_{form}")(of_these)

    if form:
        return run(form)(x_TD, ids_TA, combine_TA, weights, slot_T, first)
    size = (x_TD.shape[0], weights.gate.shape[0], ids_TA.shape[1])
    quantised = format_of(plain(weights.gate)).quantised
    by_kernel = stored_readers(x_TD, weights, gpu) is not None and (quantised or kernel_choice() == "all")
    kernel = hopper_cores() > 0 and grouped_fits(x_TD, weights)
    other = choose_form(*size, widened=quantised, kernel=kernel, stored=by_kernel)
    return jax.lax.platform_dependent(
        x_TD, ids_TA, combine_TA, weights, slot_T, first, cpu=run(choose_form_cpu(*size)), default=run(other)
    )


def expert_load(ids_BTA: jax.Array, num_experts: int) -> jax.Array:
    """Assignments of each expert, int32 [E]; an id ≥ E (padding) counts nowhere."""
    hot = ids_BTA.reshape(-1, 1) == jnp.arange(num_experts)[None, :]
    return jnp.sum(hot, axis=0, dtype=jnp.int32)
