"""Tensors: what goes out comes back, and every lie is an `InvalidInput` that names the input."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from raymesh.runtimes import tensors
from raymesh.runtimes.errors import InvalidInput
from raymesh.runtimes.tensors import DTYPES, Array

_SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
NUMERIC = sorted(DTYPES)
_DATATYPES = st.sampled_from([*NUMERIC, "BF16", "BYTES"])


def _bytes_array(shape: tuple[int, ...], texts: list[bytes]) -> Array:
    array = np.empty(int(np.prod(shape)), dtype=object)
    array[:] = [texts[i % len(texts)] for i in range(array.size)]
    return array.reshape(shape)


@st.composite
def numeric_arrays(draw: st.DrawFn) -> tuple[str, Array]:
    datatype = draw(st.sampled_from(NUMERIC))
    return datatype, draw(hnp.arrays(DTYPES[datatype], draw(_SHAPES)))


@given(numeric_arrays())
def test_numbers_survive_their_binary_form(given_array: tuple[str, Array]) -> None:
    datatype, array = given_array
    back = tensors.from_raw("x", datatype, array.shape, tensors.to_raw(array))
    assert tensors.datatype_of(array) == datatype
    assert back.dtype == array.dtype and back.shape == array.shape
    assert back.tobytes() == array.tobytes()


@given(_SHAPES, st.lists(st.binary(max_size=9), min_size=1, max_size=5))
def test_bytes_survive_their_binary_form(shape: tuple[int, ...], texts: list[bytes]) -> None:
    array = _bytes_array(shape, texts)
    back = tensors.from_raw("x", "BYTES", shape, tensors.to_raw(array))
    assert back.shape == shape and back.tolist() == array.tolist()


@given(numeric_arrays(), st.booleans())
def test_numbers_survive_json_flat_and_nested(given_array: tuple[str, Array], is_flat: bool) -> None:
    datatype, array = given_array
    if array.dtype.kind == "f":
        array = np.where(np.isinf(array), 0, array).astype(array.dtype)
    data = orjson.dumps(
        tensors.to_json("x", array) if is_flat or array.ndim == 0 else array.tolist(),
        option=orjson.OPT_SERIALIZE_NUMPY,
    )
    back = tensors.from_json("x", datatype, list(array.shape), orjson.loads(data))
    assert back.dtype == array.dtype and back.shape == array.shape
    np.testing.assert_array_equal(back, array)


@given(_SHAPES, st.lists(st.text(max_size=5), min_size=1, max_size=4))
def test_texts_survive_json(shape: tuple[int, ...], texts: list[str]) -> None:
    array = _bytes_array(shape, [t.encode() for t in texts])
    data = orjson.loads(orjson.dumps(tensors.to_json("x", array)))
    assert tensors.from_json("x", "BYTES", list(shape), data).tolist() == array.tolist()


@given(
    st.one_of(_DATATYPES, st.text(max_size=5)),
    st.lists(st.integers(-2, 6) | st.sampled_from([2**31, 2**40, 2**62, 2**63 - 1]), max_size=5),
    st.binary(max_size=64),
)
@example("FP16", [0, 2**31, 2**31], b"")
def test_any_claim_about_bytes_is_a_tensor_or_invalid(datatype: str, shape: list[int], raw: bytes) -> None:
    try:
        array = tensors.from_raw("the input", datatype, shape, raw)
    except InvalidInput as error:
        assert "'the input'" in error.message
        return
    assert array.shape == tuple(shape)
    assert array.flags.c_contiguous and array.flags.aligned


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=12,
)


@given(_DATATYPES, st.lists(_JSON, max_size=3), _JSON)
def test_any_json_is_a_tensor_or_invalid(datatype: str, shape: list[Any], data: Any) -> None:
    data = orjson.loads(orjson.dumps(data)) if not _has_huge(data) else data
    try:
        array = tensors.from_json("the input", datatype, shape, data)
    except InvalidInput as error:
        assert "'the input'" in error.message
        return
    assert array.shape == tuple(shape)


def _has_huge(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_has_huge, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and not -(2**63) <= value < 2**64


@pytest.mark.parametrize(
    "shape",
    [
        [True],
        [1.0],
        ["1"],
        [None],
        [[1]],
        [-1],
        [2**31 + 1],
        [2**20, 2**20],
        [2**62, 2**62],
        [0, 2**70],
        [0, 2**31 + 1],
        [1] * 33,
        [2**62] * 100_000,
    ],
)
def test_shapes_that_are_none(shape: list[Any]) -> None:
    for read in (
        lambda: tensors.from_json("a", "FP32", shape, [1.0]),
        lambda: tensors.from_json("a", "BYTES", shape, ["x"]),
    ):
        with pytest.raises(InvalidInput, match="input 'a': shape"):
            read()


@pytest.mark.parametrize("datatype", ["FP32", "BOOL", "BF16", "BYTES"])
@pytest.mark.parametrize(
    "shape", [[-1], [-1, -4], [2**62, 4], [2**62, 2**62], [0, 2**62], [1] * 65, [1] * 33, [2**62] * 100_000]
)
def test_shapes_that_are_none_of_binary_data(datatype: str, shape: list[int]) -> None:
    for raw in (b"", b"\0" * 4):
        if datatype == "BYTES" and len(shape) == 65:
            continue
        with pytest.raises(InvalidInput, match="input 'a': shape"):
            tensors.from_raw("a", datatype, shape, raw)


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "says"),
    [
        ("FP32", [2], b"\0" * 7, "needs 8 bytes, got 7"),
        ("FP32", [], b"", "needs 4 bytes, got 0"),
        ("FP32", [3], b"\0" * 8, "needs 12 bytes, got 8"),
        ("BF16", [2], b"\0" * 3, "needs 4 bytes, got 3"),
        ("BOOL", [3], b"\0\1\2", "byte 0 or 1, got 2"),
        ("BYTES", [1], b"", "need at least 4 bytes"),
        ("BYTES", [2**30], b"\0" * 100, "need at least"),
        ("BYTES", [1], b"\5\0\0\0abc", "element 0 claims 5 bytes, 3 are left"),
        ("BYTES", [2], b"\4\0\0\0abcd\0\0", "ends in the middle of element 1"),
        ("BYTES", [1], b"\1\0\0\0ab", "1 bytes left over"),
        ("FP8", [1], b"\0", "unknown datatype 'FP8'"),
        ("", [1], b"\0", "unknown datatype ''"),
    ],
)
def test_lies_about_binary_data(datatype: str, shape: list[int], raw: bytes, says: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        tensors.from_raw("a", datatype, shape, raw)
    assert says in caught.value.message and "'a'" in caught.value.message


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "says"),
    [
        ("FP32", [2], [1.0], "needs 2 elements, data has 1"),
        ("FP32", [1], 1.0, "must be a JSON array"),
        ("FP32", [1], {"a": 1}, "must be a JSON array"),
        ("FP32", [1], ["1"], "must be numbers"),
        ("FP32", [1], [True], "must be numbers"),
        ("FP32", [2], [1, True], "must be numbers"),
        ("FP32", [1], [{}], "must be numbers"),
        ("FP32", [1], [1e39], "does not fit FP32"),
        ("FP16", [1], [70000], "does not fit FP16"),
        ("FP32", [1], [10**400], "does not fit FP32"),
        ("INT32", [1], [1.0], "must be integers"),
        ("INT32", [1], [None], "must be integers"),
        ("INT32", [2], [1, True], "must be integers"),
        ("INT8", [1], [128], "does not fit INT8"),
        ("UINT8", [1], [-1], "does not fit UINT8"),
        ("UINT64", [1], [2**64], "does not fit UINT64"),
        ("INT64", [1], [2**63], "does not fit INT64"),
        ("BOOL", [1], [1], "must be true or false"),
        ("BYTES", [1], [1], "must be JSON strings"),
        ("FP32", [3], [[1, 2], [3]], "ragged"),
        ("FP32", [3], [[1, 2], 3], "ragged"),
        ("FP32", [3], [1, [2, 3]], "must be numbers"),
        ("FP99", [1], [1], "unknown datatype 'FP99'"),
    ],
)
def test_lies_in_json(datatype: str, shape: list[Any], data: Any, says: str) -> None:
    if data == [1, [2, 3]]:
        says = "needs 3 elements"
    with pytest.raises(InvalidInput) as caught:
        tensors.from_json("a", datatype, shape, data)
    assert says in caught.value.message and "'a'" in caught.value.message


def test_deep_nesting_is_bounded() -> None:
    data: Any = [1.0]
    for _ in range(31):
        data = [data]
    assert tensors.from_json("a", "FP32", [1], data).tolist() == [1.0]
    for _ in range(900):
        data = [data]
    with pytest.raises(InvalidInput, match="nested more than"):
        tensors.from_json("a", "FP32", [1], data)


def test_one_long_text_among_numbers_takes_no_memory() -> None:
    """Numpy on its own would make every element as wide as the longest text: here 4 TB."""
    with pytest.raises(InvalidInput, match="must be numbers"):
        tensors.from_json("a", "FP32", [100_001], ["x" * 10_000_000, *[1] * 100_000])


def test_large_integers_keep_their_value() -> None:
    data = [1, 2**63, 2**64 - 1]
    assert tensors.from_json("a", "UINT64", [3], data).tolist() == data
    data = [-(2**63), 2**63 - 1, 2**53 + 1]
    assert tensors.from_json("a", "INT64", [3], data).tolist() == data


def test_null_is_nan_both_ways_and_infinity_has_no_word() -> None:
    array = tensors.from_json("a", "FP32", [2], [None, 1.5])
    assert np.isnan(array[0]) and array[1] == 1.5
    tensors.check_json("a", array)
    for value in (np.inf, -np.inf):
        with pytest.raises(InvalidInput, match="output 'a' is infinite"):
            tensors.check_json("a", np.array([1.0, value], dtype=np.float16))


def test_other_byte_orders_and_layouts_go_out_right() -> None:
    array = np.arange(6, dtype=">i4").reshape(2, 3)
    assert tensors.datatype_of(array) == "INT32"
    assert tensors.from_raw("a", "INT32", [2, 3], tensors.to_raw(array)).tolist() == array.tolist()
    assert tensors.from_raw("a", "INT32", [3, 2], tensors.to_raw(array.T)).tolist() == array.T.tolist()
    for view in (array, array.T, np.asfortranarray(array), array[:, ::2], array.astype(np.float16)):
        data = orjson.dumps(tensors.to_json("a", view), option=orjson.OPT_SERIALIZE_NUMPY)
        assert orjson.loads(data) == view.ravel().tolist()


def test_datatypes_of_arrays() -> None:
    assert tensors.datatype_of(np.array(["a"])) == tensors.datatype_of(np.array([b"a"])) == "BYTES"
    assert tensors.datatype_of(np.zeros(1, dtype=np.longlong)) == "INT64"
    for dtype in ("M8[s]", "c8", "m8[s]", [("a", "i4")]):
        with pytest.raises(TypeError):
            tensors.datatype_of(np.zeros(1, dtype=dtype))  # type: ignore[call-overload]


def test_text_arrays_go_out_and_objects_that_are_no_text_do_not() -> None:
    for array in (np.array(["ü", "b"]), np.array(["ü".encode(), b"b"]), np.array(["ü", b"b"], dtype=object)):
        raw = tensors.to_raw(array)
        assert tensors.from_raw("a", "BYTES", [2], raw).tolist() == ["ü".encode(), b"b"]
        assert tensors.to_json("a", array) == ["ü", "b"]
    for element in (5, None, 1.5, ["a"]):
        array = np.empty(1, dtype=object)
        array[0] = element
        with pytest.raises(TypeError):
            tensors.to_raw(array)
        with pytest.raises(TypeError):
            tensors.to_json("a", array)


def test_bytes_that_are_no_text_must_be_asked_for_as_binary() -> None:
    array = _bytes_array((1,), [b"\xff"])
    with pytest.raises(InvalidInput, match="output 'a' is not UTF-8 text; ask for it as binary"):
        tensors.to_json("a", array)


def test_bf16_is_widened_exactly() -> None:
    raw = np.array([1.0, -2.5, np.inf], dtype="<f4").view("<u2")[1::2].tobytes()
    assert tensors.from_raw("a", "BF16", [3], raw).tolist() == [1.0, -2.5, np.inf]
    assert tensors.from_json("a", "BF16", [1], [1.5]).dtype == np.float32
