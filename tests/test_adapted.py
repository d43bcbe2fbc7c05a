"""The products of the routed experts with an adapted weight, against one matrix for each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepjax.weights.adapted import (
    Adapted,
    buffer_product,
    expert_product,
    hidden_product,
    input_product,
    merged,
    pair_product,
)

E, ROWS, OUT, IN, RANK, SLOTS = 3, 4, 5, 6, 2, 2
SLOT = (0, 1, 2, 1)  # of the four rows; 2 stands for no adapter

# Per form: the function, the einsum of its rows with a matrix for each row (z: the row), the axes of the rows, and
# whether the weight is the first operand.
FORMS: dict[str, tuple[Callable[..., jax.Array], str, tuple[int, ...], bool]] = {
    "buffer": (buffer_product, "ezi,zeoi->ezo", (E, ROWS, IN), False),
    "expert": (expert_product, "zi,zoi->zo", (ROWS, IN), False),
    "input": (input_product, "zi,zeoi->eoz", (ROWS, IN), True),
    "hidden": (hidden_product, "eiz,zeoi->eoz", (E, IN, ROWS), True),
    "pair": (pair_product, "zi,zoi->zo", (ROWS, IN), True),
}


def adapted(name: str, shared: str) -> Adapted:
    lead = {"expert": (), "pair": (ROWS,)}.get(name, (E,))
    keys = jax.random.split(jax.random.key(0), 3)
    lead_a, lead_b = (() if shared == factor else lead for factor in "ab")
    return Adapted(
        jax.random.normal(keys[0], (*lead, OUT, IN)),
        jax.random.normal(keys[1], (*lead_a, SLOTS * RANK, IN)),
        jax.random.normal(keys[2], (*lead_b, OUT, SLOTS * RANK)),
        scale=0.5,
        slots=SLOTS,
    )


def matrix(w: Adapted, slot: int) -> Any:
    return np.asarray(merged(w.block(slot), jnp.float32) if slot < SLOTS else w.base)


@pytest.mark.parametrize("shared", ["", "a", "b"])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("chosen", [True, False])
def test_each_form_is_a_product_with_the_merged_matrix_of_its_row(name: str, shared: str, chosen: bool):
    run, form, shape, weight_first = FORMS[name]
    w = adapted(name, shared)
    x = jax.random.normal(jax.random.key(1), shape)
    slots = SLOT if chosen else (0,) * ROWS
    if not chosen:
        w = w.block(0)
    matrices = np.stack([matrix(w, slot) if chosen else np.asarray(merged(w, jnp.float32)) for slot in slots])
    if name == "pair":
        matrices = np.stack([matrices[row, row] for row in range(ROWS)])
    slot = jnp.array(SLOT) if chosen else None
    out = run(w, x, slot=slot) if weight_first else run(x, w, slot=slot)
    expected = np.einsum(form, np.asarray(x, np.float64), matrices.astype(np.float64))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)  # float32 sums of six products


def test_each_expert_may_have_slots_of_its_own_rows():
    w = adapted("buffer", "")
    x = jax.random.normal(jax.random.key(1), (E, ROWS, IN))
    slot = jnp.array([SLOT, SLOT[::-1], (2, 0, 0, 1)])
    out = buffer_product(x, w, slot=slot)
    for e in range(E):
        for row in range(ROWS):
            expected = matrix(w, int(slot[e, row]))[e] @ np.asarray(x[e, row])
            np.testing.assert_allclose(out[e, row], expected, rtol=1e-5, atol=1e-5)
