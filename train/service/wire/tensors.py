"""Tensors of requests and results: dense or sparse (CSR), in JSON or in protocol buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepjax.infer.serve.errors import ApiError
from stepjax.train.service.wire.protobuf import damaged, fields, nested, number, numbers, packed, written

_DTYPES: dict[int, Any] = {1: np.float32, 2: np.int64, 3: np.int32, 4: np.uint16}  # 4: bfloat16, the upper half of one
_NAMES = {"float32": np.float32, "int64": np.int64}
FLOAT32, INT64 = 1, 2
MAX_CELLS = 2**26  # of one dense tensor: a sparse one of few bytes may ask for any number


@dataclass(frozen=True)
class NamedTensor:
    """A tensor, dense, with the places that a sparse one lists."""

    name: str
    value: np.ndarray  # float32 or int64, of its shape
    crow: np.ndarray | None = None  # of a sparse one: int64 [rows + 1]
    col: np.ndarray | None = None  # int64 [listed]


def bad(name: str, message: str) -> ApiError:
    """A tensor that is not valid."""
    return ApiError(f"{name}: {message}", code="invalid_value", param=name)


def tensor_from_protobuf(name: str, value: int | memoryview) -> NamedTensor:
    """A ``Tensor`` message."""
    dense, csr, kind, shape = b"", None, 0, []
    for index, part in fields(nested(value, name)):
        if index == 1:
            dense = bytes(nested(part, name))
        elif index == 2:
            csr = nested(part, name)
        elif index == 3:
            kind = number(part, f"{name}.dtype")
        elif index == 4:
            shape += numbers(part, f"{name}.shape")
    if kind not in _DTYPES:
        raise bad(name, f"dtype is {kind}, expected 1 (float32), 2 (int64), 3 (int32) or 4 (bfloat16)")
    if csr is None:
        data = _array(name, dense, kind)
        return dense_tensor(name, data, shape or [len(data)])
    parts = {1: b"", 2: b"", 3: b""}
    for index, part in fields(csr):
        if index in parts:
            parts[index] = bytes(nested(part, name))
    return sparse_tensor(
        name, _array(name, parts[1], kind), _array(name, parts[2], 2), _array(name, parts[3], 2), shape
    )


def tensor_from_json(name: str, value: Any) -> NamedTensor:
    """A tensor object: data, dtype, shape, sparse_crow_indices, sparse_col_indices."""
    if not isinstance(value, Mapping):
        raise bad(name, f"expected an object with data, dtype and shape, found {type(value).__name__}")
    unknown = {*value} - {"data", "dtype", "shape", "sparse_crow_indices", "sparse_col_indices"}
    if unknown:
        raise bad(name, f"has the unknown field {min(unknown)[:80]!a}")
    named = value.get("dtype")
    dtype = _NAMES.get(named) if isinstance(named, str) else None
    if dtype is None:
        raise bad(name, f"dtype is {str(value.get('dtype'))[:80]!a}, expected float32 or int64")
    data = _listed(name, value.get("data"), dtype)
    shape = value.get("shape")
    shape = [len(data)] if shape is None else _listed(f"{name}.shape", shape, np.int64).tolist()
    crow, col = value.get("sparse_crow_indices"), value.get("sparse_col_indices")
    if (crow is None) != (col is None):
        raise bad(name, "expected sparse_crow_indices and sparse_col_indices together")
    if crow is None:
        return dense_tensor(name, data, shape)
    return sparse_tensor(
        name, data, _listed(f"{name}.crow", crow, np.int64), _listed(f"{name}.col", col, np.int64), shape
    )


def dense_tensor(name: str, data: np.ndarray, shape: Sequence[int]) -> NamedTensor:
    """The data in its shape."""
    _check_shape(name, shape)
    if int(np.prod(shape, dtype=object)) != len(data):
        raise bad(name, f"has {len(data)} values, which is no tensor of shape {list(shape)[:8]}")
    return NamedTensor(name, data.reshape(shape))


def sparse_tensor(name: str, data: np.ndarray, crow: np.ndarray, col: np.ndarray, shape: Sequence[int]) -> NamedTensor:
    """The dense tensor of listed values; other cells are 0."""
    _check_shape(name, shape)
    if len(shape) != 2:
        raise bad(name, f"a sparse tensor has shape {list(shape)[:8]}, expected two axes")
    rows, columns = shape
    steps = np.diff(crow)
    if len(crow) != rows + 1 or crow[0] != 0 or crow[-1] != len(data) or (steps < 0).any():
        raise bad(name, f"its row pointers do not fit {rows} rows and {len(data)} values")
    if len(col) != len(data) or (len(col) and (col.min() < 0 or col.max() >= columns)):
        raise bad(name, f"its column indices do not fit {columns} columns and {len(data)} values")
    value = np.zeros((rows, columns), data.dtype)
    value[np.repeat(np.arange(rows), steps), col] = data
    return NamedTensor(name, value, crow, col)


def tensor_to_protobuf(tensor: NamedTensor) -> bytes:
    """The message of a tensor, in the layout in which it came."""
    kind = FLOAT32 if tensor.value.dtype == np.float32 else INT64
    shape = (4, packed(tensor.value.shape))
    if tensor.crow is None or tensor.col is None:
        return written((1, tensor.value.tobytes()), (3, kind), shape)
    csr = written((1, listed_values(tensor).tobytes()), (2, tensor.crow.tobytes()), (3, tensor.col.tobytes()))
    return written((2, csr), (3, kind), shape)


def tensor_to_json(tensor: NamedTensor) -> dict[str, Any]:
    """The object of a tensor, in the layout in which it came."""
    name = "float32" if tensor.value.dtype == np.float32 else "int64"
    out: dict[str, Any] = {"dtype": name, "shape": [*tensor.value.shape]}
    if tensor.crow is None or tensor.col is None:
        return {**out, "data": tensor.value.ravel().tolist()}
    places = {"sparse_crow_indices": tensor.crow.tolist(), "sparse_col_indices": tensor.col.tolist()}
    return {**out, "data": listed_values(tensor).tolist(), **places}


def listed_values(tensor: NamedTensor) -> np.ndarray:
    """The values at the places that a sparse tensor lists."""
    assert tensor.crow is not None
    assert tensor.col is not None
    return tensor.value[np.repeat(np.arange(len(tensor.value)), np.diff(tensor.crow)), tensor.col]


def _check_shape(name: str, shape: Sequence[int]) -> None:
    cells = int(np.prod(shape, dtype=object)) if len(shape) else 1
    if len(shape) > 8 or any(size < 0 for size in shape) or cells > MAX_CELLS:
        raise bad(name, f"has shape {list(shape)[:8]}, expected at most {MAX_CELLS} values")


def _array(name: str, data: bytes, kind: int) -> np.ndarray:
    dtype = np.dtype(_DTYPES[kind])
    if len(data) % dtype.itemsize:
        raise damaged(f"{name} has {len(data)} bytes, no multiple of {dtype.itemsize}")
    values = np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype)
    if kind == 4:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.int64) if kind == 3 else values


def _listed(name: str, value: Any, dtype: Any) -> np.ndarray:
    """Numbers of a JSON list."""
    if not isinstance(value, list):
        raise bad(name, f"expected a list of numbers, found {type(value).__name__}")
    whole = dtype is np.int64
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int if whole else int | float):
            # A client writes integers of a float tensor as integers, and some write ids as 3.0.
            if whole and isinstance(item, float) and item.is_integer():
                continue
            raise bad(name, f"holds {str(item)[:80]!a}, expected {'integers' if whole else 'numbers'}")
        if whole and not -(2**63) <= item < 2**63:
            raise bad(name, f"holds {str(item)[:40]}, expected 64-bit integers")
    try:
        return np.asarray(value, dtype)
    except OverflowError:
        raise bad(name, "holds a number that is too large") from None
