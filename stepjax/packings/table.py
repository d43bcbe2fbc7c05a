"""The table of packings: which tensors belong to a weight by their names, and how they hold it."""

from __future__ import annotations

from collections.abc import Iterable

from stepjax.errors import CheckpointError
from stepjax.packings.compressed import pack_quantized, packed_fp4
from stepjax.packings.eight_bits import eight_bits
from stepjax.packings.packing import PackedWeight, Packing
from stepjax.packings.rules import QuantRules, Said
from stepjax.packings.transposed import awq, gptq

VALUES = ("weight_packed", "qweight")  # roles of values that do not bear the weight's own name
SMALL = (  # roles beside the values
    "weight_scale",
    "weight_scale_2",
    "weight_global_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "scales",
    "qzeros",
    "g_idx",
)
UNUSED = (
    "input_scale",
    "input_global_scale",
    "output_scale",
    "k_scale",
    "v_scale",
    "q_scale",
    "kv_scale",
)  # activations
REFUSED = ("pre_quant_scale", "weight_bitmask", "weight_compressed", "lora_a", "lora_b")


def is_packed(values: str, dtypes: dict[str, str]) -> bool:
    """Whether a weight is in one of these packings rather than in a form of the release's or of this package.

    Args:
      values: role of its values.
      dtypes: of its tensors, by role.
    """
    if values != "weight" or {"weight_scale_2", "weight_global_scale", "weight_zero_point"} & dtypes.keys():
        return True
    held, scale = dtypes["weight"], dtypes.get("weight_scale")
    if scale is None:
        return False
    return held == "F8_E4M3" or (held == "U8" and scale in ("U8", "F8_E4M3")) or (held == "I8" and scale != "F32")


def recognise(weight: PackedWeight, rules: QuantRules, said: Said) -> Packing:
    """How the tensors of a weight hold it.

    Args:
      said: what the rules say of its module.

    Raises:
      CheckpointError: no packing has such tensors, or one does not fit its shape; the message names the tensor.
    """
    roles: Iterable[str] = weight.tensors
    for role in REFUSED:
        if role in roles:
            raise CheckpointError(
                f"{weight.tensors[role].where} changes the arithmetic of its module, which is not supported; save the "
                "model without it"
            )
    names = weight.modules
    bits = said.bits
    if "qweight" in roles:
        stored = weight.tensor("qweight")
        columns = weight.shape[-1]
        by_shape = "awq" if stored.shape[-2:-1] == (columns,) else "gptq"
        if (rules.transposed or by_shape) == "awq":
            return awq(weight, bits)
        return gptq(weight, bits, v1=rules.v1)
    values = weight.tensor("weight_packed" if "weight_packed" in roles else "weight")
    if "weight_packed" in roles and values.dtype == "I32":
        return pack_quantized(weight, bits)
    if values.dtype == "U8":
        return packed_fp4(weight)
    if "weight_packed" not in roles and values.dtype in ("F8_E4M3", "I8"):
        return eight_bits(weight, rules.block(*names))
    expected = "I32 or U8" if "weight_packed" in roles else "F8_E4M3, I8 or U8"
    raise CheckpointError(f"{values.where} is {values.dtype}, expected {expected} beside its scales")
