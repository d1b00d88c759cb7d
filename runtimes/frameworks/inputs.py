"""Checking what clients send against what a model declares, and the mapping between OIP datatypes and numpy.

Rule of the file: these checks run on every request, so the common case (one input, already of the right dtype) costs
about a microsecond; everything slow is on the way to an error.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from raymesh.runtimes.errors import InvalidInput, LoadFailed
from raymesh.runtimes.frameworks.base import Array, Tensors, TensorSpec

#: OIP datatype → numpy dtype. BYTES tensors are object arrays of ``bytes``.
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(object),
}
_OIP_DATATYPES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


def oip_datatype(dtype: np.dtype[Any]) -> str:
    """The OIP datatype of a numpy dtype; any string or object dtype is ``BYTES``.

    Raises `LoadFailed` for dtypes the protocol cannot carry (complex, datetime …).
    """
    if dtype.kind in "OSU":
        return "BYTES"
    try:
        return _OIP_DATATYPES[dtype.newbyteorder("=")]
    except KeyError:
        raise LoadFailed(
            f"the model gives values of type '{dtype}', which the inference protocol cannot carry"
        ) from None


def check_input(spec: TensorSpec, inputs: Tensors, *, cast: bool = True) -> Array:
    """The tensor for a model with the single input `spec`, whatever name the client gave it.

    With `cast` the result has exactly the spec's dtype; without it any dtype of the same kind (number or BYTES) is
    passed through. Raises `InvalidInput` naming the input, what is expected and what arrived.
    """
    if len(inputs) != 1:
        names = ", ".join(f"'{name}'" for name in inputs) or "none"
        raise InvalidInput(f"the model takes one input, '{spec.name}'; the request has {names}")
    ((name, array),) = inputs.items()
    return _fit(spec, name, array, cast=cast)


def check_inputs(specs: tuple[TensorSpec, ...], inputs: Tensors) -> list[Array]:
    """The tensors for `specs`, in that order, each cast to its spec's dtype.

    A single input may arrive under any name; several must be named as declared. Raises `InvalidInput` naming the input.
    """
    if len(specs) == 1:
        return [check_input(specs[0], inputs)]
    if len(inputs) != len(specs) or any(spec.name not in inputs for spec in specs):
        expected = ", ".join(f"'{spec.name}'" for spec in specs)
        given = ", ".join(f"'{name}'" for name in inputs) or "none"
        raise InvalidInput(f"the model takes the inputs {expected}; the request has {given}")
    return [_fit(spec, spec.name, inputs[spec.name], cast=True) for spec in specs]


def decode_strings(array: Array) -> Array:
    """`array` of ``bytes`` (or ``str``) as an object array of ``str``, the form the Python libraries expect.

    Raises `InvalidInput` when an element is not UTF-8 text.
    """
    try:
        flat = [item.decode() if isinstance(item, bytes) else str(item) for item in array.ravel().tolist()]
    except UnicodeDecodeError:
        raise InvalidInput("an element of a BYTES input is not UTF-8 text") from None
    out = np.empty(len(flat), dtype=object)
    out[:] = flat
    return out.reshape(array.shape)


def encode_strings(array: Array) -> Array:
    """`array` of ``str`` (any string dtype, or objects) as the object array of ``bytes`` a BYTES tensor is."""
    flat = [item if isinstance(item, bytes) else str(item).encode() for item in array.ravel().tolist()]
    out = np.empty(len(flat), dtype=object)
    out[:] = flat
    return out.reshape(array.shape)


def _fit(spec: TensorSpec, name: str, array: Array, *, cast: bool) -> Array:
    shape = array.shape
    if len(shape) != len(spec.shape):
        raise InvalidInput(_mismatch(spec, name, array))
    for have, want in zip(shape, spec.shape, strict=True):
        if have != want and want >= 0:
            raise InvalidInput(_mismatch(spec, name, array))
    want_dtype = NUMPY_DTYPES[spec.datatype]
    if array.dtype == want_dtype:
        return array
    if not _is_compatible(array.dtype, want_dtype):
        raise InvalidInput(_mismatch(spec, name, array))
    if not cast:
        return array
    # A FP64 value beyond FP32 becomes an infinity, as it does in the libraries themselves.
    with np.errstate(over="ignore"):
        return array.astype(want_dtype)


def _is_compatible(have: np.dtype[Any], want: np.dtype[Any]) -> bool:
    """Whether values may be cast: numbers never change kind downwards (a fraction is never cut to an integer)."""
    if want.kind == "O":
        return have.kind in "OSU"
    if want.kind == "f":
        return have.kind in "biuf"
    return have.kind in "biuf" and np.can_cast(have, want, casting="same_kind")


def _mismatch(spec: TensorSpec, name: str, array: Array) -> str:
    try:
        arrived = oip_datatype(array.dtype)
    except LoadFailed:
        arrived = str(array.dtype)
    return (
        f"input '{name}': expected {spec.datatype} {_shape(spec.shape)}, "
        f"got {arrived} {_shape(array.shape)} (-1 stands for any number)"
    )


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ",".join(str(dim) for dim in shape) + "]"
