"""OIP tensors between their wire forms and numpy.

Rule of the file: bytes in, arrays out (and back), every lie about shape or size refused before anything is allocated.
Data types and layouts: Open Inference Protocol v2 and the binary tensor data extension (little endian, row major, no
padding; BYTES elements are ``<u32 length><bytes>``). BF16, which numpy lacks, is widened to float32.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from itertools import chain
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
_BOOL = DTYPES["BOOL"]
KNOWN = "BOOL, UINT8-64, INT8-64, FP16, BF16, FP32, FP64, BYTES"

_NONE = type(None)
#: For data in JSON: the type in `struct`'s language, what its elements may be in Python, and in English. (In Python a
#: bool is an integer; in JSON it is not.)
_BOOLS: tuple[set[type], str] = ({bool}, "true or false")
_INTEGERS: tuple[set[type], str] = ({int}, "integers")
_FLOATS: tuple[set[type], str] = ({float, int, _NONE}, "numbers (or null for NaN)")
_JSON_TYPES: dict[str, tuple[str, set[type], str]] = {
    "BOOL": ("?", *_BOOLS),
    "UINT8": ("B", *_INTEGERS),
    "UINT16": ("H", *_INTEGERS),
    "UINT32": ("I", *_INTEGERS),
    "UINT64": ("Q", *_INTEGERS),
    "INT8": ("b", *_INTEGERS),
    "INT16": ("h", *_INTEGERS),
    "INT32": ("i", *_INTEGERS),
    "INT64": ("q", *_INTEGERS),
    "FP16": ("e", *_FLOATS),
    "BF16": ("f", *_FLOATS),
    "FP32": ("f", *_FLOATS),
    "FP64": ("d", *_FLOATS),
}

#: No tensor may claim more elements than this, nor any of its dimensions, be it beside a 0.
ELEMENTS_MAX = 2**31
#: Fewer than numpy's own 64, and few enough that their product cannot take long.
DIMS_MAX = 32


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
    """`shape` as a tuple, when it is one of non-negative integers with a sane product. Raises `InvalidInput`."""
    if len(shape) > DIMS_MAX:
        raise InvalidInput(f"input '{name}': shape has {len(shape)} dimensions, at most {DIMS_MAX} are possible")
    dims = tuple(shape)
    for dim in dims:
        if type(dim) is not int or not 0 <= dim <= ELEMENTS_MAX:
            raise InvalidInput(
                f"input '{name}': shape {list(dims)!r} must hold non-negative integers only, up to {ELEMENTS_MAX}"
            )
    # Overflow cannot happen in Python; a bound still must, before numpy allocates. A dimension of 0 hides the others
    # from the product, but not from numpy, which multiplies those too.
    if (math.prod(dims) or math.prod(dim or 1 for dim in dims)) > ELEMENTS_MAX:
        raise InvalidInput(f"input '{name}': shape {list(dims)} has more than {ELEMENTS_MAX} elements")
    return dims


def from_raw(name: str, datatype: str, shape: Sequence[int], raw: bytes) -> Array:
    """The tensor in its binary form. The result may be read-only and share `raw`'s memory.

    Raises `InvalidInput` naming the input.
    """
    dims = check_shape(name, shape)
    count = math.prod(dims)
    dtype = DTYPES.get(datatype)
    if dtype is not None:
        if len(raw) != count * dtype.itemsize:
            raise InvalidInput(
                f"input '{name}': shape {list(dims)} of {datatype} needs {count * dtype.itemsize} bytes, got {len(raw)}"
            )
        if dtype is _BOOL and count and max(raw) > 1:
            raise InvalidInput(f"input '{name}': a BOOL is a byte 0 or 1, got {max(raw)}")
        return np.frombuffer(raw, dtype).reshape(dims)
    if datatype == "BF16":
        if len(raw) != 2 * count:
            raise InvalidInput(f"input '{name}': shape {list(dims)} of BF16 needs {2 * count} bytes, got {len(raw)}")
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").reshape(dims)
    if datatype == "BYTES":
        return _split_bytes(name, count, raw).reshape(dims)
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
    """An array in its binary form. Raises `TypeError` for objects that are neither text nor bytes."""
    if array.dtype.kind in "OSU":
        parts: list[bytes] = []
        for element in array.ravel():
            data = _as_bytes(element)
            parts += (struct.pack("<I", len(data)), data)
        return b"".join(parts)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("<"))
    return array.tobytes()


def _as_bytes(element: Any) -> bytes:
    if isinstance(element, bytes):
        return element
    if isinstance(element, str):
        return element.encode()
    # Not `bytes(element)`: of a number that is as many zeros.
    raise TypeError(f"no OIP datatype for an array with elements of type {type(element).__name__}")


def from_json(name: str, datatype: str, shape: Sequence[Any], data: Any) -> Array:
    """The tensor in its JSON form: `data` nested or flat, row major. In floating point types null is NaN.

    Raises `InvalidInput` naming the input.
    """
    dims = check_shape(name, shape)
    if not isinstance(data, list):
        if dims or isinstance(data, dict):
            raise InvalidInput(f"input '{name}': data must be a JSON array")
        data = [data]  # a scalar may be given as one
    flat = _flatten(name, data)
    count = math.prod(dims)
    if len(flat) != count:
        raise InvalidInput(f"input '{name}': shape {list(dims)} needs {count} elements, data has {len(flat)}")
    kinds = set(map(type, flat))
    if datatype == "BYTES":
        if not kinds <= {str}:
            raise InvalidInput(f"input '{name}': BYTES data must be JSON strings")
        array: Array = np.empty(count, dtype=object)
        array[:] = [item.encode() for item in flat]
    else:
        array = _numbers(name, datatype, flat, kinds)
    return array.reshape(dims)


def _flatten(name: str, data: list[Any]) -> list[Any]:
    """`data` without its nesting, which must be that of a tensor."""
    for _ in range(DIMS_MAX):
        if not data or type(data[0]) is not list:
            return data
        if set(map(type, data)) != {list} or len(set(map(len, data))) != 1:
            raise InvalidInput(f"input '{name}': data is ragged: rows differ in length or depth")
        data = list(chain.from_iterable(data))
    raise InvalidInput(f"input '{name}': data is nested more than {DIMS_MAX} deep")


def _numbers(name: str, datatype: str, flat: list[Any], kinds: set[type]) -> Array:
    # Numpy left to itself reads texts as numbers and pads them to the longest, makes floats of large integers and
    # infinities of large floats; `struct` is strict about all of that, and several times as fast.
    if datatype not in _JSON_TYPES:
        raise InvalidInput(f"input '{name}': unknown datatype {datatype!r}; use one of {KNOWN}")
    code, accepted, what = _JSON_TYPES[datatype]
    if not kinds <= accepted:
        raise InvalidInput(f"input '{name}': {datatype} data must be {what}")
    if _NONE in kinds:
        flat = [math.nan if item is None else item for item in flat]
    try:
        raw = struct.pack(f"<{len(flat)}{code}", *flat)
    except (struct.error, OverflowError):
        raise InvalidInput(f"input '{name}': data does not fit {datatype}") from None
    return np.frombuffer(raw, "<f4" if datatype == "BF16" else DTYPES[datatype])


def to_json(name: str, array: Array) -> list[Any] | Array:
    """An array as flat data that orjson can write with ``OPT_SERIALIZE_NUMPY``.

    It writes NaN as null, and infinities too: see `check_json`. Raises `InvalidInput` for bytes that are not UTF-8,
    `TypeError` for dtypes OIP has no word for.
    """
    if array.dtype.kind in "OSU":
        try:
            return [_as_bytes(e).decode() for e in array.ravel()]
        except UnicodeDecodeError:
            raise _needs_binary(name, "not UTF-8 text") from None
    flat = array.ravel()
    # orjson writes the shortest digits of a float32, a list would hold those of the float64; float16 it may not know.
    return flat if flat.dtype.isnative and flat.dtype.itemsize != 2 else flat.tolist()


def check_json(name: str, array: Array) -> None:
    """Raises `InvalidInput` when JSON cannot carry the array faithfully: null stands for NaN, nothing for infinity."""
    if array.dtype.kind == "f" and np.isinf(array).any():
        raise _needs_binary(name, "infinite in places, which JSON cannot say")


def _needs_binary(name: str, why: str) -> InvalidInput:
    return InvalidInput(f"output '{name}' is {why}; ask for it as binary (parameters.binary_data true)")
