"""Whether the tensors of a weight are what its configuration says of them."""

from __future__ import annotations

from stepjax.errors import CheckpointError
from stepjax.packings.compressed import PackedFp4, PackQuantized
from stepjax.packings.eight_bits import EightBits
from stepjax.packings.packing import PackedWeight, Packing
from stepjax.packings.rules import Said
from stepjax.packings.transposed import Transposed


def check_agreement(weight: PackedWeight, packing: Packing, said: Said) -> None:
    """Refuse what would be read as other numbers by the tensors alone, and the configuration of another model.

    Raises:
      CheckpointError: bits, kind or groups differ, or zero points or an order of columns that are said are not there.
    """
    where, columns = weight.tensor(weight.values).where, weight.shape[-1]
    facts = _facts(packing)
    for name, (found, expected) in {
        "values of {} bits": (facts.bits, said.bits),
        "values of the type {}": (facts.kind, said.kind),
        "groups of {} columns": (facts.columns, min(said.columns, columns) if said.columns else None),
    }.items():
        if found is not None and expected is not None and found != expected:
            raise CheckpointError(
                f"{where} has {name.format(found)}, but the configuration says {expected}; take both from one model"
            )
    if said.zeros and facts.zeros is False:
        raise CheckpointError(f"{where} has no zero points beside it, but the configuration says symmetric: false")
    role = "g_idx" if isinstance(packing, Transposed) else "weight_g_idx"
    if said.ordered and facts.ordered is not None and role not in weight.tensors and facts.columns != columns:
        stem = weight.tensor(weight.values).name.rpartition(".")[0]
        raise CheckpointError(
            f"{where} has no {stem}.{role} beside it, but the configuration says that its columns are in another order"
        )


def _facts(packing: Packing) -> Said:
    """What the tensors show."""
    match packing:
        case PackQuantized():
            return Said(packing.bits, packing.columns, "int", packing.zeros, packing.ordered)
        case Transposed():
            return Said(packing.bits, packing.columns, None, True, packing.ordered)
        case PackedFp4():
            return Said(4, packing.columns, "float")
        case EightBits():
            return Said(8, None, "int" if packing.integers else "float")
        case _:
            return Said()
