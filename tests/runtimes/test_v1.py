"""The V1 protocol and its CloudEvents, against the CloudEvents SDK that KServe's server and clients use."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import numpy as np
import orjson
import pytest
from cloudevents.conversion import to_binary, to_structured
from cloudevents.http import CloudEvent, from_http
from hypothesis import given
from hypothesis import strategies as st

from raymesh.runtimes import v1
from raymesh.runtimes.errors import InvalidInput
from raymesh.runtimes.frameworks.base import TensorSpec

ROWS = (TensorSpec("rows", "FP32", (-1, 2)),)
BOTH = (TensorSpec("age", "INT64", (-1,)), TensorSpec("name", "BYTES", (-1,)))
JSON = {b"content-type": b"application/json"}
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["age", "name", "data"]), inner),
    max_leaves=8,
)


def decode(value: Any, inputs: tuple[TensorSpec, ...] = ROWS, headers: dict[bytes, bytes] | None = None) -> Any:
    return v1.decode("m", inputs, orjson.dumps(value), headers or JSON)


def answered(answer: bytes) -> tuple[dict[str, str], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    assert status.startswith("HTTP/1.1 200")
    headers = dict(line.split(": ", 1) for line in lines)
    assert int(headers["content-length"]) == len(body)
    return headers, body


def predictions(outputs: dict[str, Any], **request: Any) -> Any:
    infer = decode({"instances": [[1, 2]]}, **request)
    headers, body = answered(infer.encode({name: np.asarray(array) for name, array in outputs.items()}))
    assert headers["content-type"] == "application/json"
    return orjson.loads(body)["predictions"]


@pytest.mark.parametrize("field", ["instances", "inputs"])
def test_rows_become_the_only_input(field):
    infer = decode({field: [[1, 2.5], [3, None]]})
    assert infer.inputs["rows"].dtype == np.float32
    np.testing.assert_array_equal(infer.inputs["rows"], np.array([[1, 2.5], [3, np.nan]], np.float32))
    assert (infer.rows, infer.outputs, infer.is_grpc) == (2, (), False)


def test_several_inputs_by_row_and_by_column():
    by_row = decode({"instances": [{"age": 1, "name": "a"}, {"age": 2, "name": "b"}]}, BOTH)
    by_column = decode({"inputs": {"age": [1, 2], "name": ["a", "b"]}}, BOTH)
    for infer in (by_row, by_column):
        assert infer.inputs["age"].tolist() == [1, 2]
        assert infer.inputs["name"].tolist() == [b"a", b"b"]


def test_no_rows_have_the_models_shape():
    assert decode({"instances": []}).inputs["rows"].shape == (0, 2)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ([], "JSON object"),
        ({}, "instances"),
        ({"instances": [], "inputs": []}, "either"),
        ({"instances": {}}, "list"),
        ({"instances": [[1, 2], [3]]}, "ragged"),
        ({"instances": [["a"]]}, "rows"),
        ({"instances": [{"rows": 1}, 2]}, "same names"),
        ({"instances": [{"cols": 1}]}, "no input 'cols'"),
        ({"inputs": {"rows": 1}}, "array"),
    ],
)
def test_what_is_wrong_is_named(value, complaint):
    with pytest.raises(InvalidInput, match=complaint):
        decode(value)


def test_several_inputs_must_be_named():
    with pytest.raises(InvalidInput, match="'age', 'name'"):
        decode({"instances": [[1]]}, BOTH)
    with pytest.raises(InvalidInput, match="'name' is missing"):
        decode({"instances": [{"age": 1}]}, BOTH)


@given(JSON_VALUES, st.sampled_from(["instances", "inputs"]), st.sampled_from([ROWS, BOTH]))
def test_any_json_is_tensors_or_a_clean_error(value, field, inputs):
    with contextlib.suppress(InvalidInput):
        infer = decode({field: value}, inputs)
        assert list(infer.inputs) == [spec.name for spec in inputs]


@given(st.binary(max_size=50))
def test_any_bytes_are_tensors_or_a_clean_error(body):
    with contextlib.suppress(InvalidInput):
        v1.decode("m", ROWS, body, JSON)


@given(st.lists(st.lists(st.floats(width=32, allow_infinity=False), min_size=2, max_size=2), max_size=4))
def test_numbers_come_back_as_they_went(rows):
    infer = decode({"instances": rows})
    array = infer.inputs["rows"]
    back = orjson.loads(answered(infer.encode({"out": array}))[1])["predictions"]
    assert len(back) == len(rows)
    for want, have in zip(rows, back, strict=True):
        assert [None if math.isnan(x) else np.float32(x) for x in want] == [
            None if x is None else np.float32(x) for x in have
        ]


def test_predictions_of_every_kind():
    assert predictions({"out": np.array([[1.5], [2]], np.float32)}) == [[1.5], [2.0]]
    assert predictions({"out": np.array([2**64 - 1], np.uint64)}) == [2**64 - 1]
    assert predictions({"out": np.array([[0.5, 2]], np.float16)}) == [[0.5, 2.0]]
    assert predictions({"out": np.array([["é".encode(), b"b"]], object)}) == [["é", "b"]]
    assert predictions({"out": np.zeros((0, 3), np.float32)}) == []
    assert predictions({"out": np.float64(3)}) == 3.0
    assert predictions({"a": [1, 2], "b": [[3], [4]]}) == [{"a": 1, "b": [3]}, {"a": 2, "b": [4]}]
    assert predictions({"a": [1, 2], "b": [3]}) == {"a": [1, 2], "b": [3]}


@pytest.mark.parametrize("array", [np.array([np.inf]), np.array([b"\xff"], object)])
def test_predictions_that_json_cannot_carry(array):
    with pytest.raises(InvalidInput, match="'out'"):
        decode({"instances": [[1, 2]]}).encode({"out": array})


EVENT = CloudEvent({"source": "https://example.com", "type": "t", "id": "7"}, {"instances": [[1, 2]]})


@pytest.mark.parametrize("make", [to_binary, to_structured])
def test_an_event_for_an_event(make):
    sent, body = make(EVENT)
    headers = {name.lower().encode(): value.encode() for name, value in sent.items()}
    if make is to_binary:
        headers.update(JSON)
    infer = v1.decode("m", ROWS, body, headers)
    assert infer.inputs["rows"].tolist() == [[1, 2]]
    got, answer = answered(infer.encode({"out": np.array([3.0])}))
    event = from_http(got, answer)
    assert (event["type"], event["source"]) == ("io.kserve.inference.response", "io.kserve.inference.m")
    assert event["specversion"] == "1.0"
    data = event.data if isinstance(event.data, dict) else json.loads(event.data)
    assert data == {"predictions": [3.0]}
    assert ("ce-id" in got) == (make is to_binary)


@pytest.mark.parametrize(
    "event",
    [
        [],
        {"id": "1", "source": "s", "type": "t", "specversion": "1.0"},
        {"id": 1, "source": "s", "type": "t", "specversion": "1.0", "data": {}},
        {"id": "1", "source": "s", "type": "t", "specversion": "9", "data": {}},
        {"id": "1", "source": "s", "type": "t", "specversion": "1.0", "data": "text"},
    ],
)
def test_a_broken_event_is_refused(event):
    with pytest.raises(InvalidInput):
        decode(event, headers={b"content-type": v1.STRUCTURED})
