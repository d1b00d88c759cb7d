from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymesh.runtimes.errors import InvalidInput, LoadFailed
from raymesh.runtimes.frameworks.base import TensorSpec
from raymesh.runtimes.frameworks.inputs import (
    NUMPY_DTYPES,
    check_input,
    check_inputs,
    decode_strings,
    encode_strings,
    oip_datatype,
)

ROW = TensorSpec("input-0", "FP32", (-1, 3))


def test_the_right_array_passes_untouched() -> None:
    array = np.zeros((2, 3), np.float32)
    assert check_input(ROW, {"any name": array}) is array


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64, np.uint8, np.bool_])
def test_numbers_are_cast_to_the_declared_type(dtype: Any) -> None:
    assert check_input(ROW, {"x": np.ones((1, 3), dtype)}).dtype == np.float32
    assert check_input(ROW, {"x": np.ones((1, 3), dtype)}, cast=False).dtype == dtype


def test_too_large_for_fp32_becomes_infinite() -> None:
    assert np.isinf(check_input(ROW, {"x": np.full((1, 3), 1e300)})).all()


@pytest.mark.parametrize(
    ("datatype", "array"),
    [
        ("FP32", np.array([[b"a", b"b", b"c"]], dtype=object)),
        ("INT64", np.ones((1, 3), np.float32)),  # 0.5 must not become 0
        ("UINT8", np.ones((1, 3), np.int64)),
        ("BOOL", np.ones((1, 3), np.int64)),
        ("BYTES", np.ones((1, 3), np.float32)),
        ("FP32", np.ones((1, 3), np.complex64)),
    ],
)
def test_other_kinds_are_refused(datatype: str, array: Any) -> None:
    with pytest.raises(InvalidInput, match="input 'x'"):
        check_input(TensorSpec("n", datatype, (-1, 3)), {"x": array})


@pytest.mark.parametrize("shape", [(3,), (1, 2), (1, 4), (1, 1, 3), ()])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match=r"input 'x': expected FP32 \[-1,3\]"):
        check_input(ROW, {"x": np.zeros(shape, np.float32)})


def test_several_inputs_go_by_name() -> None:
    specs = (TensorSpec("a", "FP32", (-1,)), TensorSpec("b", "INT64", (-1,)))
    a, b = np.zeros(1, np.float32), np.ones(1, np.int32)
    first, second = check_inputs(specs, {"b": b, "a": a})
    assert first is a and second.dtype == np.int64
    for wrong in ({}, {"a": a}, {"a": a, "c": b}, {"a": a, "b": b, "c": b}):
        with pytest.raises(InvalidInput, match="takes the inputs 'a', 'b'"):
            check_inputs(specs, wrong)


def test_datatypes_round_trip() -> None:
    for name, dtype in NUMPY_DTYPES.items():
        assert oip_datatype(dtype) == name
    assert oip_datatype(np.dtype("<U5")) == "BYTES"
    assert oip_datatype(np.dtype(">f4")) == "FP32"
    with pytest.raises(LoadFailed):
        oip_datatype(np.dtype("datetime64[s]"))


@given(st.lists(st.text(), max_size=5))
def test_strings_round_trip(texts: list[str]) -> None:
    array = np.empty(len(texts), dtype=object)
    array[:] = texts
    encoded = encode_strings(array)
    assert all(isinstance(item, bytes) for item in encoded)
    assert decode_strings(encoded).tolist() == texts


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(InvalidInput):
        decode_strings(np.array([b"\xff"], dtype=object))
