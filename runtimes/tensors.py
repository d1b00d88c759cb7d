"""OIP tensors between their wire forms and numpy.

Rule of the file: bytes in, arrays out (and back), every lie about shape or size refused before anything is allocated.
Data types and layouts: Open Inference Protocol v2 and the binary tensor data extension (little endian, row major, no
padding; BYTES elements are ``<u32 length><bytes>``). BF16, which numpy lacks, is widened to float32.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from raymesh.runtimes.errors import InvalidInput

Array = npt.NDArray[Any]

#: OIP datatype → numpy dtype, for the types numpy has.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
KNOWN = "BOOL, UINT8-64, INT8-64, FP16, BF16, FP32, FP64, BYTES"

#: No tensor may claim more elements than this, whatever its dimensions multiply to.
ELEMENTS_MAX = 2**31


def datatype_of(array: Array) -> str:
    """The OIP datatype of an array. Raises `TypeError` for dtypes OIP has no word for."""
    name = _NAMES.get(array.dtype)
    if name is not None:
        return name
    if array.dtype.kind in "OSU":
        return "BYTES"
    try:
        return _NAMES[array.dtype.newbyteorder("<")]
    except KeyError:
        raise TypeError(f"no OIP datatype for dtype {array.dtype}") from None


def check_shape(name: str, shape: Sequence[Any]) -> tuple[int, ...]:
    """`shape` as a tuple, when it is one of non-negative integers with a sane product."""
    for dim in shape:
        if type(dim) is not int or dim < 0:
            raise InvalidInput(f"input '{name}': shape {list(shape)!r} must hold non-negative integers only")
    # Overflow cannot happen in Python; a bound still must, before numpy allocates.
    if math.prod(shape) > ELEMENTS_MAX:
        raise InvalidInput(f"input '{name}': shape {list(shape)} has more than {ELEMENTS_MAX} elements")
    return tuple(shape)


def from_raw(name: str, datatype: str, shape: Sequence[int], raw: bytes | memoryview) -> Array:
    """The tensor in its binary form. The result may be read-only and share `raw`'s memory."""
    dtype = DTYPES.get(datatype)
    if dtype is not None:
        dims = tuple(shape)
        try:
            array = np.frombuffer(raw, dtype)
            if len(dims) == 1 and dims[0] == array.size:
                return array
            if min(dims, default=0) >= 0:
                return array.reshape(dims)
        except ValueError:
            pass
        dims = check_shape(name, list(dims))
        raise InvalidInput(
            f"input '{name}': shape {list(dims)} of {datatype} needs {math.prod(dims) * dtype.itemsize} bytes,"
            f" got {len(raw)}"
        )
    dims = check_shape(name, shape)
    count = math.prod(dims)
    if datatype == "BF16":
        if len(raw) != 2 * count:
            raise InvalidInput(f"input '{name}': shape {list(dims)} of BF16 needs {2 * count} bytes, got {len(raw)}")
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").reshape(dims)
    if datatype == "BYTES":
        return _split_bytes(name, count, bytes(raw)).reshape(dims)
    raise InvalidInput(f"input '{name}': unknown datatype {datatype!r}; use one of {KNOWN}")


def _split_bytes(name: str, count: int, raw: bytes) -> Array:
    # Each element takes at least its 4-byte length: a lying count is refused before the array is made.
    if 4 * count > len(raw):
        raise InvalidInput(f"input '{name}': {count} BYTES elements need at least {4 * count} bytes, got {len(raw)}")
    array = np.empty(count, dtype=object)
    at = 0
    for index in range(count):
        if at + 4 > len(raw):
            raise InvalidInput(f"input '{name}': BYTES data ends in the middle of element {index}")
        (size,) = struct.unpack_from("<I", raw, at)
        at += 4
        if at + size > len(raw):
            raise InvalidInput(f"input '{name}': BYTES element {index} claims {size} bytes, {len(raw) - at} are left")
        array[index] = raw[at : at + size]
        at += size
    if at != len(raw):
        raise InvalidInput(f"input '{name}': {len(raw) - at} bytes left over after {count} BYTES elements")
    return array


def to_raw(array: Array) -> bytes:
    """An array in its binary form."""
    if array.dtype.kind in "OSU":
        parts: list[bytes] = []
        for element in array.ravel():
            data = element.encode() if isinstance(element, str) else bytes(element)
            parts += (struct.pack("<I", len(data)), data)
        return b"".join(parts)
    return array.tobytes()


def from_json(name: str, datatype: str, shape: Sequence[Any], data: Any) -> Array:
    """The tensor in its JSON form: `data` nested or flat, row major."""
    dims = check_shape(name, shape)
    if not isinstance(data, list):
        raise InvalidInput(f"input '{name}': data must be a JSON array")
    count = math.prod(dims)
    if datatype == "BYTES":
        flat = _flatten(name, data)
        if not all(isinstance(item, str) for item in flat):
            raise InvalidInput(f"input '{name}': BYTES data must be JSON strings")
        array: Array = np.empty(len(flat), dtype=object)
        array[:] = [item.encode() for item in flat]
    else:
        array = _numbers(name, datatype, data)
    if array.size != count:
        raise InvalidInput(f"input '{name}': shape {list(dims)} needs {count} elements, data has {array.size}")
    return array.reshape(dims)


def _flatten(name: str, data: list[Any], depth: int = 0) -> list[Any]:
    if depth > 32:
        raise InvalidInput(f"input '{name}': data is nested more than 32 deep")
    flat: list[Any] = []
    for item in data:
        if isinstance(item, list):
            flat += _flatten(name, item, depth + 1)
        else:
            flat.append(item)
    return flat


def _numbers(name: str, datatype: str, data: list[Any]) -> Array:
    target = np.dtype("<f4") if datatype == "BF16" else DTYPES.get(datatype)
    if target is None:
        raise InvalidInput(f"input '{name}': unknown datatype {datatype!r}; use one of {KNOWN}")
    if not data:
        return np.empty(0, dtype=target)
    try:
        array = np.asarray(data)
    except (ValueError, OverflowError):
        raise InvalidInput(f"input '{name}': data is ragged: rows differ in length") from None
    kind = array.dtype.kind
    if array.size == 0:
        return np.empty(0, dtype=target)
    if target.kind == "b":
        if kind != "b":
            raise InvalidInput(f"input '{name}': BOOL data must be true or false")
        return array
    if target.kind == "f":
        if kind not in "iuf":
            raise InvalidInput(f"input '{name}': {datatype} data must be numbers")
        return array.astype(target)
    if kind not in "iu":
        # Large unsigned beside negative numbers, or a float: neither is this integer type.
        raise InvalidInput(f"input '{name}': {datatype} data must be integers")
    info = np.iinfo(target)
    if int(array.min()) < info.min or int(array.max()) > info.max:
        raise InvalidInput(f"input '{name}': data does not fit {datatype} ({info.min} to {info.max})")
    return array.astype(target)


def to_json(name: str, array: Array) -> list[Any]:
    """An array as flat JSON data. Raises `InvalidInput` for bytes that are not UTF-8."""
    if array.dtype.kind in "OSU":
        try:
            return [e if isinstance(e, str) else bytes(e).decode() for e in array.ravel()]
        except UnicodeDecodeError:
            raise InvalidInput(
                f"output '{name}' is not UTF-8 text; ask for it as binary (parameters.binary_data true)"
            ) from None
    flat: list[Any] = array.ravel().tolist()
    return flat
