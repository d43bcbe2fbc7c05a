"""The dtypes of safetensors files as numpy's. ml_dtypes has those that numpy lacks; jax needs it and brings it."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

DTYPES: Mapping[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}

# Bytes of an element, by the name in the file.
ITEM_BYTES: Mapping[str, int] = {name: dtype.itemsize for name, dtype in DTYPES.items()}
