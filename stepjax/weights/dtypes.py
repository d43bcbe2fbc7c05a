"""The dtypes of safetensors files as numpy's.

jax has those that numpy lacks. It is imported when one of them is asked for, since it takes a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

# Bytes of an element, by the name in the file.
ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "U16": 2,
    "I16": 2,
    "U32": 4,
    "I32": 4,
    "U64": 8,
    "I64": 8,
    "F16": 2,
    "BF16": 2,
    "F32": 4,
    "F64": 8,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
_KINDS = {"U": "u", "I": "i", "F": "f"}  # in the file and in numpy
_OF_JAX = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


class _Dtypes(Mapping[str, np.dtype]):
    def __getitem__(self, name: str) -> np.dtype:
        if name in _OF_JAX:
            import jax.numpy as jnp

            return np.dtype(getattr(jnp, _OF_JAX[name]))
        size = ITEM_BYTES[name]
        return np.dtype(np.bool_) if name == "BOOL" else np.dtype(f"{_KINDS[name[0]]}{size}")

    def __iter__(self) -> Iterator[str]:
        return iter(ITEM_BYTES)

    def __len__(self) -> int:
        return len(ITEM_BYTES)

    def __contains__(self, name: object) -> bool:
        return name in ITEM_BYTES


DTYPES: Mapping[str, np.dtype] = _Dtypes()
